"""One engine in a process of its own, so that no arm sees another's CUDA context.

`run_engine` is the parent's side: it starts the child, passes on what the child writes, and ends
it. The child starts the engine of its spec, and writes a line of JSON for each thing it learns.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serving_results as results

SHUTDOWN_SECONDS = 15  # kept back for the last line and the end of the processes


def run_engine(
    name: str, spec: dict[str, Any], plugin: bool, logs: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yields what the child writes, as it appears. ``spec``: "engine", arguments of EngineArgs;
    "measure", the module whose `measure` yields rows; "plan", its argument; "seed"; "in_process":
    the engine's core runs in the child itself."""
    records, log = logs / f"{name}.jsonl", logs / f"{name}.log"
    records.write_text("")
    deadline = time.monotonic() + seconds
    spec |= {"records": str(records), "deadline": deadline - SHUTDOWN_SECONDS}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if spec.get("in_process") else {}
    child = start_group([sys.executable, __file__, json.dumps(spec)], plugin, log, env)
    with records.open() as reader:
        try:
            while True:
                code = child.poll()
                lines = [json.loads(line) for line in reader]
                yield from lines
                if any("end" in line for line in lines):
                    break
                if code is not None:
                    yield {"error": f"exit code {code}: {results.first_error(log)}"}
                    break
                if time.monotonic() > deadline:
                    yield {"error": "killed: it did not end in time"}
                    break
                time.sleep(0.5)
        finally:
            stop_group(child)
    yield {"log": results.facts_of_log(log.read_text(errors="replace"))}


def start_group(
    command: list[str], plugin: bool, log: Path, env: dict[str, str] | None = None
) -> subprocess.Popen:
    """A process group of its own. Stock arms run without the plugin: "" allows none at all."""
    env = os.environ | {"VLLM_PLUGINS": "dms" if plugin else ""} | (env or {})
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop_group(child: subprocess.Popen) -> None:
    """End the child and the engine core that it started."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)


def end_on_signals() -> None:
    """A process that is told to stop, or whose terminal is gone, stops its engines: they are not
    of its group."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda number, _: sys.exit(f"stopped by {signal.Signals(number).name}")
        )


def work(spec: dict[str, Any]) -> None:
    """The child: one engine, all that its plan says."""
    start = time.monotonic()
    records = Path(spec["records"])

    def write(record: dict[str, Any]) -> None:
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")

    from serving_driver import Driver, OutOfTimeError
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(**spec["engine"], disable_log_stats=False)
    engine = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
    facts = results.facts_of_engine(engine.vllm_config)
    write({"engine": facts | {"startup_seconds": round(time.monotonic() - start, 1)}})
    vocab_size = engine.model_config.get_vocab_size()
    driver = Driver(engine, vocab_size, spec["seed"], deadline=spec["deadline"])
    measure = importlib.import_module(spec["measure"]).measure
    try:
        for row in measure(driver, spec["plan"], facts):
            write({"row": row})
    except OutOfTimeError:
        write({"error": "out of time: the workloads that are missing were not measured"})
    write({"end": {"seconds": round(time.monotonic() - start, 1), **results.gpu_memory()}})


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
