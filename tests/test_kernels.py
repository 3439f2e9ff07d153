"""Laws of the Triton kernels beside those of `test_triton_ops`: who owns a page, what FP8 stores,
what rounding and chunking may not change, the null state.

On a machine without a GPU the kernels run in Triton's interpreter, which computes in float32 and
float16 as a GPU does, but not in bfloat16: there K and V are float32, float16 or FP8.
"""

import os
from dataclasses import dataclass, replace

import torch

if not torch.cuda.is_available():  # read when a module with kernels is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from arena_harness import Harness, Sequence, feed, gather_row, make_config

from vllm_dms import reference
from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import FP8Storage, ModelStorage
from vllm_dms.backend.state import Batch
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.triton_ops import TritonOps, Tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tuning(decode_block=16, programs=5, prefill_rows=16, prefill_block=16, copy_block=8)


def fp8_exact(x: torch.Tensor) -> torch.Tensor:
    """Like x [..., D], but FP8 with a power of two for a scale holds it exactly: attention then is
    the same whether a chunk's token is read as it came or as it was stored."""
    wide = (x.float() * 128).clamp(-448, 448)
    wide[..., 0] = 448
    return (wide.to(torch.float8_e4m3fn).float() / 256).to(x.dtype)


@dataclass(frozen=True)
class Case:
    """A model's shape, a window, and how the tokens arrive: chunk lengths, as `feed` takes them."""

    dim: int = 64
    heads: int = 2
    group: int = 2
    window: int = 8
    page: int = 8
    shift: int = 1
    chunks: tuple[int, ...] = (7, 1, 1)
    lengths: tuple[int, ...] = (1, 33, 52)
    rates: tuple[float, ...] = (0.9, 0.5)
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    tuning: Tuning | None = SMALL  # None: as served

    def layout(self, exact: bool = False) -> ArenaLayout:
        plain = torch.float32 if exact else self.dtype
        return ArenaLayout(
            num_layers=2,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            window=self.window,
            page_size=self.page,
            block_size=16,
            storage=FP8Storage() if self.fp8 else ModelStorage(plain),
            max_model_len=-(-max(self.lengths) // 16) * 16,
        )

    def sequences(self) -> list[Sequence]:
        rates = [self.rates[h % len(self.rates)] for h in range(self.heads)]
        layout, kind = self.layout(), {"dtype": self.dtype, "device": DEVICE}
        sequences = [Sequence(n, layout, self.group, rates, seed=n, **kind) for n in self.lengths]
        for seq in sequences if self.fp8 else ():
            seq.key, seq.value = fp8_exact(seq.key), fp8_exact(seq.value)
        return sequences

    def harness(self, kernels: bool) -> Harness:
        layout, num_seqs = self.layout(exact=not kernels), len(self.lengths)
        max_tokens = sum(self.lengths)
        ops = TorchOps()
        if kernels:
            heads = self.group * self.heads
            ops = TritonOps(layout, max_tokens, num_seqs + 2, heads, DEVICE, self.tuning)
        harness = Harness(
            ops, make_config(self.window, self.shift), layout, num_seqs, max_tokens, DEVICE
        )
        # What a former owner left: a page of somebody else, any verdict.
        harness.state.page_table[1:] = harness.state.pages.k.shape[0] - 1
        harness.state.evict_ring[1:] = 0xAA
        return harness

    def run(self, kernels: bool) -> tuple[Harness, list[Sequence]]:
        """Feed all sequences; without kernels in float32, the inputs being the same."""
        harness, sequences = self.harness(kernels), self.sequences()
        if not kernels:
            for seq in sequences:
                for name in ("query", "key", "value"):
                    setattr(seq, name, getattr(seq, name).float())
        feed(harness, sequences, self.chunks)
        return harness, sequences


def assert_as_good_as_torch(case: Case, found: Sequence, exact: Sequence) -> None:
    """The one tolerance: the error against float32 is at most twice that of the same attention in
    PyTorch at the inputs' precision, plus a floor of a few roundings of the largest output."""
    out, truth = torch.cat(found.outputs).float(), torch.cat(exact.outputs)
    evict = reference.evicted(reference.decide(exact.alpha, 1.0, 0.0).T, case.shift)
    mask = reference.visible(evict, case.window).repeat_interleave(case.group, 0)
    q, k, v = (x.transpose(0, 1) for x in (found.query, found.key, found.value))
    k, v = (x.repeat_interleave(case.group, 0) for x in (k, v))
    scores = ((q @ k.mT) * case.dim**-0.5).float().masked_fill(~mask, float("-inf"))
    plain = (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1).float()
    floor = 4 * torch.finfo(case.dtype).eps * truth.abs().max()
    assert out.isfinite().all()
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def assert_same_state(case: Case, found: Harness, exact: Harness) -> None:
    """The same slots in the same order, whatever pages they are in; nobody shares a page."""
    a, b = found.state, exact.state
    assert torch.equal(a.pages_used, b.pages_used) and torch.equal(a.live, b.live)
    taken = []
    for index, length in enumerate(case.lengths, start=1):
        ring = torch.arange(max(0, length - case.window - 1), length) % (case.window + 1)
        assert torch.equal(a.evict_ring[index, :, :, ring], b.evict_ring[index, :, :, ring])
        blocks = set(found.rows[index - 1].tolist())
        for layer in range(2):
            for head in range(case.heads):
                rows = (gather_row(s, index, layer, head) for s in (a, b))
                assert all(torch.equal(x, y) for x, y in zip(*rows, strict=True))
                num_pages = -(-int(a.live[index, layer, head]) // case.page)
                pages = a.page_table[index, layer, head, :num_pages].tolist()
                assert {p // found.layout.pages_per_block for p in pages} <= blocks
                taken += pages
    assert len(taken) == len(set(taken)) == int(a.pages_used.sum())
    assert_null_state_untouched(found)


def assert_null_state_untouched(harness: Harness) -> None:
    state, null_block = harness.state, slice(harness.layout.pages_per_block)
    for tensor in (state.live, state.pages_used, state.page_table, state.evict_ring):
        assert not tensor[0].any()
    for pages in (state.pages.k, state.pages.v):
        assert not pages[null_block].view(torch.uint8).any()


def null_batch(harness: Harness, counts: tuple[int, ...], stored: tuple[int, ...]) -> Batch:
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
        scratch=harness.scratch,
    )


def check(case: Case) -> None:
    found, sequences = case.run(kernels=True)
    exact, exact_sequences = case.run(kernels=False)
    assert_same_state(case, found, exact)
    for seq, truth in zip(sequences, exact_sequences, strict=True):
        assert_as_good_as_torch(case, seq, truth)


def test_pages_have_one_owner_whatever_a_former_owner_left():
    tuning = replace(SMALL, programs=3, decode_block=32, prefill_block=32)
    check(Case(dim=16, heads=3, window=3, chunks=(4, 1, 26, 1), lengths=(3, 33), tuning=tuning))


def test_fp8_rounds_to_the_byte_as_the_plain_operations_do():
    """Values of every magnitude, whole tokens of zeros, subnormal results."""
    case = Case(dim=16, fp8=True, lengths=(40,), chunks=(17, 1, 1), rates=(0.0,))
    harnesses = [case.harness(kernels) for kernels in (True, False)]
    for harness in harnesses:
        seq = case.sequences()[0]
        g = torch.Generator().manual_seed(0)
        for name, kv in (("key", seq.key), ("value", seq.value)):
            exponents = torch.randint(-12, 8, kv.shape, generator=g)
            noise = torch.randn(kv.shape, generator=g) * 2.0**exponents
            noise[3], noise[25] = 0.0, 1e-8
            setattr(seq, name, noise.to(kv))
        feed(harness, [seq], case.chunks)
    assert_same_state(case, *harnesses)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_chunking_changes_neither_the_state_nor_the_output(fp8):
    base = Case(dim=16, lengths=(37,), dtype=torch.float16, fp8=fp8)
    exact, truth = base.run(kernels=False)
    for chunks in ((37,), (8, 9, 10), (31, 1)):
        found, sequences = replace(base, chunks=chunks).run(kernels=True)
        assert_same_state(base, found, exact)
        assert_as_good_as_torch(base, sequences[0], truth[0])


def test_the_null_state_is_read_but_never_written():
    case = Case(dim=16, lengths=(40, 40))
    harness = case.harness(kernels=True)
    seq = case.sequences()[0]
    # Rows of warm-up and capture: block 0, any length; the second row is a chunk.
    batch = null_batch(harness, counts=(1, 12, 1), stored=(0, 7, 30))
    q, k, v, alpha = (getattr(seq, n)[:14] for n in ("query", "key", "value", "alpha"))
    for layer in range(2):
        output = torch.full_like(q, float("nan"))
        harness.ops.store(harness.state, batch, harness.config, layer, k, v, alpha)
        harness.ops.prefill(harness.state, batch, layer, q, k, v, output, 1.0)
        harness.ops.store_window(harness.state, batch, layer, k, v)
        harness.ops.decode(harness.state, batch, layer, q, output, 1.0)
        assert output.isfinite().all()
    assert_null_state_untouched(harness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_borderline_decisions_are_the_reference_s(dtype):
    """alpha * scale lies within a few roundings of the offset, and often on it."""
    case = Case(dim=16, lengths=(200,), chunks=(200,), tuning=replace(SMALL, copy_block=64))
    config = replace(make_config(8), alpha_scale=3.3, alpha_offset=4.7)
    harness, seq = case.harness(kernels=True), case.sequences()[0]
    steps = torch.arange(-100, 100, device=DEVICE) * torch.finfo(dtype).eps
    seq.alpha = (4.7 / 3.3 + steps).to(dtype).unsqueeze(1).repeat(1, 2)
    harness.config = config
    harness.start(0)
    harness.step([(0, seq, 200)], layers=[0])
    expected = reference.decide(seq.alpha, 3.3, 4.7)
    assert expected.any() and not expected.all()
    evict = reference.evicted(expected.T, 1)
    assert torch.equal(harness.scratch.evict[:200].T.bool(), evict)
    live = reference.live_counts(evict, case.window).int()
    assert torch.equal(harness.state.live[1, 0], live)


def test_the_launcher_refuses_what_the_kernels_cannot_read():
    case = Case(dim=16)
    harness, seq = case.harness(kernels=True), case.sequences()[1]
    batch = harness._batch([(0, seq, 4)], [slice(0, 4)], padding=0)
    key = seq.key.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="strides of key's heads"):
        harness.ops.store(harness.state, batch, harness.config, 0, key, seq.value, seq.alpha)
    harness.ops.max_tokens = 3
    with pytest.raises(ValueError, match="4 tokens exceeds"):
        harness.ops.store(harness.state, batch, harness.config, 0, seq.key, seq.value, seq.alpha)
