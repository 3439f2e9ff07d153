"""Cases of the kernels against the plain operations, and the one rule for what counts as equal.

On a machine without a GPU the kernels run in Triton's interpreter, which computes in float32 and
float16 as a GPU does, but not in bfloat16: there K and V are float32, float16, FP8 or 4 bits.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from arena_harness import (
    Harness,
    Sequence,
    assert_taken_from_own_blocks,
    feed,
    gather_row,
    make_config,
)

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.nibbles import rotate
from vllm_dms.arena.storage import STORAGES
from vllm_dms.backend.kernels.arguments import can_overlap
from vllm_dms.backend.kernels.launch import Launcher
from vllm_dms.backend.kernels.schedule import allocate_schedule
from vllm_dms.backend.kernels.tuning import Tuning, default_tuning
from vllm_dms.backend.state import Batch
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.triton_ops import TritonOps
from vllm_dms.config import DMSConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles, so that short rows have several, and are shared by several programs.
SMALL = Tuning(decode_block=16, programs=5, prefill_rows=16, prefill_block=16, copy_block=8)


def make_kernels(
    state, scratch, config, scale, group, tuning=SMALL, max_num_seqs=8, overlap=None, flash=None
) -> TritonOps:
    """What `Harness` asks for, once the rest is bound; ``overlap``: None, as the device can;
    ``flash``: makes a `Flash` of the scale."""
    layout, device = state.layout, torch.device(state.live.device)
    tuning = tuning or default_tuning(layout)
    heads = group * layout.num_kv_heads
    schedule = allocate_schedule(layout, max_num_seqs, heads, tuning, device)
    overlap = can_overlap(device) if overlap is None else overlap
    flash = flash and flash(scale)
    return TritonOps(state, scratch, config, scale, schedule, tuning, overlap, flash)


def fp8_exact(x: torch.Tensor) -> torch.Tensor:
    """Like x [..., D], but FP8 with a power of two for a scale holds it exactly: attention then is
    the same whether a chunk's token is read as it came or as it was stored."""
    wide = (x.float() * 128).clamp(-448, 448)
    wide[..., 0] = 448
    return (wide.to(torch.float8_e4m3fn).float() / 256).to(x.dtype)


def int4_exact(x: torch.Tensor) -> torch.Tensor:
    """Like x, of which 4 bits hold each group as whole numbers of quarters."""
    whole = (4 * x.float()).round().clamp(-8, 7).unflatten(-1, (4, -1))
    whole[..., 0], whole[..., 1] = -8, 7
    return (whole / 4).flatten(-2).to(x.dtype)


