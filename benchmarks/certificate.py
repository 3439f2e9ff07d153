"""What every result says of itself: command, date, commit, GPU, versions."""

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

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
    module = sys.modules["__main__"].__spec__  # None of a script that was started by its path
    started = ["-m", module.name] if module else [sys.argv[0]]
    return {"date": now, "command": shlex.join(["python", *started, *sys.argv[1:]])}
