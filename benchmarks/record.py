"""A run's JSON: where its numbers are from, and what was measured. It is written at every change.

All that is written to one folder is one run, whichever commands it took: a command on another
machine, with other code or another load is refused.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certificate import certificate, command_and_date
from report_lines import figures_of

Row = dict[str, Any]


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
