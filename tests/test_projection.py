"""From a fused projection to stored keys, rotated queries and decisions: the plain operations are
those of vLLM's modules, and the kernels equal them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from arena_harness import gather_row
from kernel_cases import DEVICE, SMALL, Case, assert_null_state_untouched, watch_launches
from test_flash import PlainFlash

from vllm_dms.backend.projection import Projection, project, rotated_width, views
from vllm_dms.config import DMSConfig

CASE = Case(dim=16, heads=2, group=2, window=7, tuning=replace(SMALL, programs=8, copy_block=16))
BORROWED = DMSConfig("nvidia-borrowed", 7, 1.0, 0.0, shift=1)
FASTDMS = replace(BORROWED, dialect="fastdms", zero="before", shift=0)
ADAPTER = replace(BORROWED, dialect="nvidia-adapter")


def make_projection(case, norm=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    angles = torch.rand(max(case.lengths), case.dim // 2, generator=g) * 7
    cache = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE, case.dtype)
    weights = (0.5 + torch.rand(2, case.dim, generator=g)).to(DEVICE, case.dtype)
    return Projection(
        *(weights if norm else (None, None)), 1e-6, SimpleNamespace(cos_sin_cache=cache)
    )


class Fed:
    """All requests of a case through the operations, from projections; ``steps``: of which each is
    a list of requests and tokens, if not as the case says."""

    def __init__(self, case, config, kernels, projection, steps=()):
        self.case, self.harness = case, case.harness(kernels, config=config)
        self.projection, self.outputs = projection, []
        g = torch.Generator().manual_seed(1)
        heads = case.heads * (case.group + 2)
        kind = {"device": DEVICE, "dtype": case.dtype}
        self.qkv = [torch.randn(n, heads * case.dim, generator=g).to(**kind) for n in case.lengths]
        self.alpha = [torch.randn(n, case.heads, generator=g).to(**kind) for n in case.lengths]
        self.stored = [0] * len(case.lengths)
        for index in range(len(case.lengths)):
            self.harness.start(index)
        for work in steps:
            self.step(work, config.adapter)
        step = 0
        while self.stored != list(case.lengths):
            counts = [
                min(case.chunks[(step + i) % len(case.chunks)], n - self.stored[i])
                for i, n in enumerate(case.lengths)
            ]
            self.step([(i, count) for i, count in enumerate(counts) if count], config.adapter)
            step += 1

    def step(self, work, given):
        parts = [(i, slice(self.stored[i], self.stored[i] + n)) for i, n in work]
        seqs = [(i, SimpleNamespace(stored=self.stored[i]), n) for i, n in work]
        batch, ops = self.harness.make_batch(seqs), self.harness.ops
        qkv = torch.cat([self.qkv[i][part] for i, part in parts])
        alpha = torch.cat([self.alpha[i][part] for i, part in parts]) if given else None
        positions = torch.cat([torch.arange(part.start, part.stop) for _, part in parts])
        ops.begin_step(batch)
        case = self.case
        for layer in range(case.layers):
            width = rotated_width(case.heads, case.group, case.dim)
            rotated = qkv.new_full((len(qkv), width), float("nan"))
            output = qkv.new_full((len(qkv), case.heads * case.group * case.dim), float("nan"))
            args = (self.projection, qkv, positions.to(DEVICE), alpha, rotated, output)
            ops.attend_projection(batch, layer, *args)
        self.outputs.append(output)
        for i, n in work:
            self.stored[i] += n


@pytest.mark.parametrize("config", [BORROWED, FASTDMS, ADAPTER], ids=lambda c: c.dialect)
@pytest.mark.parametrize("chunks", [(1,), (20, 1, 1, 5)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (21, 30)},
        {"dim": 80, "heads": 3, "group": 3, "page": 16, "layers": 1, "lengths": (24,)},
        {"storage": "fp8", "heads": 1, "group": 8, "layers": 1, "lengths": (24, 3)},
        {"storage": "int4", "dim": 64, "layers": 1, "lengths": (24,)},
    ],
    ids=str,
)
def test_kernels_equal_the_plain_operations(config, chunks, shape):
    case = replace(CASE, chunks=chunks, **shape)
    if chunks == (1,):  # of many steps a few beyond the window
        case = replace(case, lengths=tuple(n // 2 + 1 for n in case.lengths))
    assert_equal(case, config, make_projection(case))


def test_of_a_model_without_norms():
    assert_equal(replace(CASE, lengths=(21,)), BORROWED, make_projection(CASE, norm=False))


def test_a_decision_for_all_heads():
    case = replace(CASE, heads=3, lengths=(30,), chunks=(9, 1))
    assert_equal(case, replace(BORROWED, alpha_per="layer"), make_projection(case))


ODD = {"dim": 80, "heads": 3, "group": 3, "page": 16}
# Chunks that begin their request and fit into a window of 11: alone, with others that only decode
# or have one token in all, before and behind them; then decodes until all have left the window.
ALL = [(0, 1), (1, 1), (2, 1), (3, 1)]
STEPS = [[(0, 11)], [(1, 12), (0, 1)], [(2, 1), (3, 9), (0, 1), (1, 1)], *[ALL] * 12]
LENGTHS = tuple(sum(n for work in STEPS for k, n in work if k == i) for i in range(4))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (BORROWED, {}),
        (FASTDMS, ODD | {"layers": 1, "lengths": LENGTHS[:2]}),
        (ADAPTER, {"storage": "fp8", "layers": 1}),
        (BORROWED, {"storage": "int4", "dim": 64, "layers": 1, "lengths": LENGTHS[:2]}),
    ],
    ids=("borrowed", "fastdms, an odd shape", "adapter, fp8", "borrowed, int4"),
)
def test_a_chunk_that_fits_into_its_window_is_stored_as_it_is_projected(config, shape, monkeypatch):
    case = replace(CASE, window=11, **{"lengths": LENGTHS, **shape})
    steps = [[(i, n) for i, n in work if i < len(case.lengths)] for work in STEPS]
    names, config = watch_launches(monkeypatch), replace(config, window=11)
    assert_equal(case, config, make_projection(case), steps)
    parts = {"schedule", "project_window", "prefill", "project_token", "decode"}
    assert {*names} - {"merge"} == parts
    assert names[:3] == ["schedule", "project_window", "prefill"]


def test_flash_attends_to_what_was_projected():
    """In a window, and beyond it."""
    case = replace(CASE, layers=1, lengths=(30, 8), chunks=(8, 20, 1), flash=PlainFlash)
    assert_equal(case, BORROWED, make_projection(case))


@pytest.mark.parametrize("tokens", [16, 17])
def test_a_row_that_needs_a_leaf_in_its_window_is_planned(tokens, monkeypatch):
    """Two pages of 8 slots are listed by a row itself."""
    case = replace(CASE, window=20, leaf=2, layers=1, lengths=(30,))
    names, config = watch_launches(monkeypatch), replace(BORROWED, window=20)
    assert_equal(case, config, make_projection(case), [[(0, tokens)], *[[(0, 1)]] * (30 - tokens)])
    assert ("project_window" in names) == (tokens == 16)


def assert_equal(case, config, projection, steps=()):
    found, plain = (Fed(case, config, kernels, projection, steps) for kernels in (True, False))
    a, b = found.harness.state, plain.harness.state
    assert torch.equal(a.live, b.live) and torch.equal(a.pages_used, b.pages_used)
    assert (a.live[1:] < torch.tensor(case.lengths, device=DEVICE)[:, None, None]).any()
    # A rounding of the norm. With FP8 or 4 bits one more of keys and values, which a query may see
    # before it.
    atol = {"model": 1e-5, "fp8": 0.08, "int4": 0.2}[case.storage]
    tolerance = {"rtol": 1e-5 if case.storage == "model" else 0.1, "atol": atol}
    for index in range(1, len(case.lengths) + 1):
        for layer in range(case.layers):
            for head in range(case.heads):
                rows = [gather_row(state, index, layer, head) for state in (a, b)]
                if case.storage == "int4":  # a rounding of the norm moves a nibble now and then
                    same = torch.cat([(x == y).flatten() for x, y in zip(*rows, strict=True)])
                    assert same.float().mean() > 0.99
                    continue
                for x, y in zip(*rows, strict=True):
                    torch.testing.assert_close(x, y, **tolerance)
    for x, y in zip(found.outputs, plain.outputs, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    assert_null_state_untouched(found.harness)


def test_the_plain_operations_are_those_of_vllms_modules(vllm_modules):
    rotary, norms = vllm_modules
    borrowed = torch.randn(5, 6 * 16)
    projection = Projection(norms[0].weight, norms[1].weight, 1e-6, rotary)
    out = views(borrowed, torch.empty(5, rotated_width(1, 4, 16)), 1, 4, 16)
    positions = torch.tensor([3, 0, 9, 1, 1])
    config = replace(BORROWED, zero="never")
    with torch.no_grad():
        project(projection, config, borrowed, positions, None, out)
    q, k, v = borrowed.split([64, 16, 16], -1)
    q = norms[0].forward_native(q.unflatten(-1, (4, 16)))
    k = norms[1].forward_native(k.unflatten(-1, (1, 16)))
    assert torch.equal(out.alpha, q[:, :1, -1])
    q, k = rotary.forward_native(positions, q.flatten(1), k.flatten(1))
    torch.testing.assert_close(out.query.flatten(1), q)
    torch.testing.assert_close(out.key.flatten(1), k)
    assert torch.equal(out.value.flatten(1), v)


@pytest.fixture
def vllm_modules():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(16, 16, 32, 10000.0, True, torch.float32)
        norms = [RMSNorm(16, eps=1e-6) for _ in "qk"]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
    return rotary, norms
