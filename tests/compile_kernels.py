"""Compile every kernel for a GPU, without one: `test_compile` runs this in a process of its own,
because a process either interprets kernels or compiles them.

    python tests/compile_kernels.py STORAGE HEAD_DIM GROUP CAPABILITY PAGE_SIZE MAX_PAGES
    python tests/compile_kernels.py beside-flash STORAGE:HEAD_DIM:GROUP:PAGE_SIZE:EVICT ...

STORAGE: bfloat16, float16, ..., fp8 or int4; CAPABILITY: 90 for Hopper, ...; MAX_PAGES: of a row,
which has leaves if they are more than 32. Prints one line of JSON: for each kernel the registers of
a thread, the bytes of a thread's stack, where what does not fit in registers would go, the bytes of
a program's shared memory, and how often it accesses memory before it waits for the kernel before it
(null: it doesn't). The second form compiles `prefill_stored_kernel` alone, for Hopper.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import Copy
from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.arena.storage import STORAGES
from vllm_dms.backend.kernels.adapter import launch_alpha
from vllm_dms.backend.kernels.schedule import allocate_schedule
from vllm_dms.backend.kernels.tuning import default_tuning
from vllm_dms.backend.projection import Projection
from vllm_dms.backend.state import Batch, allocate_scratch, allocate_state
from vllm_dms.backend.triton_ops import TritonOps
from vllm_dms.backend.triton_snapshots import TritonSnapshots
from vllm_dms.config import DMSConfig

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoGPU:
    """What the compiler asks a driver for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")


def usage(kernel):
    """Registers and bytes of stack of a thread, bytes of shared memory, accesses before the wait"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_thread = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    before, wait, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
    early = len(re.findall(r"\b(?:ld|st|atom|red)\.global", before)) if wait else None
    return [*map(int, of_thread), kernel.metadata.shared, early]


def make_ops(storage, head_dim, group, overlap, page_size, max_pages, flash=None, evict=True):
    """Operations on a small arena in this machine's memory, and the model's dtype"""
    kind = storage if storage in STORAGES else "model"
    model_dtype = getattr(torch, storage) if kind == "model" else torch.bfloat16
    layout = ArenaLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=head_dim,
        window=4 * page_size,
        page_size=page_size,
        block_size=16,
        storage=STORAGES[kind].for_model(model_dtype),
        max_model_len=max_pages * page_size,
    )
    tuning = default_tuning(layout)
    schedule = allocate_schedule(layout, 4, 2 * group, tuning, torch.device("cpu"))
    state = allocate_state(torch.zeros(8 * layout.block_bytes, dtype=torch.uint8), layout, 8, 4)
    config = DMSConfig("nvidia-borrowed", layout.window, 1.0, 0.0, shift=1, evict=evict)
    scratch = allocate_scratch(layout, 64, "cpu")
    return TritonOps(state, scratch, config, 1.0, schedule, tuning, overlap, flash), model_dtype


def make_projection(head_dim, dtype):
    weight = torch.zeros(head_dim, dtype=dtype)
    rotary = SimpleNamespace(cos_sin_cache=torch.zeros(8, head_dim, dtype=dtype))
    return Projection(weight, weight, 1e-6, rotary)


def no_flash(query, *_):
    """`Flash` that computes nothing."""
    return torch.zeros(query.shape[1], len(query))


def run_all(storage, head_dim, group, *others):
    ops, model_dtype = make_ops(storage, head_dim, group, *others, no_flash)
    ops.warm_up(model_dtype, None)
    ops, model_dtype = make_ops(storage, head_dim, group, *others)
    ops.warm_up(model_dtype, None)
    ops.warm_up(model_dtype, make_projection(head_dim, model_dtype))
    ops.report(torch.zeros(ops.state.num_states, REPORT_WIDTH, dtype=torch.int32))
    weight = torch.zeros(2, head_dim, dtype=model_dtype)
    launch_alpha(weight.clone(), weight[0], weight, None, 1e-6)
    snapshots, one = TritonSnapshots(ops.state), np.ones(1, np.int32)
    copies = [Copy(1, (one, one, one))]
    snapshots.restore(copies)
    snapshots.save(copies)


def run_beside_flash(storage, *numbers):
    head_dim, group, page_size, evict = map(int, numbers)
    shape = (head_dim, group, True, page_size, 16)
    ops, dtype = make_ops(storage, *shape, no_flash, bool(evict))
    query = torch.zeros(2, 2 * group, head_dim, dtype=dtype)
    int32 = {"dtype": torch.int32}
    starts, length = torch.arange(2, **int32) * 2, torch.full((1,), 2, **int32)
    batch = Batch(1, 2, 2, torch.zeros(1, 1, **int32), starts, length)
    ops.begin_step(batch)
    ops.prefill(batch, 0, query, query[:, :2], query[:, :2], query)


def main_beside_flash(*specs):
    found = {}

    def compile_one(kernel, grid):
        def launch(*args, **kwargs):
            if kernel.__name__ == "prefill_stored_kernel":
                found[spec] = usage(kernel.warmup(*args, grid=grid, **kwargs))

        return launch

    driver.set_active(NoGPU(90))
    JITFunction.__getitem__ = compile_one
    for spec in specs:
        run_beside_flash(*spec.split(":"))
    print(json.dumps(found))


def main(name, *numbers):
    if name == "beside-flash":
        return main_beside_flash(*numbers)
    head_dim, group, capability, page_size, max_pages = map(int, numbers)
    found = {}

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            found[kernel.__name__] = usage(kernel.warmup(*args, grid=grid, **kwargs))

        return launch

    driver.set_active(NoGPU(capability))
    JITFunction.__getitem__ = compile_only
    run_all(name, head_dim, group, capability >= 90, page_size, max_pages)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
