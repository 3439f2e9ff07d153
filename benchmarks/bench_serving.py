"""Serving benchmark: vLLM's own caches and DMS, on the same weights, pool and requests.

    python benchmarks/synthetic.py Qwen3-8B --out /tmp/qwen3-8b
    python benchmarks/bench_serving.py --model /tmp/qwen3-8b --pool-gib 106 --out /tmp/run \\
        --arms bf16,dms --workloads decode-8k,serve-1024-512

OUT/run.json is written after every measurement. Another command with the same --out adds arms or
workloads to the run. README.md beside this says what the workloads are.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import multi_turn
import offline
import processes
import steps
import through_server
from arms import ARMS, engine_args
from multi_turn import TALKS
from offline import PREFILL, THROUGHPUT
from processes import RunError
from record import Record
from through_server import SERVED

WORKLOADS = (*steps.DECODE, *PREFILL, *THROUGHPUT, *SERVED, *TALKS, *steps.HOST)
# Options that all commands of a run have in common.
COMMON = (
    "pool_gib",
    "max_requests",
    "chunk",
    "steps",
    "dms",
    "eager",
    "together",
    "quantization",
    "compilation",
    "flash_attn_version",
    "scale",
    "seed",
)


class Group(NamedTuple):
    """Workloads that share an engine."""

    name: str
    workloads: list[str]
    limits: dict[str, int]
    measure: Callable
    served: bool = False  # by a server, which may wait while another answers


def groups(options: argparse.Namespace) -> list[Group]:
    found = []
    for name, members in (("steps", steps.DECODE), ("host", steps.HOST)):
        if chosen := [w for w in members if w in options.workloads]:
            limits = steps.Plan.of(chosen, options).limits()
            found.append(Group(name, chosen, limits, steps.measure))
    for workload in (*PREFILL, *THROUGHPUT):
        if workload in options.workloads:
            limits = offline.limits(workload, options.scale)
            found.append(Group(workload, [workload], limits, offline.measure))
    if chosen := [w for w in SERVED if w in options.workloads]:
        limits = {"max_model_len": 16384 // options.scale, "max_num_seqs": options.max_requests}
        found.append(Group("server", chosen, limits, through_server.measure, served=True))
    if chosen := [w for w in TALKS if w in options.workloads]:
        limits = {"max_model_len": -(-multi_turn.LONGEST // options.scale)}
        limits |= {"max_num_seqs": options.max_requests, "enable_prefix_caching": True}
        found.append(Group("turns", chosen, limits, multi_turn.measure, served=True))
    return found


def run(options: argparse.Namespace) -> list[str]:
    """Returns what went wrong."""
    deadline = time.monotonic() + options.seconds
    settings = {name: vars(options)[name] for name in COMMON}
    record = Record(options.out, options.model, settings, options.commit)
    errors: list[str] = []
    record.make_room(options.arms, options.workloads)
    for group in groups(options):
        together = options.together and group.served
        for names in [options.arms] if together else [[name] for name in options.arms]:
            errors += run_group(group, names, options, record, deadline)
    return errors


def run_group(
    group: Group, names: list[str], options: argparse.Namespace, record: Record, deadline: float
) -> list[str]:
    """Of arms that run at once each measures a workload while the others have no requests."""
    errors, running = [], {}
    for name in names:
        engine = record.engine(name, group.name, engine_args(ARMS[name], options, group.limits))
        rows = group.measure(ARMS[name], group.workloads, engine, options, deadline)
        running[name] = engine, rows
    while running:
        for name, (engine, rows) in list(running.items()):
            try:
                if (row := next(rows, None)) is not None:
                    if row:  # a server's first says that it is ready, before any is asked
                        record.add(engine, row)
                    continue
                engine["complete"] = True
            except RunError as error:
                engine["error"] = str(error)
                workloads = ", ".join(group.workloads)
                errors.append(f"{name} did not measure all of {workloads}: {error}")
            del running[name]
            engine["log"] = processes.telling_lines(options.out / f"{name}-{group.name}.log")
            record.write()
    return errors


def names_of(choices: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(choices))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(choices)}")
        return names

    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory made by synthetic.py")
    add("--out", type=Path, required=True, help="directory of the run")
    add("--pool-gib", type=float, required=True, help="KV pool of every arm")
    add("--arms", type=names_of(ARMS), default=list(ARMS), help=", ".join(ARMS))
    add("--workloads", type=names_of(WORKLOADS), required=True, help=", ".join(WORKLOADS))
    rising = {"type": lambda text: sorted({int(n) for n in text.split(",")})}
    add("--levels", **rising, default=[1, 8, 32, 64], help="concurrencies of decode-8k")
    add("--max-requests", type=int, default=1024, help="max_num_seqs where a workload sets none")
    add("--chunk", type=int, default=8192, help="max_num_batched_tokens; vllm serve's on an H100")
    add("--steps", type=int, default=64, help="decode steps of a measurement")
    add("--seconds", type=float, default=560, help="time for the whole command")
    add("--dms", type=json.loads, default={}, help='"dms" of --additional-config')
    add("--together", action="store_true", help="servers of all arms at once, asked in turn")
    add("--eager", action="store_true", help="no compilation, no graphs")
    add("--compilation", type=json.loads, default={}, help="--compilation-config of all arms")
    add("--flash-attn-version", type=int, help="of stock arms' decode, over vLLM's choice")
    add("--quantization", help="of all arms' weights, when they are loaded: fp8")
    add("--scale", type=int, default=1, help="divides all lengths; for rehearsals")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--commit", help="where there is no .git to ask")
    return parser.parse_args(argv)


if __name__ == "__main__":
    processes.end_on_signals()
    sys.exit("\n".join(run(parse_args())) or None)
