"""Times attention kernels under other launch parameters than `tuning.default_tuning` has.

    python benchmarks/tune_kernels.py --json tuned.json --storage fp8 --decode 32 64 \\
        --set decode_warps+programs_per_sm=2+6,4+3 --set decode_block=32,64
    python benchmarks/tune_kernels.py --json tuned.json --prefill 1024:0 2048:8192 \\
        --set prefill_rows=64,128

All combinations are tried, compiled beforehand by several processes. As `bench_kernels` does, each
result is compared with the plain operations before it is timed; of one that does not fit on the GPU
the error is recorded.
"""

import argparse
import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_kernels import gate
from kernel_arena import HEAD_DIM, SCALE, STORAGE, Arena
from kernel_timing import time_graph, write_rows
from triton.runtime.errors import OutOfResources

from vllm_dms.backend.flash import find_flash
from vllm_dms.backend.kernels.tuning import Tuning, default_tuning


def make_arena(storage: str, job: dict[str, Any], changes: dict[str, Any]) -> Arena:
    probe = Arena(STORAGE[storage], 1, 1, 1, num_layers=1)
    tuning = replace(default_tuning(probe.layout), **changes)
    flash = None
    if job["flash"]:
        flash = find_flash(HEAD_DIM, torch.bfloat16, SCALE, torch.device("cuda"))
    return Arena(
        STORAGE[storage], job["batch"], job["chunk"], job["stored"],
        evict=job["evict"], tuning=tuning, flash=flash,
    )  # fmt: skip


def compile_only(storage: str, job: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        arena = make_arena(storage, job, changes)
        arena.store(0)
        (arena.prefill if job["chunk"] > 1 else arena.decode)(0)
        torch.cuda.synchronize()
    except OutOfResources:
        pass  # said when it is timed


def measure(storage: str, job: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Microseconds per layer."""
    torch.manual_seed(0)
    try:
        arena = make_arena(storage, job, changes)
        attend = arena.prefill if job["chunk"] > 1 else arena.decode
        arena.store(0)
        attend(0)
    except OutOfResources as error:
        return {"error": str(error)}
    gate(f"{job} {changes}", arena.attended_rows(0), 2e-2)
    layers = range(1, arena.num_layers) if arena.num_layers > 1 else range(1)
    spans = [time_graph(lambda: [attend(i) for i in layers]) / len(layers) for _ in range(2)]
    live = arena.state.live[1:, list(layers)].float().sum().item() / len(layers)
    found = {"us": round(min(spans), 2)}
    if job["chunk"] == 1:
        found["bytes_per_s"] = live * arena.layout.slot_bytes / (found["us"] * 1e-6)
    return found


def combinations(settings: list[str]) -> list[dict[str, Any]]:
    """Of "name=value,value" each, or "name+name=value+value,value+value"."""
    kinds = {name: type(value or 0) for name, value in asdict(Tuning()).items()}
    choices = []
    for setting in settings:
        names, _, values = setting.partition("=")
        choices.append([
            {
                name: None if value == "None" else kinds[name](value)
                for name, value in zip(names.split("+"), some.split("+"), strict=True)
            }
            for some in values.split(",")
        ])  # fmt: skip
    return [{k: v for one in some for k, v in one.items()} for some in itertools.product(*choices)]


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"evict": not args.keep, "flash": not args.no_flash}
    jobs = [{"batch": n, "chunk": 1, "stored": 8191, **common} for n in args.decode]
    for lengths in args.prefill:
        chunk, stored = map(int, lengths.split(":"))
        jobs.append({"batch": 1, "chunk": chunk, "stored": stored, **common})
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where results go")
    parser.add_argument("--storage", choices=STORAGE, default="bf16")
    parser.add_argument("--decode", nargs="*", type=int, default=[], help="requests")
    parser.add_argument("--prefill", nargs="*", default=[], help="TOKENS:STORED")
    parser.add_argument("--keep", action="store_true", help="eviction off")
    parser.add_argument("--no-flash", action="store_true", help="as without FlashAttention 3")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE,... of `Tuning`")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    parser.add_argument("--commit", help="where there is no .git to ask")
    args = parser.parse_args()
    jobs, changes = jobs_of(args), combinations(args.set)
    tasks = [(args.storage, job, some) for some in changes for job in jobs]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        list(pool.map(compile_only, *zip(*tasks, strict=True)))
    rows = ({"storage": task[0], **task[1], **task[2], **measure(*task)} for task in tasks)
    write_rows(args.json, args.commit, rows)


if __name__ == "__main__":
    main()
