"""The READMEs' tables and the plot, from what was measured.

    python benchmarks/report.py               # rewrites README.md, the other one here, and the plot
    python benchmarks/report.py --check       # fails if one of them is not what the rows say
    python benchmarks/report.py OUT/run.json  # shows a run's table, and changes nothing

Published are results/kernels.json and the runs that results/published.json names. Facts and ratios
only. A ratio compares two rows of one run. A row that loses stays.
"""

import argparse
import json
import sys
from pathlib import Path

from arms import PAIRS
from report_cells import ARM_NAMES, Row, as_text, cell, ratio
from report_four_bit import beside_fp8, four_bit_table
from report_kernels import kernels_section
from report_lines import README, figures_of
from report_plot import plot, plot_is_current
from shapes import SHAPES

HERE = Path(__file__).resolve().parent
OLDER_NAMES = {"dms_noevict": "dms_keep"}
WORKLOADS_AT_8K = ("decode-8k", "saturated-8k", "capacity-8k", "prefill-8k")
DIALECT = "nvidia-adapter"  # of rows older than their field for it

Load = tuple[int, str, int, int]  # place in the table, workload, concurrency, prompts


def load_of(row: Row) -> Load:
    """What two rows must share to be compared. A concurrency that is a result is none of it."""
    workload = row["workload"]
    order = [*README, workload].index(workload)
    asked = "{c}" in figures_of(workload)[0].title
    return order, workload, row["concurrency"] if asked else 0, row.get("completed") or 0


def read_rows(paths: list[Path]) -> list[Row]:
    """Of runs, the newest last."""
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    rows = [row | {"arm": OLDER_NAMES.get(row["arm"], row["arm"])} for row in rows]
    unknown = sorted({row["arm"] for row in rows} - set(ARM_NAMES))
    if unknown:
        raise ValueError(f"arms {unknown} have no column in the report. Add them to ARM_NAMES.")
    kinds = sorted({subject(row) for row in rows})
    if len(kinds) > 1:
        raise ValueError(
            f"the runs are of {' and of '.join(kinds)}, which no table compares. Show each by "
            "itself: report.py OUT/run.json."
        )
    return sorted(rows, key=lambda row: row["run_id"])


def choose(rows: list[Row], arms: tuple[str, ...]) -> dict[str, Row]:
    """Of rows of one load those of ``arms`` in the newest run that has all of them; if there is
    none, each from the newest run that has it."""
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["arm"] in arms:
            runs.setdefault(row["run_id"], {})[row["arm"]] = row
    whole = [run for run in runs.values() if len(run) == len(arms)]
    return whole[-1] if whole else {arm: r for run in runs.values() for arm, r in run.items()}


def by_load(rows: list[Row]) -> dict[Load, list[Row]]:
    """In the order of the table."""
    loads: dict[Load, list[Row]] = {}
    for row in rows:
        loads.setdefault(load_of(row), []).append(row)
    return dict(sorted(loads.items()))


def shown(rows: list[Row]) -> dict[Load, dict[str, Row]]:
    """By load and arm the rows of the table."""
    sides = (*PAIRS, ("dms_keep",))
    return {
        load: {arm: row for arms in sides for arm, row in choose(of_load, arms).items()}
        for load, of_load in by_load(rows).items()
    }


def shown_of_four_bit(rows: list[Row]) -> dict[Load, dict[str, Row]]:
    """By load and arm the rows of the second table."""
    return {load: beside_fp8(of_load) for load, of_load in by_load(rows).items()}


def table(rows: list[Row]) -> str:
    head = ["workload", "BF16", ARM_NAMES["dms_keep"], "`dms`", "`dms` / BF16"]
    lines = [[*head, "FP8", "`dms_fp8`", "`dms_fp8` / FP8"]]
    for (_, workload, concurrency, prompts), by_arm in shown(rows).items():
        for figure in figures_of(workload):
            if all(row.get(figure.key) is None for row in by_arm.values()):
                continue
            cells = {arm: cell(by_arm.get(arm), figure) for arm in ARM_NAMES}
            ratios = [ratio(by_arm.get(a), by_arm.get(b), figure) for a, b in PAIRS]
            left = [figure.text(concurrency, prompts), cells["bf16"], cells["dms_keep"]]
            left += [cells["dms"], ratios[0]]
            lines.append([*left, cells["fp8"], cells["dms_fp8"], ratios[1]])
    return as_text(lines, "---:") if lines[1:] else ""


