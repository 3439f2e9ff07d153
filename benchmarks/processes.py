"""Processes of a run: each arm has its own, so that none sees another's CUDA context or plugin."""

import atexit
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import Arm

CLI = (sys.executable, "-m", "vllm.entrypoints.cli.main")  # `vllm`, where that is not installed
# Lines of a log that tell what ran; of the last, the newest.
TELLING = ("attention backend", "FlashAttention version", "DMS attention:", "DMS cache:",
           "live compression")  # fmt: skip


class RunError(Exception):
    """Something was not measured as it should have been."""


def start(
    arm: Arm, command: list[str], log: Path, env: dict[str, str] | None = None, **pipes: Any
) -> subprocess.Popen:
    """In a process group of its own, which `stop` ends, at the latest when this process ends. What
    has no pipe goes to ``log``. Stock arms run without any plugin."""
    plugins = "" if arm.dms is None else "dms"
    env = os.environ | (env or {}) | {"VLLM_PLUGINS": plugins, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        out = {"stdout": file, "stderr": file, **pipes}
        child = subprocess.Popen(command, env=env, start_new_session=True, **out)
    running.add(child)
    return child


running: set[subprocess.Popen] = set()


@atexit.register
def stop_all() -> None:
    for child in [*running]:
        stop(child)


def stop(child: subprocess.Popen) -> None:
    """End the child and the engine core that it started."""
    running.discard(child)
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)


def run(arm: Arm, command: list[str], log: Path, deadline: float, **env: str) -> None:
    child = start(arm, command, log, env)
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
    """The exception that came first: later ones say that a process is gone. Warnings name some that
    were handled."""
    lines = log.read_text(errors="replace").splitlines()
    text = "\n".join(line for line in lines if " WARNING " not in line)
    found = re.search(r"\w+Error: .+", text)
    return found.group()[:400] if found else f"see {log.name}"


def telling_lines(log: Path) -> dict[str, str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return {text: line.split("] ", 1)[-1] for text in TELLING for line in lines if text in line}


def command_line(command: Sequence[str]) -> str:
    """As a result names it: without the place of this machine's Python."""
    return shlex.join("python" if part == sys.executable else part for part in command)
