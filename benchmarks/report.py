"""The READMEs' tables and the plot, from results/summary.json and results/kernels.json.

    python benchmarks/report.py            # rewrites README.md, the other one here, and the plot
    python benchmarks/report.py --check    # fails if one of them is not what the rows say

Facts and ratios only. A ratio compares two rows of one run. A row that loses stays. Rows of
bench_server.py have a table of their own, in benchmarks/README.md, where all runs are listed, too.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from report_kernels import kernels_section
from report_plot import plot, plot_is_current

HERE = Path(__file__).resolve().parent
# What stands beside what: a DMS arm, and vLLM's own cache with the same bytes per element.
PAIRS = (("bf16", "dms"), ("fp8", "dms_fp8"))
ARM_NAMES = {
    "bf16": "BF16",
    "fp8": "FP8",
    "dms_noevict": "`dms`, eviction off",
    "dms": "`dms`",
    "dms_fp8": "`dms_fp8`",
}
# Workload: (title, the row's figure, its unit). Those with a {c} have a line per concurrency.
WORKLOADS = {
    "decode-8k": ("decode at 8K, concurrency {c}", "decode_tok_s", "tok/s"),
    "saturated-8k": ("decode at 8K, pool full", "decode_tok_s", "tok/s"),
    "capacity-8k": ("requests of 8K held at once", "requests_held", ""),
    "prefill-8k": ("prefill, 8K prompt", "prefill_tok_s", "tok/s"),
    "prefill-32k": ("prefill, 32K prompt", "prefill_tok_s", "tok/s"),
    "prefill-128k": ("prefill, 128K prompt", "prefill_tok_s", "tok/s"),
    "reason-1k-8k": ("1K in, 8K out, concurrency {c}", "decode_tok_s", "tok/s"),
}
WORKLOADS_AT_8K = ("decode-8k", "saturated-8k", "capacity-8k", "prefill-8k")
DIALECT = "nvidia-adapter"  # of rows older than their field for it
SERVE = re.compile(r"serve-(\d+)-(\d+)")  # bench_server.py's, named after its lengths

Row = dict[str, Any]
Line = tuple[int, int, str]  # sorts lines; its last part is the title


def kind_of(workload: str) -> tuple[str, str, str]:
    """(title, the row's figure, its unit)"""
    served = SERVE.fullmatch(workload)
    if served:
        title = f"`vllm bench serve`, {served[1]} in, {served[2]} out, concurrency {{c}}"
        return title, "decode_tok_s", "tok/s"
    if workload not in WORKLOADS:
        raise ValueError(f"workload {workload!r} has no line in the report. Add it to WORKLOADS.")
    return WORKLOADS[workload]


def line_of(row: Row) -> Line:
    title, _, unit = kind_of(row["workload"])
    order = [*WORKLOADS, row["workload"]].index(row["workload"])
    concurrency = row["concurrency"] if "{c}" in title else 0
    rate = row.get("request_rate") or "inf"
    notes = [f"{row['completed']} prompts"] if row.get("completed") else []
    notes += [f"{rate} requests/s"] if str(rate) != "inf" else []
    return (
        order,
        concurrency,
        ", ".join([title.format(c=concurrency), *notes, *filter(None, [unit])]),
    )


def lines_of(rows: list[Row]) -> list[Line]:
    unknown = sorted({row["arm"] for row in rows} - set(ARM_NAMES))
    if unknown:
        raise ValueError(f"arms {unknown} have no column in the report. Add them to ARM_NAMES.")
    return sorted({line_of(row) for row in rows})


def choose(rows: list[Row], line: Line, arms: tuple[str, ...]) -> list[Row | None]:
    """The rows of ``arms`` from the newest run that has all of them; if there is none, each from
    the newest run that has it."""
    runs: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["run_id"]):
        if line_of(row) == line and row["arm"] in arms:
            runs.setdefault(row["run_id"], {})[row["arm"]] = row
    whole = [run for run in runs.values() if len(run) == len(arms)]
    newest_rows = (
        whole[-1] if whole else {arm: r for run in runs.values() for arm, r in run.items()}
    )
    return [newest_rows.get(arm) for arm in arms]


def figure(row: Row | None) -> float | None:
    return row and row.get(kind_of(row["workload"])[1])


def cell(row: Row | None) -> str:
    value = figure(row)
    if row is None or value is None:
        return "-"
    notes = []
    if row["workload"] == "saturated-8k":
        notes.append(f"{row['concurrency']} requests")
    held = row["requests_held"]
    if row["workload"] == "reason-1k-8k" and held and held < row["concurrency"]:
        notes.append(f"{held} held")
    if row["preemptions"]:
        notes.append(f"{row['preemptions']:,} preempted")
    if row.get("mean_tpot_ms"):
        notes.append(f"{row['mean_tpot_ms']:.1f} ms/token")
    if row.get("complete") is False:
        notes.append("cut short")
    return f"{value:,.0f}" + (f" ({', '.join(notes)})" if notes else "")


