"""The Triton operations equal the plain ones and exact DMS attention: in Triton's interpreter on
the CPU, where only float32 arithmetic is right, and on a GPU in every dtype."""

from dataclasses import replace

import pytest
import torch
from arena_harness import Harness, Sequence, feed, gather_row, make_config

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.arena.storage import STORAGES, FP8Storage, ModelStorage
from vllm_dms.backend.ops import report
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.triton_ops import TritonOps, Tuning

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Small tiles, so that short rows have several, and are shared by several programs.
SMALL = Tuning(programs=8, decode_block=16, prefill_rows=16, prefill_block=16, copy_block=16)
PLAIN = ModelStorage(torch.float32)
CHUNKS = [(256,), (33, 1, 5, 1), (64, 17)]


def make_layout(window, head_dim=16, page_size=8, heads=2, storage=PLAIN, layers=2):
    return ArenaLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=head_dim,
        window=window,
        page_size=page_size,
        block_size=2 * page_size,
        storage=storage,
        max_model_len=256,
    )


def triton_ops(layout, group, tuning=SMALL):
    return TritonOps(
        layout,
        max_tokens=1024,
        max_num_seqs=8,
        num_query_heads=group * layout.num_kv_heads,
        device=DEVICE,
        tuning=tuning,
    )


def run(ops, layout, config, group, lengths, chunks, dtype=torch.float32):
    """(harness, sequences) after feeding; even heads evict most, odd ones half."""
    harness = Harness(ops, config, layout, len(lengths), max_tokens=1024, device=DEVICE)
    rate = torch.tensor([0.9 if h % 2 == 0 else 0.5 for h in range(layout.num_kv_heads)])
    seqs = [  # seeded by place, so that equal lengths do not make equal requests
        Sequence(n, layout, group, rate, seed=1000 * place + n, dtype=dtype, device=DEVICE)
        for place, n in enumerate(lengths)
    ]
    feed(harness, seqs, chunks)
    return harness, seqs


def check_against_plain(layout, config, group, lengths, chunks, dtype=torch.float32, tuning=SMALL):
    """State bit for bit (by slot: pages may differ), outputs by the rule of `check_outputs`."""
    ops = triton_ops(layout, group, tuning)
    harness, seqs = run(ops, layout, config, group, lengths, chunks, dtype)
    plain, expected = run(TorchOps(), layout, config, group, lengths, chunks, dtype)
    size = layout.page_size
    for index in range(1, len(lengths) + 1):
        assert torch.equal(harness.state.live[index], plain.state.live[index])
        used = (harness.state.live[index] + size - 1) // size
        assert int(harness.state.pages_used[index]) == int(used.sum())
        ring = min(lengths[index - 1], layout.ring_size)
        bits = [h.state.evict_ring[index, ..., :ring] for h in (harness, plain)]
        assert torch.equal(*bits)
        for layer in range(layout.num_layers):
            for head in range(layout.num_kv_heads):
                rows = [gather_row(h.state, index, layer, head) for h in (harness, plain)]
                assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    check_null_state(harness)
    check_outputs(seqs, expected, config, harness.scale)


def check_null_state(harness):
    assert not harness.state.live[0].any() and not harness.state.page_table[0].any()
    assert not harness.state.pages_used[0] and not harness.state.evict_ring[0].any()


def check_outputs(seqs, plain, config, scale):
    """At most twice the error of the plain operations in the same dtype, plus a rounding floor.

    With FP8 storage the error is that of rounding keys and values, which a query sees unrounded as
    long as they are in its own chunk: how many depends on the chunk, and on the query block.
    """
    for seq, other in zip(seqs, plain, strict=True):
        got, baseline = torch.cat(seq.outputs).float(), torch.cat(other.outputs).float()
        for name in ("query", "key", "value"):
            setattr(seq, name, getattr(seq, name).float())
        exact = seq.expected(config, scale)
        eps = torch.finfo(other.outputs[0].dtype).eps
        floor = 4 * eps * exact.abs().max()
        assert not got.isnan().any()
        assert (got - exact).abs().max() <= 2 * (baseline - exact).abs().max() + floor


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("window", [1, 7, 16])
@pytest.mark.parametrize("shift", [0, 1])
def test_kernels_equal_the_plain_operations(window, shift, chunks):
    check_against_plain(make_layout(window), make_config(window, shift), 2, (1, 40, 77), chunks)


@pytest.mark.parametrize("shift", [0, 1])
def test_token_by_token(shift):
    check_against_plain(make_layout(7), make_config(7, shift), 2, (1, 30, 45), (1,))


