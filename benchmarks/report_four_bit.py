"""The table of 4-bit caches beside those in FP8; only a run with such arms has it."""

from report_cells import ARM_NAMES, Row, as_text, cell, ratio
from report_lines import figures_of

FP8 = ("fp8", "dms_fp8")
FOUR_BIT = ("turboquant_4bit_nc", "int4_per_token_head", "dms_int4")


def beside_fp8(rows: list[Row]) -> dict[str, Row]:
    """By arm, of rows of one load (the newest run last): those of the run that has most of these
    arms, of several the newest; an arm that it lacks, from the newest run that has it. Empty if no
    run has a 4-bit cache."""
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["arm"] in FP8 + FOUR_BIT:
            runs.setdefault(row["run_id"], {})[row["arm"]] = row
    with_four = [run for run in reversed(runs.values()) if run.keys() & set(FOUR_BIT)]
    newest = {arm: row for run in runs.values() for arm, row in run.items()}
    return newest | max(with_four, key=len) if with_four else {}


def four_bit_table(loads: dict[tuple, dict[str, Row]]) -> str:
    """``loads``: `beside_fp8` of each. An arm that none of them has gets no columns; without any
    4-bit cache there is no table."""
    arms = [arm for arm in FOUR_BIT if any(arm in by_arm for by_arm in loads.values())]
    head = ["workload", *(ARM_NAMES[arm] for arm in FP8)]
    for arm in arms:
        head += [ARM_NAMES[arm], *(f"/ {ARM_NAMES[base]}" for base in FP8)]
    lines = []
    for (_, workload, concurrency, prompts), by_arm in loads.items():
        for figure in figures_of(workload):
            if all(row.get(figure.key) is None for row in by_arm.values()):
                continue
            cells = [cell(by_arm.get(base), figure) for base in FP8]
            for arm in arms:
                row = by_arm.get(arm)
                cells += [cell(row, figure), *(ratio(by_arm.get(b), row, figure) for b in FP8)]
            lines.append([figure.text(concurrency, prompts), *cells])
    return as_text([head, *lines], "---:") if lines else ""
