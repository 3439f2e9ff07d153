"""`bench_kernels.py --tune`: launch parameters by trying them."""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace

from kernel_arena import STORAGE, Arena
from kernel_timing import time_graph
from triton.runtime.errors import TritonError

from vllm_dms.backend.kernels.tuning import Tuning, default_tuning

# What --tune tries, in random order until the time is over.
TUNING_GRIDS = {
    "decode": {
        "decode_block": (64, 32, 128),
        "decode_warps": (2, 4, 8),
        "decode_stages": (2, 3, 4),
        "programs_per_sm": (4, 2, 3, 6, 8),
    },
    "prefill": {
        "prefill_rows": (64, 128, 256),
        "prefill_block": (64, 128),
        "prefill_warps": (4, 8, 16),
        "prefill_stages": (2, 3, 4),
    },
}


def variants(kind: str, base: Tuning) -> Iterator[tuple[dict[str, int], Tuning]]:
    """(what was varied, launch parameters)"""
    grid = TUNING_GRIDS[kind]
    choices = list(itertools.product(*grid.values()))
    random.Random(0).shuffle(choices)
    for values in choices:
        varied = dict(zip(grid, values, strict=True))
        yield varied, replace(base, **varied)


def time_variant(arena: Arena, kind: str, tuning: Tuning) -> float:
    """Microseconds per layer; infinity where the GPU has too little of something."""
    arena.restore()
    arena.use(tuning)
    attend = getattr(arena, kind)
    layers = range(1, arena.num_layers) if kind == "decode" else range(1)
    try:
        arena.store(0)
        attend(0)
        return time_graph(lambda: [attend(i) for i in layers], 5) / len(layers)
    except (TritonError, RuntimeError) as problem:
        print(f"  {str(problem).splitlines()[0][:80]}: {tuning}")
        return float("inf")


def tune(kinds: list[str], storages: list[str], seconds: float) -> list[dict]:
    """Try launch parameters, the same time for each kernel and storage; print the fastest."""
    shapes = {"decode": [(8, 1, 8191), (64, 1, 8191)], "prefill": [(1, 4096, 8192)]}
    jobs = [(k, s, shape) for k in kinds for s in storages for shape in shapes[k]]
    rows = []
    for kind, storage, shape in jobs:
        # The same number of layers for all batches: it is compiled in.
        arena = Arena(STORAGE[storage], *shape, num_layers=8 if kind == "decode" else 1)
        end = time.monotonic() + seconds / len(jobs)
        found = []
        for varied, tuning in variants(kind, default_tuning(arena.layout)):
            if time.monotonic() > end:
                break
            found.append((time_variant(arena, kind, tuning), varied))
        found.sort(key=lambda pair: pair[0])
        print(f"{kind} {storage}, {shape[0]} requests: {len(found)} variants tried", flush=True)
        for micros, varied in found[:6]:
            print(f"  {micros:9.2f} us  {varied}", flush=True)
        about = {"kernel": kind, "storage": storage, "batch": shape[0]}
        rows += [{**about, "us": micros, **varied} for micros, varied in found]
    return rows
