"""Laws of the Triton kernels beside their equality with the plain operations (`test_triton_ops`):
what FP8 and 4 bits store, what rounding and chunking may not change, the null state, what is
refused."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from arena_harness import feed, make_config
from kernel_cases import (
    DEVICE,
    SMALL,
    Case,
    assert_as_good_as_plain,
    assert_null_state_untouched,
    assert_same_state,
    check,
    equal,
    null_batch,
)

from vllm_dms import reference
from vllm_dms.backend.kernels.common import round_mantissa
from vllm_dms.backend.kernels.schedule import allocate_schedule
from vllm_dms.backend.ops import attend

NOT_FINITE = (float("nan"), float("inf"))


def test_pages_have_one_owner_whatever_a_former_owner_left():
    tuning = replace(SMALL, programs=3, decode_block=32, prefill_block=32)
    check(Case(heads=3, window=3, chunks=(4, 1, 26, 1), lengths=(3, 33), tuning=tuning))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize(("storage", "dim"), [("fp8", 16), ("int4", 64), ("int4", 128)])
def test_kernels_round_to_the_byte_as_the_plain_operations_do(storage, dim):
    """Values of every magnitude, whole tokens of zeros, subnormal results, NaN and infinity."""
    case = Case(storage=storage, dim=dim, lengths=(40,), chunks=(17, 1, 1), rates=(0.0,))
    harnesses = [case.harness(kernels) for kernels in (True, False)]
    outputs = []
    for harness in harnesses:
        seq = case.sequences()[0]
        g = torch.Generator().manual_seed(0)
        for name, kv in (("key", seq.key), ("value", seq.value)):
            exponents = torch.randint(-12, 8, kv.shape, generator=g)
            noise = torch.randn(kv.shape, generator=g) * 2.0**exponents
            noise[3], noise[25], noise[26] = 0.0, 1e-8, 1e-37
            # In a chunk's survivors and window, and in tokens that came alone.
            for token, bad in zip((2, 12, 20, 30), NOT_FINITE * 2, strict=True):
                noise[token, 0, 5], noise[token + 1, 1, 0] = bad, -bad
            setattr(seq, name, noise.to(kv))
        feed(harness, [seq], case.chunks)
        outputs.append(torch.cat(seq.outputs))
    assert_same_state(case, *harnesses)
    # A query that sees one of them shows it.
    assert torch.equal(*(out.isnan() for out in outputs))
    assert outputs[0].isnan().any() and not outputs[0].isnan().all()


@triton.jit
def round_kernel(bits_ptr, out_ptr):
    i = tl.arange(0, 8)
    x = tl.load(bits_ptr + i).to(tl.float32, bitcast=True)
    tl.store(out_ptr + i, round_mantissa(x, 16))


def test_rounding_keeps_nan_and_infinity():
    """A GPU's NaN is 0x7FFFFFFF: rounded as an integer it would be the zero 0x80000000."""
    bits = [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x3F808000, 0x3F818000, -0x80000000]
    bits = torch.tensor(bits, device=DEVICE).int()
    out = torch.zeros(8, device=DEVICE)
    round_kernel[(1,)](bits, out)
    assert equal(out, bits.view(torch.float32).bfloat16().float())


@pytest.mark.parametrize("storage", ["model", "fp8", "int4"])
def test_chunking_changes_neither_the_state_nor_the_output(storage):
    """However the kernels are fed, they are compared with one feed of the plain operations."""
    kind = {"storage": storage, "rounded": storage != "model", "dtype": torch.float16}
    base = Case(dim=64 if storage == "int4" else 16, lengths=(37,), **kind)
    plain, expected = base.run(kernels=False)
    for chunks in ((37,), (8, 9, 10), (31, 1)):
        found, sequences = replace(base, chunks=chunks).run(kernels=True)
        assert_same_state(base, found, plain)
        assert_as_good_as_plain(base, sequences[0], expected[0])


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("chunks", [(7, 1, 1), (18,)], ids=str)
@pytest.mark.parametrize(("storage", "dim"), [("model", 16), ("int4", 64)])
def test_a_request_of_nan_leaves_those_beside_it_as_they_are(storage, dim, chunks):
    kind = {"dim": dim, "storage": storage, "dtype": torch.float16}
    case = Case(lengths=(18, 20, 18), chunks=chunks, **kind)
    _, expected = case.run(kernels=True)
    harness, sequences = case.harness(kernels=True), case.sequences()
    for name in ("query", "key", "value"):
        setattr(sequences[1], name, torch.full_like(getattr(sequences[1], name), float("nan")))
    feed(harness, sequences, chunks)
    assert torch.cat(sequences[1].outputs).isnan().all()
    for index in (0, 2):
        assert torch.equal(*(torch.cat(s[index].outputs) for s in (sequences, expected)))


def test_the_null_state_is_read_but_never_written():
    case = Case(lengths=(40, 40))
    harness = case.harness(kernels=True)
    seq = case.sequences()[0]
    # Rows of warm-up and capture: block 0, any length; the second row is a chunk.
    batch = null_batch(counts=(1, 12, 1), stored=(0, 7, 30))
    q, k, v, alpha = (getattr(seq, n)[:14] for n in ("query", "key", "value", "alpha"))
    harness.ops.begin_step(batch)
    for layer in range(2):
        output = torch.full_like(q, float("nan"))
        attend(harness.ops, batch, layer, q, k, v, alpha, output)
        assert output.isfinite().all()
    assert_null_state_untouched(harness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_borderline_decisions_are_the_reference_s(dtype):
    """alpha * scale lies within a few roundings of the offset, and often on it."""
    case = Case(dim=64, lengths=(200,), tuning=replace(SMALL, copy_block=64))
    config = replace(make_config(8), alpha_scale=3.3, alpha_offset=4.7)
    harness, seq = case.harness(kernels=True, config=config), case.sequences()[0]
    steps = torch.arange(-100, 100, device=DEVICE) * torch.finfo(dtype).eps
    seq.alpha = (4.7 / 3.3 + steps).to(dtype).unsqueeze(1).repeat(1, 2)
    harness.start(0)
    harness.step([(0, seq, 200)], layers=[0])
    expected = reference.decide(seq.alpha, 3.3, 4.7)
    assert expected.any() and not expected.all()
    evict = reference.evicted(expected.T, 1)
    assert torch.equal(harness.scratch.evict[:200].T.bool(), evict)
    live = reference.live_counts(evict, case.window).int()
    assert torch.equal(harness.state.live[1, 0], live)


def test_the_launcher_refuses_what_the_kernels_cannot_read():
    case = Case()
    harness, seq = case.harness(kernels=True), case.sequences()[1]
    batch = harness.make_batch([(0, seq, 4)])
    key = seq.key.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(AssertionError, match="begin_step"):
        harness.ops.store(batch, 0, key, seq.value, seq.alpha)
    harness.ops.begin_step(batch)
    with pytest.raises(ValueError, match="strides of key's heads"):
        harness.ops.store(batch, 0, key, seq.value, seq.alpha)
    harness.ops.max_tokens = 3
    with pytest.raises(ValueError, match="4 tokens exceeds"):
        harness.ops.begin_step(batch)
    with pytest.raises(ValueError, match="4 query heads over 3 KV heads"):
        allocate_schedule(replace(case, heads=3).layout(), 1, 4, SMALL, torch.device(DEVICE))
