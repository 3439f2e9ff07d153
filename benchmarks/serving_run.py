"""A run's JSON: how it begins, how it goes on in a later command, and how it is filled."""

import json
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import serving_results as results

Row = dict[str, Any]


def new_report(
    run_id: str | None, commit: str | None, model: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """One run's JSON, still without results. ``commit``: for a copy of the tree without .git;
    ``settings``: what all arms have in common."""
    now = datetime.now(UTC)
    part = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
    }
    return {
        "run_id": run_id or now.strftime("%Y%m%d-%H%M%S"),
        "parts": [part],
        "commit": commit or results.git_commit(Path(__file__).parent),
        **results.gpu_facts(),
        "versions": {
            name: results.version_of(name) for name in ("vllm", "vllm-dms", "torch", "triton")
        },
        "model": results.model_facts(model),
        "weights_dtype": "bfloat16",
        "settings": json.loads(json.dumps(settings)),
        "arms": {},
        "rows": [],
    }


# What makes parts one run: one machine, one code, one load.
SAME_IN_ALL_PARTS = (
    "gpu", "gpu_uuid", "driver", "versions", "commit", "model", "weights_dtype", "settings",
)  # fmt: skip


# Arm, workload, and the concurrencies that are measured one after another; none: it has one row.
Series = tuple[str, str, list[int]]


def continued(path: Path, report: dict[str, Any], new: Iterable[Series]) -> dict[str, Any]:
    """The run at ``path`` with the part that ``report``, made just now, begins, which will measure
    what is ``new``. Rows of a series that was cut short give way."""
    earlier = json.loads(path.read_text())
    for name in SAME_IN_ALL_PARTS:
        if name not in earlier:
            raise ValueError(
                f"{path} does not say its {name!r}, so nothing can be compared with it. Measure "
                "all arms in a new run."
            )
        if earlier[name] != report[name]:
            raise ValueError(
                f"{path} has {_difference(name, earlier[name], report[name])} here. Arms of one "
                "run have all this in common: correct it, or measure all arms in a new run."
            )
    rows = earlier["rows"]
    for arm, workload, levels in new:
        found = {r["concurrency"] for r in rows if (r["arm"], r["workload"]) == (arm, workload)}
        if found and found.issuperset(levels):
            at = f" at {', '.join(map(str, levels))}" if levels else ""
            raise ValueError(
                f"{path} already has {workload}{at} of {arm}. Leave it out, or start a new run."
            )
        again = {(arm, workload, level) for level in levels}
        rows = [r for r in rows if (r["arm"], r["workload"], r["concurrency"]) not in again]
    return earlier | {"parts": earlier["parts"] + report["parts"], "rows": rows}


def _difference(name: str, old: Any, new: Any) -> str:
    """The first value that differs, by its path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(f"{name}.{key}", old.get(key), new.get(key))
    return f"{name} {str(old)[:80]!r}, but it is {str(new)[:80]!r}"


def new_engine(report: dict[str, Any], arm: str, group: str, args: Any) -> dict[str, Any]:
    """Enter an engine that is about to start; returns its record, to be filled."""
    engines = report["arms"].setdefault(arm, {})
    name = group if group not in engines else f"{group}-{len(engines) + 1}"
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    engines[name] = {"started": started, "args": args}
    return engines[name]


def full_row(report: dict[str, Any], arm: str, record: dict[str, Any], row: Row) -> Row:
    """``record``: of the engine that gave the row"""
    engine, part = record.get("engine", {}), report["parts"][-1]
    return {
        "run_id": report["run_id"],
        "arm": arm,
        **row,
        **{name: report[name] for name in ("gpu", "gpu_uuid", "driver", "commit")},
        "date": part["date"],
        "vllm": report["versions"]["vllm"],
        "torch": report["versions"]["torch"],
        "weights_dtype": report["weights_dtype"],
        "pool_bytes": engine.get("pool_bytes"),
        "model": report["model"]["shape"],
        "layers": report["model"]["layers"],
        "dms_window": report["model"]["window"],
        **{name: report["model"].get(name) for name in ("dialect", "rates", "mean_keep")},
        "cudagraphs": engine.get("cudagraphs"),
        "command": part["command"],
    }


def keep(
    report: dict[str, Any], arm: str, record: dict[str, Any], updates: Iterable[Row], to: Path
) -> str | None:
    """Write down what an engine yields, as it comes; its rows enter the summary at its end.
    Returns why it did not measure all, if so."""
    for update in updates:
        if "row" in update:
            report["rows"].append(full_row(report, arm, record, update["row"]))
            print(one_line(report["rows"][-1]), flush=True)
        else:
            record.update(update)
            print(f"{arm} {json.dumps(update)[:400]}", flush=True)
        results.write_json(to / f"{report['run_id']}.json", report)
    results.update_summary(to / "summary.json", report["rows"])
    return f"{arm} did not measure all: {record['error']}" if "error" in record else None


def one_line(row: Row) -> str:
    figures = ("concurrency", "decode_tok_s", "prefill_tok_s", "requests_held", "preemptions",
               "live_compression", "context")  # fmt: skip
    parts = [f"{name}={row[name]:.5g}" for name in figures if row.get(name) is not None]
    return f"{row['arm']:12}{row['workload']:14}{' '.join(parts)}"
