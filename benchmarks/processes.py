"""Processes of a run: each arm has its own, so that none sees another's CUDA context or plugin."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from arms import Arm

CLI = (sys.executable, "-m", "vllm.entrypoints.cli.main")  # `vllm`, where that is not installed
# Lines of a log that tell what ran; of the last, the newest.
TELLING = ("attention backend", "FlashAttention version", "DMS attention:", "DMS cache:",
           "live compression")  # fmt: skip


class RunError(Exception):
    """Something was not measured as it should have been."""


def start(arm: Arm, command: list[str], log: Path, **env: str) -> subprocess.Popen:
    """In a process group of its own, which `stop` ends. Stock arms run without any plugin."""
    plugins = "" if arm.dms is None else "dms"
    env |= {"VLLM_PLUGINS": plugins, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        out = {"stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=os.environ | env, start_new_session=True, **out)


def stop(child: subprocess.Popen) -> None:
    """End the child and the engine core that it started."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)


def run(arm: Arm, command: list[str], log: Path, deadline: float, **env: str) -> None:
    child = start(arm, command, log, **env)
    try:
        code = child.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise RunError(f"out of time: see {log.name}") from None
    finally:
        stop(child)
    if code:
        raise RunError(f"exit code {code}: {first_error(log)}")


def end_on_signals() -> None:
    """A process that is told to stop, or whose terminal is gone, stops its engines: they are not
    of its group."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda number, _: sys.exit(f"stopped by {signal.Signals(number).name}")
        )


def first_error(log: Path) -> str:
    """The exception that came first: later ones say that a process is gone."""
    found = re.search(r"\w+Error: .+", log.read_text(errors="replace"))
    return found.group()[:400] if found else f"see {log.name}"


def telling_lines(log: Path) -> dict[str, str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return {text: line.split("] ", 1)[-1] for text in TELLING for line in lines if text in line}