def make_exact(storage: str, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Like key and value, of which the storage loses nothing."""
    if storage == "fp8":
        return [fp8_exact(key), fp8_exact(value)]
    groups = int4_exact(key).float().unflatten(-1, (4, -1))
    key = (rotate(groups) / groups.shape[-1]).flatten(-2).to(key.dtype)
    return [key, int4_exact(value)]


@dataclass(frozen=True)
class Case:
    """A model's shape, a rule, and how the tokens arrive: chunk lengths, as `feed` takes them."""

    dim: int = 16
    heads: int = 2
    group: int = 2
    layers: int = 2
    window: int = 8
    shift: int = 1
    evict: bool = True
    page: int = 8
    leaf: int = 0  # 0: as large as the layout chooses
    chunks: tuple[int, ...] = (7, 1, 1)
    lengths: tuple[int, ...] = (1, 33, 52)
    rates: tuple[float, ...] = (0.9, 0.5)  # of heads: tokens evicted
    dtype: torch.dtype = torch.float32
    storage: str = "model"
    rounded: bool = False  # inputs that the storage holds exactly
    tuning: Tuning | None = SMALL  # None: as served
    flash: Any = None  # what makes a `Flash` of a scale

    def layout(self) -> ArenaLayout:
        return ArenaLayout(
            num_layers=self.layers,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            window=self.window,
            page_size=self.page,
            block_size=2 * self.page,
            storage=STORAGES[self.storage].for_model(self.dtype),
            max_model_len=-(-max(self.lengths) // 16) * 16,
            leaf_size=self.leaf,
        )

    def config(self) -> DMSConfig:
        return make_config(self.window, self.shift, self.evict)

    def sequences(self) -> list[Sequence]:
        rates = [self.rates[h % len(self.rates)] for h in range(self.heads)]
        layout, kind = self.layout(), {"dtype": self.dtype, "device": DEVICE}
        sequences = [  # seeded by place, so that equal lengths do not make equal requests
            Sequence(n, layout, self.group, rates, seed=1000 * place + n, **kind)
            for place, n in enumerate(self.lengths)
        ]
        for seq in sequences if self.rounded else ():
            seq.key, seq.value = make_exact(self.storage, seq.key, seq.value)
        return sequences

    def harness(self, kernels: bool, config: DMSConfig | None = None) -> Harness:
        make_ops = TorchOps
        if kernels:
            how = {"group": self.group, "tuning": self.tuning, "flash": self.flash}
            make_ops = partial(make_kernels, **how)
        num_seqs, max_tokens = len(self.lengths), sum(self.lengths)
        config = config or self.config()
        return Harness(make_ops, config, self.layout(), num_seqs, max_tokens, DEVICE)

    def run(self, kernels: bool) -> tuple[Harness, list[Sequence]]:
        """Feed all sequences."""
        harness, sequences = self.harness(kernels), self.sequences()
        feed(harness, sequences, self.chunks)
        return harness, sequences


# dtype, storage, head_dim, KV heads, queries of each, and the kernels that are tested with it.
GPU_SHAPES = [
    (torch.bfloat16, "model", 128, 8, 4, "triton, flash"),
    (torch.bfloat16, "fp8", 128, 8, 4, "triton, flash"),
    (torch.bfloat16, "int4", 128, 8, 4, "triton, flash"),
    (torch.float16, "int4", 64, 2, 8, "triton"),
    (torch.bfloat16, "int4", 256, 2, 2, "triton"),
    (torch.bfloat16, "fp8", 256, 2, 2, "flash"),
    (torch.float16, "model", 64, 2, 8, "triton, flash"),
    (torch.float16, "fp8", 64, 2, 8, "triton"),
    (torch.bfloat16, "model", 80, 3, 1, "triton, flash"),
    (torch.float32, "model", 128, 2, 5, "triton"),
    (torch.float32, "fp8", 64, 2, 2, "triton"),
]


def gpu_cases(kernels: str) -> list:
    """Cases of production's tiles, as parameters of a test."""
    common = {"window": 64, "page": 16, "lengths": (1, 130, 250), "tuning": None}
    return [
        pytest.param(
            Case(dtype=dtype, storage=storage, dim=dim, heads=heads, group=group, **common),
            id=f"{dtype}-{storage}-{dim}-{heads}-{group}",
        )
        for dtype, storage, dim, heads, group, tested in GPU_SHAPES
        if kernels in tested
    ]


def check(case: Case) -> None:
    """The kernels leave the state of the plain operations and give outputs as good as theirs."""
    found, sequences = case.run(kernels=True)
    plain, expected = case.run(kernels=False)
    assert_same_state(case, found, plain)
    for seq, other in zip(sequences, expected, strict=True):
        assert_as_good_as_plain(case, seq, other)


def assert_as_good_as_plain(case: Case, found: Sequence, plain: Sequence) -> None:
    """The one tolerance: the error against exact attention in float32 is at most twice that of the
    plain operations on the same inputs, plus a floor of a few roundings of the largest output.

    With FP8 or 4-bit storage the error is that of rounding keys and values, which a query sees
    unrounded as long as they are in its own chunk: how many depends on the chunk, and on the query
    block.
    """
    exact = plain.expected(case.config(), case.dim**-0.5)
    out, baseline = (torch.cat(seq.outputs).float() for seq in (found, plain))
    floor = 4 * torch.finfo(case.dtype).eps * exact.abs().max()
    assert out.isfinite().all()
    assert (out - exact).abs().max() <= 2 * (baseline - exact).abs().max() + floor


def assert_same_state(case: Case, found: Harness, plain: Harness) -> None:
    """The same slots in the same order, whatever pages they are in; nobody shares a page."""
    a, b = found.state, plain.state
    assert torch.equal(a.pages_used, b.pages_used) and torch.equal(a.live, b.live)
    for index, length in enumerate(case.lengths, start=1):
        ring = torch.arange(max(0, length - case.window - 1), length) % (case.window + 1)
        assert torch.equal(a.evict_ring[index, :, :, ring], b.evict_ring[index, :, :, ring])
        for layer in range(case.layers):
            for head in range(case.heads):
                rows = (gather_row(s, index, layer, head) for s in (a, b))
                assert all(equal(x, y) for x, y in zip(*rows, strict=True))
    for harness in (found, plain):
        assert_taken_from_own_blocks(harness, len(case.lengths))
    assert_null_state_untouched(found)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit; NaN equals NaN."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def assert_null_state_untouched(harness: Harness) -> None:
    state, null_block = harness.state, slice(harness.layout.pages_per_block)
    counters = (state.pages_used, state.leaves_used)
    for tensor in (*counters, state.live, state.page_table, state.evict_ring):
        assert not tensor[0].any()
    for part in state.pages:
        assert not part[null_block].view(torch.uint8).any()
    assert not state.leaves[: harness.layout.leaves_per_block].any()


def watch_launches(monkeypatch) -> list[str]:
    """Names of the kernels launched from now on, without their "_kernel"."""
    names, launch = [], Launcher.at

    def watched(launcher, *args):
        names.append(launcher._kernel.fn.__name__.removesuffix("_kernel"))
        launch(launcher, *args)

    monkeypatch.setattr(Launcher, "at", watched)
    return names


def null_batch(counts: tuple[int, ...], stored: tuple[int, ...]) -> Batch:
    """Rows without a request of their own, as in warm-up and capture."""
    counts, stored = torch.tensor(counts), torch.tensor(stored)
    starts = torch.cat([counts[:1] * 0, counts.cumsum(0)])
    int32 = {"dtype": torch.int32, "device": DEVICE}
    return Batch(
        num_reqs=len(counts),
        num_tokens=int(starts[-1]),
        max_query_len=int(counts.max()),
        block_table=torch.zeros(len(counts), 2, **int32),
        query_start=starts.to(**int32),
        seq_lens=(counts + stored).to(**int32),
    )