def subject(row: Row) -> str:
    """What was served."""
    name, layers = row.get("model"), row.get("layers")
    cut = layers and layers < SHAPES[name]["num_hidden_layers"]
    return (
        f"{name} shape{f' of {layers} layers' if cut else ''}, {row.get('weights_dtype')} weights"
    )


def facts_of(row: Row) -> list[str]:
    """Where a row's numbers come from."""
    return [
        str(row["gpu"]),
        f"vLLM {row.get('vllm')}, torch {row.get('torch')}",
        subject(row),
        f"window {row.get('dms_window')}, {row.get('rates')} eviction rates",
        f"{row.get('dialect') or DIALECT} decisions",
    ]


def shared_facts(rows: list[Row]) -> list[str]:
    first, *others = map(facts_of, rows)
    return [fact for fact in first if all(fact in facts for facts in others)]


def loads_text(rows: list[Row]) -> str:
    """Workloads, each with its concurrencies where the table has a line for each."""
    levels: dict[str, set[int]] = {}
    for _, workload, concurrency, _ in map(load_of, rows):
        levels.setdefault(workload, set()).add(concurrency)
    return ", ".join(
        workload if found == {0} else f"{workload} at {'/'.join(map(str, sorted(found)))}"
        for workload, found in sorted(levels.items())
    )


def runs_table(rows: list[Row]) -> str:
    """A line for each run: what is shown of it, and what is not the same for all of them."""
    lines = [["run", "measured", "commit", "pool", "live compression at 8K"]]
    shared = shared_facts(rows)
    for run_id in sorted({row["run_id"] for row in rows}):
        of_run = [row for row in rows if row["run_id"] == run_id]
        live = {
            row["arm"]: f"{ARM_NAMES[row['arm']]} {row['live_compression']:.2f}"
            for row in of_run
            if row["workload"] in WORKLOADS_AT_8K and row.get("live_compression")
        }
        own = [fact for fact in facts_of(of_run[0]) if fact not in shared]
        pool = f"{of_run[0]['pool_bytes'] / 2**30:.1f} GiB"
        kept = ", ".join(value for _, value in sorted(live.items())) or "-"
        measured = "; ".join([loads_text(of_run), *own])
        lines.append([f"`{run_id}`", measured, of_run[0]["commit"], pool, kept])
    return as_text(lines, "---")


def used(rows: list[Row]) -> list[Row]:
    tables = (shown(rows), shown_of_four_bit(rows))
    return [row for loads in tables for by_arm in loads.values() for row in by_arm.values()]


def results_section(rows: list[Row]) -> str:
    if not rows:
        return ""
    tables = [table(rows), four_bit_table(shown_of_four_bit(rows))]
    return "\n\n".join([*filter(None, tables), f"{'; '.join(shared_facts(used(rows)))}.\n"])


def runs_section(rows: list[Row]) -> str:
    facts = "; ".join(shared_facts(used(rows))) if rows else ""
    return f"{runs_table(used(rows))}\n\nAll runs: {facts}.\n" if rows else ""


def with_section(readme: str, name: str, section: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"a README lacks the lines {begin} and {end}, between which results go.")
    return f"{before}{begin}\n{section}{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", help="only show these: OUT/run.json")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    args = parser.parse_args(argv)
    if args.runs:
        rows = read_rows(args.runs)
        print(results_section(rows), runs_section(rows), sep="\n")
        return 0
    results, readme, own_readme = HERE / "results", HERE.parent / "README.md", HERE / "README.md"
    published = json.loads((results / "published.json").read_text())
    rows = read_rows([results / f"{run_id}.json" for run_id in published])
    own = with_section(own_readme.read_text(), "runs", runs_section(rows))
    kernels = json.loads((results / "kernels.json").read_text())
    own = with_section(own, "kernels", kernels_section(kernels))
    others = [row for row in rows if row["workload"] not in README]
    own = with_section(own, "results", results_section(others))
    main = results_section([row for row in rows if row["workload"] in README])
    pages = {readme: with_section(readme.read_text(), "results", main), own_readme: own}
    lines, png = shown(rows).values(), results / "serving.png"
    if args.check:
        stale = [str(path) for path, text in pages.items() if path.read_text() != text]
        stale += [] if plot_is_current(lines, png) else [str(png)]
        if stale:
            print(f"stale: {', '.join(stale)}. Run: python benchmarks/report.py", file=sys.stderr)
        return 1 if stale else 0
    plot(lines, ARM_NAMES, png)
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
