"""A run's JSON: where its numbers are from, and what was measured. It is written at every change.

All that is written to one folder is one run, whichever commands it took: a command on another
machine, with other code or another load is refused.
"""

import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from report_lines import figures_of

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit() -> str | None:
    """Of the plugin and of the benchmarks; their results may differ."""
    commit = output_of("git", "rev-parse", "--short=10", "HEAD")
    code = ("../vllm_dms", ".", ":!results")
    changed = output_of("git", "status", "--porcelain", "--", *code)
    return f"{commit}+changes" if commit and changed else commit


def gpu_facts() -> dict[str, str | None]:
    """Of the first GPU that this process may use: the one that the benchmarks use."""
    query = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    answer = output_of(*query, *(["-i", first] if first else []))
    values = answer.splitlines()[0].split(", ") if answer else ["none (CPU)", None, None]
    return dict(zip(("gpu", "gpu_uuid", "driver"), values, strict=True))


def certificate(commit: str | None) -> dict[str, Any]:
    """What every result says of itself. ``commit``: for a copy of the tree without .git"""
    names = ("vllm", "vllm-dms", "torch", "triton")
    found = reversed([*distributions()])  # of two the first is imported
    versions = {one.name: one.version for one in found if one.name in names}
    return {"commit": commit or git_commit(), **gpu_facts(), "versions": versions}


def command_and_date() -> dict[str, str]:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": now, "command": shlex.join(["python", *sys.argv])}


class Record:
    """OUT/run.json"""

    def __init__(self, out: Path, model: Path, settings: dict[str, Any], commit: str | None):
        """``model``: made by synthetic.py; ``settings``: what all arms have in common"""
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.command = out / "run.json", command_and_date()
        same = certificate(commit) | {"weights_dtype": settings.get("quantization") or "bfloat16"}
        same["model"] = json.loads((model / "dms" / "synthetic.json").read_text())
        same["settings"] = json.loads(json.dumps(settings))
        run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self.report = {"run_id": run_id, "commands": [], **same, "engines": [], "rows": []}
        if self.path.exists():
            self.report = json.loads(self.path.read_text())
        for name, value in same.items():
            if (found := self.report[name]) != value:
                raise ValueError(
                    f"{self.path} has {name} {str(found)[:300]}, here it is {str(value)[:300]}. A "
                    "run has it in common: correct it, or give another --out."
                )
        self.report["commands"].append(self.command)

    def make_room(self, arms: list[str], workloads: list[str]) -> None:
        """Rows of engines that did not measure all give way to new ones. The others stay: measured
        again, a number could be chosen."""
        engines, rows, whole = self.report["engines"], [], set()
        for row in self.report["rows"]:
            again = row["arm"] in arms and row["workload"] in workloads
            if again and engines[row["engine"]].get("complete"):
                whole.add(f"{row['workload']} of {row['arm']}")
            elif not again:
                rows.append(row)
        if whole:
            raise ValueError(
                f"{self.path} already has {', '.join(sorted(whole))}. Leave it out, or give "
                "another --out."
            )
        self.report["rows"] = rows

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        partial.replace(self.path)

    def engine(self, arm: str, group: str, args: dict[str, Any]) -> dict[str, Any]:
        """Enter an engine that is about to start; returns its entry, to be filled."""
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        entry = {"arm": arm, "group": group, "started": started, "args": args}
        self.report["engines"].append(entry)
        self.write()
        return entry

    def add(self, engine: dict[str, Any], row: Row) -> None:
        """``engine``: the entry of the one that gave the row"""
        report, model = self.report, self.report["model"]
        own = {"run_id": report["run_id"], "arm": engine["arm"], **row}
        common = {name: report[name] for name in ("gpu", "commit", "weights_dtype")}
        common |= {name: report["versions"][name] for name in ("vllm", "torch")}
        common |= {name: model[name] for name in ("dialect", "rates", "mean_keep", "layers")}
        common |= {"model": model["shape"], "dms_window": model["window"], **self.command}
        common["pool_bytes"] = engine["args"]["kv_cache_memory_bytes"]
        common["engine"] = len(report["engines"]) - 1
        report["rows"].append(own | common)
        self.write()
        for figure in (figure for figure in figures_of(row["workload"]) if figure.key in row):
            title = figure.text(row["concurrency"], row.get("completed", 0))
            print(f"{engine['arm']}: {title}: {row[figure.key]:,.{figure.digits}f}", flush=True)
