"""What is stored as it is projected is to the bit what a plan of it would have stored, whoever else
is in the batch."""

from dataclasses import replace

import pytest
import torch
from arena_harness import assert_taken_from_own_blocks, gather_row
from kernel_cases import DEVICE, SMALL, Case, assert_null_state_untouched, watch_launches
from test_projection import ADAPTER, BORROWED, FASTDMS, make_projection

from vllm_dms.backend.projection import rotated_width
from vllm_dms.backend.state import Batch

RING = 10
# Steps of (request, tokens stored, tokens); None: of the null state. A request that begins again
# gets its blocks in another order, and its state as it left it.
STEPS = [
    [(None, 0, 2), (0, 0, RING), (1, 0, 0), (2, 0, 1), (None, 3, 1)],
    [(0, RING, 1), (1, 0, RING - 1), (None, 7, 0), (2, 1, 1)],
    [(2, 2, 1), (1, 0, 2), (0, RING + 1, 1), (None, 0, 3), (None, 0, 0)],
    [(0, 0, 1), (1, 2, 1), (2, 0, 9)],
    [(0, 1, 0), (2, 0, 8), (0, 1, 1), (1, 0, RING)],
    *[[(i, n + step, 1) for i, n in enumerate((2, RING, 8))] for step in range(2)],
]


def run(case, config, projection, in_window):
    """The harness, and of each step the outputs of the requests' tokens and then all verdicts."""
    harness, outputs, begun = case.harness(kernels=True, config=config), [], set()
    ops, begin = harness.ops, harness.ops._begin_stores

    def begin_stores(batch):
        begin(batch)
        ops._in_window = ops._in_window and in_window

    ops._begin_stores = begin_stores
    generator, kind = torch.Generator().manual_seed(0), {"device": DEVICE, "dtype": case.dtype}

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(**kind)

    for step in STEPS:
        for i, stored, _ in step:
            if i is not None and stored == 0:
                harness.state.state_of_block[harness.rows[i].long()] = 0
                harness.rows[i] = harness.rows[i].roll(int(i in begun))
                harness.start(i)
                begun.add(i)
        nobodys = 2 if step is STEPS[0] else 0
        batch = make_batch(harness, step, nobodys)
        tokens, heads = batch.num_tokens, case.heads
        qkv = randn(tokens, heads * (case.group + 2) * case.dim)
        alpha = randn(tokens, heads) if config.adapter else None
        positions = [torch.arange(n, n + m) for _, n, m in [*step, (None, 0, nobodys)]]
        positions = torch.cat(positions).to(DEVICE)
        harness.scratch.evict.fill_(0xFF)
        harness.scratch.num_survivors.fill_(-(2**30))
        ops.begin_step(batch)
        own = [i is not None for i, _, m in step for _ in range(m)]
        own = torch.tensor([*own, *[False] * nobodys])
        for layer in range(case.layers):
            rotated = torch.full(
                (tokens, rotated_width(heads, case.group, case.dim)), float("nan"), **kind
            )
            output = torch.full((tokens, heads * case.group * case.dim), float("nan"), **kind)
            ops.attend_projection(batch, layer, projection, qkv, positions, alpha, rotated, output)
            outputs.append(output[own.to(DEVICE)])
        outputs.append(harness.state.evict_ring[1:].clone())
    return harness, outputs


def make_batch(harness, step, nobodys):
    """``nobodys``: tokens that are of no request"""
    work = [(0 if i is None else int(harness.rows[i, 0]), n, m) for i, n, m in step]
    blocks, _, counts = zip(*work, strict=True)
    chunks = [i for i, m in enumerate(counts) if m > 1]
    int32 = {"dtype": torch.int32, "device": DEVICE}
    return Batch(
        num_reqs=len(work),
        num_tokens=sum(counts) + nobodys,
        max_query_len=max(counts),
        block_table=torch.tensor(blocks, **int32).unsqueeze(1),
        query_start=torch.tensor([0, *counts]).cumsum(0).to(**int32),
        seq_lens=torch.tensor([n + m for _, n, m in work], **int32),
        first_chunk=min(chunks, default=0),
        max_stored=max((work[i][1] for i in chunks), default=0),
        may_decode=1 in counts,
    )


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (replace(BORROWED, zero="both"), {"heads": 3, "page": 4}),
        (FASTDMS, {"storage": "fp8", "layers": 1}),
        (ADAPTER, {"storage": "int4", "dim": 64, "layers": 1}),
    ],
    ids=("borrowed, three heads", "fastdms, fp8", "adapter, int4"),
)
def test_a_chunk_stored_as_it_is_projected_equals_a_planned_one(config, shape, monkeypatch):
    case = Case(window=RING - 1, lengths=(24,) * 3, tuning=replace(SMALL, programs=8), **shape)
    config, projection = replace(config, window=RING - 1), make_projection(case)
    names = watch_launches(monkeypatch)
    found, outputs = run(case, config, projection, in_window=True)
    assert names.count("project_window") >= 2 * case.layers
    names.clear()
    planned, expected = run(case, config, projection, in_window=False)
    assert "project_window" not in names
    for out, other in zip(outputs, expected, strict=True):
        assert torch.equal(out, other) and out.isfinite().all()
    a, b = found.state, planned.state
    for name in ("live", "pages_used", "leaves_used"):
        assert torch.equal(getattr(a, name)[1:4], getattr(b, name)[1:4])
    for state in range(1, 4):
        for row in range(case.layers * case.heads):
            rows = (gather_row(s, state, *divmod(row, case.heads)) for s in (a, b))
            assert all(torch.equal(x, y) for x, y in zip(*rows, strict=True))
    for harness in (found, planned):
        assert_null_state_untouched(harness)
        assert_taken_from_own_blocks(harness, 3)
