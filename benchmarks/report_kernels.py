"""The table of kernels in this folder's README, from results/kernels.json (see `report`)."""

import itertools
from typing import Any

NAMES = {"bf16": "`dms`", "fp8": "`dms_fp8`", "int4": "`dms_int4`"}


def figures(row: dict[str, Any]) -> list[str]:
    times = (row.get(name) for name in ("both_us", "decode_us", "copy_us"))
    return [*("-" if us is None else f"{us:.1f}" for us in times), f"{row['share_of_copy']:.0%}"]


def kernels_section(measured: dict[str, Any]) -> str:
    """``measured``: what `bench_kernels.py --json` wrote"""
    decode = [row for row in measured["rows"] if row["kernel"] == "decode"]
    rows = {(row["batch"], row["storage"]): row for row in decode}
    with_rows = {storage for _, storage in rows}
    names = {key: name for key, name in NAMES.items() if key in with_rows | {"bf16", "fp8"}}
    head = ["requests"]
    for name in names.values():
        head += [f"{name}: store + decode, us", "decode", "copy moving as much", "share of copy"]
    text = [head, ["---:"] * len(head)]
    for batch in sorted({batch for batch, _ in rows}):
        found = (rows.get((batch, storage)) for storage in names)
        cells = (figures(row) if row else ["-"] * 4 for row in found)
        text.append([str(batch), *itertools.chain(*cells)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in text)
    facts = [f"{measured['gpu']}, which copies at {measured['copy_bytes_per_s'] / 1e12:.2f} TB/s"]
    facts.append(f"commit {measured['commit']}")
    unsteady = [
        f"{NAMES[storage]} at {batch}"
        for (batch, storage), row in sorted(rows.items())
        if row["both_us"] < row["decode_us"]
    ]
    if unsteady:
        facts.append(f"decode alone slower than with its store, so in doubt: {', '.join(unsteady)}")
    return f"{table}\n\n{'; '.join(facts)}.\n"
