"""Which kernels Triton compiles for what, without compiling any: `test_warm_up` runs this in a
process of its own, because a process either interprets kernels or compiles them.

    python tests/specializations.py STORAGE [flash]

Prints one line of JSON: kernels that a warm-up asks the compiler for, and those that batches of
many kinds ask for after it.
"""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from compile_kernels import NoGPU, make_ops, make_projection, no_flash
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_dms.arena.messages import Copy
from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.kernels import driver as dms_driver
from vllm_dms.backend.projection import rotated_width
from vllm_dms.backend.state import Batch
from vllm_dms.backend.triton_snapshots import TritonSnapshots

GROUP, HEAD_DIM, HEADS = 4, 128, 2


def batches():
    """Of decodes, of chunks, of both; any block table of vLLM's; nothing stored, or what the host
    does not know."""
    for counts in ((1,), (1, 1, 1, 1), (16,), (17, 1, 1), (1, 0, 0), (31, 2, 1, 15), (5, 0)):
        for width in (1, 2, 16, 1025):
            starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            table = torch.zeros(len(counts), width, dtype=torch.int32)
            lengths = torch.tensor([0, *counts], dtype=torch.int32)[1:]  # not aligned
            batch = Batch(len(counts), sum(counts), max(counts), table, starts, lengths)
            yield from (batch, replace(batch, max_stored=0))


def run_projection(ops, batch, dtype, projection, alphas=(None,)):
    tokens = batch.num_tokens
    qkv = torch.zeros(tokens, (GROUP + 2) * HEADS * HEAD_DIM, dtype=dtype)
    rotated = torch.zeros(tokens, rotated_width(HEADS, GROUP, HEAD_DIM), dtype=dtype)
    ops.begin_step(batch)
    positions = torch.zeros(tokens + 1, dtype=torch.int64)[1:]
    output = torch.zeros(tokens, HEADS * GROUP * HEAD_DIM, dtype=dtype)
    for layer, alpha in itertools.product((0, 1, 16), alphas):
        ops.attend_projection(batch, layer, projection, qkv, positions, alpha, rotated, output)


def run_snapshots(snapshots):
    """Of one state and of many, of other ones than the warm-up's."""
    ids = np.arange(8, dtype=np.int32)
    for s, number, again in ((1, 1, -1), (2, 3, 0), (3, 2, 1), (16, 16, 16), (17, 17, 1000)):
        restores = [Copy(s + i, (ids[:2], ids[2:4], ids[5:6]), again) for i in range(number)]
        snapshots.save([Copy(s, (ids[:size], ids[:size], ids[-1:])) for size in (1, 3, 7)])
        snapshots.restore(restores)  # one by one, into the same blocks
        snapshots.restore([Copy(s + i, (ids[:2], ids[:2], ids[5:6])) for i in range(number)])


def run(ops, batch, dtype, offset=0):
    """``offset``: of the query, in elements, from an aligned address"""
    tokens, size = batch.num_tokens, HEADS * GROUP * HEAD_DIM
    query = torch.zeros(tokens * size + offset, dtype=dtype)[offset:].view(tokens, -1, HEAD_DIM)
    # As split off a fused projection, with a decision of another rank's head before it.
    qkv = torch.zeros(tokens, 2 * size, dtype=dtype)
    key = torch.zeros(tokens, HEADS, HEAD_DIM, dtype=dtype)
    value = qkv[:, -HEADS * HEAD_DIM :].view(tokens, HEADS, HEAD_DIM)
    ops.begin_step(batch)
    for layer, alpha in ((0, key[..., 0]), (1, torch.zeros(tokens, HEADS + 1, dtype=dtype)[:, 1:])):
        ops.store(batch, layer, key, value, alpha)
        if batch.max_query_len > 1:
            ops.prefill(batch, layer, query, key, value, torch.zeros_like(query))
            ops.store_window(batch, layer, key, value)
        ops.decode(batch, layer, query, torch.zeros_like(query))
    ops.report(torch.zeros(ops.state.num_states, REPORT_WIDTH, dtype=torch.int32))


def main(storage, *flash):
    asked = []

    def compile_nothing(kernel, key, signature, *_):
        asked.append(kernel.__name__)
        none = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")
        sizes = dict.fromkeys((*none, "shared", "launch_pdl"), 0) | {"num_ctas": 1, "num_warps": 4}
        kernel.device_caches[0][0][key] = compiled = SimpleNamespace(
            src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(**sizes),
            run=lambda *args: None, function=0, packed_metadata=(), launch_metadata=lambda *a: None,
        )  # fmt: skip
        return compiled

    dms_driver.launch_function = lambda: lambda *args: 0
    driver.set_active(NoGPU(90))
    JITFunction._do_compile = compile_nothing
    ops, dtype = make_ops(storage, HEAD_DIM, GROUP, True, 64, 2048, no_flash if flash else None)
    projection = make_projection(HEAD_DIM, dtype)
    ops.warm_up(dtype, None)
    ops.warm_up(dtype, projection)
    ops.report(torch.zeros(ops.state.num_states, REPORT_WIDTH, dtype=torch.int32))
    snapshots = TritonSnapshots(ops.state)
    snapshots.warm_up()
    warm = list(asked)
    run_snapshots(snapshots)
    for batch in batches():
        run(ops, batch, dtype)
        run_projection(ops, batch, dtype, projection)
    later = asked[len(warm) :]
    run(ops, next(batches()), dtype, offset=1)
    print(json.dumps({"warm": warm, "later": later, "unaligned": asked[len(warm + later) :]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
