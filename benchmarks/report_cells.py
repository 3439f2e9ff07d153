"""How a measured row becomes a cell of a table, and two rows a ratio."""

from typing import Any

from report_lines import Figure

ARM_NAMES = {
    "bf16": "BF16",
    "fp8": "FP8",
    "dms_keep": "`dms`, eviction off",
    "dms": "`dms`",
    "dms_fp8": "`dms_fp8`",
    "turboquant_4bit_nc": "TurboQuant 4-bit",
    "int4_per_token_head": "int4 per token and head",
    "dms_int4": "`dms_int4`",
}

Row = dict[str, Any]


def cell(row: Row | None, figure: Figure) -> str:
    value = row and row.get(figure.key)
    if row is None or value is None:
        return "-"
    notes = []
    if row["workload"] == "saturated-8k":
        notes.append(f"{row['concurrency']} requests")
    held = row.get("requests_held")
    if row["workload"] == "reason-1k-8k" and held and held < row["concurrency"]:
        notes.append(f"{held} held")
    if row.get("preemptions") and figure.unit == "tok/s":
        notes.append(f"{row['preemptions']:,} preempted")
    if row.get("complete") is False:
        notes.append("cut short")
    return f"{value:,.{figure.digits}f}" + (f" ({', '.join(notes)})" if notes else "")


def ratio(old: Row | None, new: Row | None, figure: Figure) -> str:
    if old is None or new is None or old["run_id"] != new["run_id"]:
        return "-"
    before, after = old.get(figure.key), new.get(figure.key)
    return f"{after / before:.2f}" if before and after is not None else "-"


def as_text(lines: list[list[str]], align: str) -> str:
    head, *others = lines
    rule = ["---", *[align] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *others))
