"""What `vllm bench latency` and `vllm bench throughput` measure: an engine for each workload."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from statistics import mean
from typing import Any

import processes
from arms import Arm, flags
from record import Row

# One prompt at a time, to its first token: tokens, times.
PREFILL = {"prefill-8k": (8192, 8), "prefill-32k": (32768, 3), "prefill-128k": (131072, 1)}
# All at once, to the end: tokens in, tokens out, requests.
THROUGHPUT = {"reason-1k-8k": (1024, 8192, 256), "batch-1k": (1024, 256, 64)}


def limits(workload: str, scale: int) -> dict[str, int]:
    if workload in PREFILL:
        return {"max_model_len": (PREFILL[workload][0] + 64) // scale, "max_num_seqs": 8}
    tokens_in, tokens_out, requests = THROUGHPUT[workload]
    return {"max_model_len": (tokens_in + tokens_out) // scale, "max_num_seqs": requests}


def measure(
    arm: Arm, workloads: list[str], engine: dict[str, Any], options: Namespace, deadline: float
) -> Iterator[Row]:
    """``engine``: the entry of this engine in the run's record"""
    (workload,) = workloads
    log = options.out / f"{engine['arm']}-{workload}.log"
    saved = log.with_suffix(".json")
    command = [*processes.CLI, "bench", *bench_flags(workload, options.scale)]
    command += [*flags(engine["args"]), "--disable-detokenize", "--output-json", str(saved)]
    engine["command"] = processes.command_line(command)
    # A line a second tells what runs and what waits.
    processes.run(arm, command, log, deadline, VLLM_LOG_STATS_INTERVAL="1")
    found = json.loads(saved.read_text())
    yield {"workload": workload, **row_of(workload, options.scale, found, log.read_text())}


def bench_flags(workload: str, scale: int) -> list[str]:
    if workload in PREFILL:
        length, times = PREFILL[workload]
        bench = {"input-len": length // scale, "output-len": 1, "batch-size": 1}
        return ["latency", *flags(bench | {"num-iters-warmup": 2, "num-iters": times})]
    tokens_in, tokens_out, requests = THROUGHPUT[workload]
    lengths = {"random-input-len": tokens_in // scale, "random-output-len": tokens_out // scale}
    return ["throughput", *flags({"dataset-name": "random", "num-prompts": requests} | lengths)]


def row_of(workload: str, scale: int, found: dict[str, Any], log: str) -> Row:
    """``found``: what vLLM saved"""
    if workload in PREFILL:
        length, seconds = PREFILL[workload][0] // scale, found["latencies"]
        tok_s = length / mean(seconds)
        return {"concurrency": 1, "context": length, "prefill_tok_s": tok_s, "seconds": seconds}
    _, tokens_out, requests = THROUGHPUT[workload]
    seconds = found["elapsed_time"]
    tok_s = requests * (tokens_out // scale) / seconds
    row = {"concurrency": requests, "decode_tok_s": tok_s, "seconds": seconds}
    return row | held_and_preempted(log, requests)


def held_and_preempted(log: str, requests: int) -> Row:
    """Fewest that ran while others waited and none was done, all if none waited; preemptions."""
    stats = re.findall(r"Running: (\d+) reqs, Waiting: (\d+) reqs", log)
    counts = [(int(running), int(waiting)) for running, waiting in stats]
    held = min((r for r, w in counts if w and r + w == requests), default=requests)
    preempted = sum(map(int, re.findall(r"Preemptions: (\d+)", log)))
    return {"requests_held": held, "preemptions": preempted}