def ratio(old: Row | None, new: Row | None) -> str:
    if old is None or new is None or old["run_id"] != new["run_id"]:
        return "-"
    before, after = figure(old), figure(new)
    return f"{after / before:.2f}" if before and after is not None else "-"


def table(rows: list[Row]) -> str:
    head = ["workload", "BF16", ARM_NAMES["dms_noevict"], "`dms`", "`dms` / BF16"]
    head += ["FP8", "`dms_fp8`", "`dms_fp8` / FP8"]
    text = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in lines_of(rows):
        bf16, dms = choose(rows, line, PAIRS[0])
        fp8, dms_fp8 = choose(rows, line, PAIRS[1])
        (noevict,) = choose(rows, line, ("dms_noevict",))
        left = [line[-1], *map(cell, (bf16, noevict, dms)), ratio(bf16, dms)]
        text.append([*left, *map(cell, (fp8, dms_fp8)), ratio(fp8, dms_fp8)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def facts_of(row: Row) -> list[str]:
    """Where a row's numbers come from."""
    return [
        str(row["gpu"]),
        f"vLLM {row.get('vllm')}, torch {row.get('torch')}",
        f"{row.get('model')} shape, {row.get('weights_dtype')} weights",
        f"window {row.get('dms_window')}, {row.get('rates')} eviction rates",
        f"{row.get('dialect') or DIALECT} decisions",
    ]


def loads_of(rows: list[Row]) -> str:
    """Workloads, each with its concurrencies where the table has a line for each."""
    texts = []
    for workload in sorted({row["workload"] for row in rows}):
        levels = sorted({row["concurrency"] for row in rows if row["workload"] == workload})
        each = "{c}" in kind_of(workload)[0]
        texts.append(f"{workload} at {'/'.join(map(str, levels))}" if each else workload)
    return ", ".join(texts)


def runs_table(rows: list[Row]) -> str:
    """A line for each run: what it measured, and what is not the same for all of them."""
    head = ["run", "measured", "commit", "pool", "live compression at 8K"]
    runs: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["run_id"]):
        runs.setdefault(row["run_id"], []).append(row)
    shared = shared_facts(rows)
    text = [head, ["---"] * len(head)]
    for run_id, of_run in runs.items():
        pools = sorted({row["pool_bytes"] for row in of_run if row.get("pool_bytes")})
        live = {
            row["arm"]: f"{ARM_NAMES[row['arm']]} {row['live_compression']:.2f}"
            for row in of_run
            if row["workload"] in WORKLOADS_AT_8K and row["live_compression"]
        }
        own = [fact for fact in facts_of(of_run[0]) if fact not in shared]
        text.append(
            [
                f"`{run_id}`",
                "; ".join([loads_of(of_run), *own]),
                of_run[0]["commit"],
                " / ".join(f"{p / 2**30:.1f} GiB" for p in pools),
                ", ".join(value for _, value in sorted(live.items())) or "-",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def shared_facts(rows: list[Row]) -> list[str]:
    first, *others = map(facts_of, rows)
    return [fact for fact in first if all(fact in facts for facts in others)]


def results_section(rows: list[Row]) -> str:
    return f"{table(rows)}\n\n{'; '.join(shared_facts(rows))}.\n" if rows else ""


def runs_section(rows: list[Row]) -> str:
    return f"{runs_table(rows)}\n\nAll runs: {'; '.join(shared_facts(rows))}.\n" if rows else ""


def marks(name: str) -> tuple[str, str]:
    """The lines between which a section goes."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def with_section(readme: str, name: str, section: str) -> str:
    begin, end = marks(name)
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"a README lacks the lines {begin} and {end}, between which results go.")
    return f"{before}{begin}\n{section}{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--summary", type=Path, default=HERE / "results" / "summary.json")
    parser.add_argument("--kernels", type=Path, default=HERE / "results" / "kernels.json")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--served-readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--plot", type=Path, default=HERE / "results" / "serving.png")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    args = parser.parse_args(argv)
    rows = json.loads(args.summary.read_text()) if args.summary.exists() else []
    served = [row for row in rows if SERVE.fullmatch(row["workload"])]
    rows = [row for row in rows if row not in served]
    kernels = kernels_section(json.loads(args.kernels.read_text())) if args.kernels.exists() else ""
    sections = {
        "results": results_section(served),
        "kernels": kernels,
        "runs": runs_section([*rows, *served]),
    }
    served_page = args.served_readme.read_text()
    for name, section in sections.items():
        served_page = with_section(served_page, name, section)
    pages = {
        args.readme: with_section(args.readme.read_text(), "results", results_section(rows)),
        args.served_readme: served_page,
    }
    if args.check:
        stale = [str(path) for path, text in pages.items() if path.read_text() != text]
        if rows and not plot_is_current(rows, args.plot):
            stale.append(str(args.plot))
        if stale:
            print(f"stale: {', '.join(stale)}. Run: python benchmarks/report.py", file=sys.stderr)
        return 1 if stale else 0
    if rows:
        plot(rows, ARM_NAMES, args.plot)
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