@pytest.mark.parametrize(
    ("head_dim", "heads", "group", "page_size"),
    [(64, 1, 1, 8), (80, 2, 3, 16), (128, 3, 4, 8), (32, 2, 8, 32), (16, 5, 7, 8)],
    ids=str,
)
def test_odd_shapes(head_dim, heads, group, page_size):
    layout = make_layout(8, head_dim, page_size, heads, layers=1)
    check_against_plain(layout, make_config(8), group, (55, 34), (20, 1, 1))


def test_without_eviction_every_token_stays():
    config = make_config(8, evict=False)
    check_against_plain(make_layout(8, layers=1), config, 2, (70,), (30, 1))


@pytest.mark.parametrize("chunks", [(1,), (33, 1, 5)], ids=str)
def test_fp8_storage(chunks):
    layout = make_layout(8, storage=FP8Storage(), layers=1)
    check_against_plain(layout, make_config(8), 2, (60, 45), chunks)


def test_fp8_storage_of_an_odd_shape():
    layout = make_layout(8, head_dim=80, page_size=16, storage=FP8Storage(), layers=1)
    check_against_plain(layout, make_config(8), 3, (55, 34), (20, 1, 1))


def test_the_report_equals_the_plain_one():
    layout = make_layout(7, heads=3)
    harness, _ = run(triton_ops(layout, 2), layout, make_config(7), 2, (30, 55), (20, 1))
    outs = [torch.full((3, REPORT_HORIZON + 2), -1, dtype=torch.int32, device=DEVICE) for _ in "ab"]
    harness.ops.report(harness.state, outs[0])
    report(harness.state, outs[1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("merge_block", [1, 16])
def test_many_programs_share_one_row(merge_block):
    """13 of them: merged in several rounds or at once."""
    tuning = replace(SMALL, programs=32, merge_block=merge_block)
    config = make_config(4, evict=False)
    layout = make_layout(4, heads=1, layers=1)
    check_against_plain(layout, config, 4, (200,), (190, 1), tuning=tuning)


@pytest.mark.parametrize("programs", [8, 3])
def test_a_program_ends_one_row_and_begins_another(programs):
    """Nine rows of four tiles: five tiles a program, with parts of two rows, or three whole rows.

    Lengths are equal: a row read with its neighbor's state has the right number of slots.
    """
    tuning = replace(SMALL, programs=programs)
    config = make_config(4, evict=False)
    check_against_plain(make_layout(4, heads=3), config, 2, (49, 49, 49), (48,), tuning=tuning)


def test_idle_programs_look_at_tiles_that_exist():
    """Many rows, the last ones of a low state index, then few: most programs have no work."""
    layout, config = make_layout(4, heads=1, layers=1), make_config(4, evict=False)
    ops = triton_ops(layout, 2)
    harness = Harness(ops, config, layout, 6, max_tokens=1024, device=DEVICE)
    seqs = [Sequence(150, layout, 2, 0.5, seed=i, device=DEVICE) for i in range(6)]
    for index in reversed(range(6)):
        harness.start(index)
    harness.step([(i, seq, 140) for i, seq in reversed(list(enumerate(seqs)))])
    harness.step([(i, seq, 1) for i, seq in reversed(list(enumerate(seqs)))])
    seq = Sequence(5, layout, 2, 0.5, seed=9, device=DEVICE)
    harness.start(5)
    harness.step([(5, seq, 1)])
    begin = ops.schedule.begin
    assert (begin[..., 0] >= begin[..., 3]).all(), "a tile before the row's first"


def test_only_padding_leaves_no_trace():
    layout, config = make_layout(4), make_config(4)
    harness = Harness(triton_ops(layout, 2), config, layout, 2, device=DEVICE)
    seq = Sequence(12, layout, 2, 0.5, seed=0, device=DEVICE)
    harness.state.state_of_block.zero_()  # nobody was started: everything is the null state
    before = harness.state.pages.k[layout.pages_per_block :].clone()
    harness.step([(0, seq, 5), (1, seq, 1)])
    assert torch.equal(
        before.view(torch.uint8), harness.state.pages.k[layout.pages_per_block :].view(torch.uint8)
    )
    check_null_state(harness)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "storage", "head_dim", "heads", "group"),
    [
        (torch.bfloat16, "model", 128, 8, 4),
        (torch.bfloat16, "fp8", 128, 8, 4),
        (torch.float16, "model", 64, 2, 8),
        (torch.float16, "fp8", 64, 2, 8),
        (torch.bfloat16, "model", 80, 3, 1),
        (torch.float32, "model", 128, 2, 5),
        (torch.float32, "fp8", 64, 2, 2),
    ],
    ids=str,
)
def test_production_tiles_on_the_gpu(dtype, storage, head_dim, heads, group):
    layout = make_layout(64, head_dim, 16, heads, STORAGES[storage].for_model(dtype))
    for chunks in [(256,), (100, 1, 1, 37)]:
        lengths = (1, 130, 250)
        check_against_plain(layout, make_config(64), group, lengths, chunks, dtype, tuning=None)
