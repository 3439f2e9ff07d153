"""The Triton operations equal the plain ones and exact DMS attention: in Triton's interpreter on
the CPU, where only float32 arithmetic is right, and on a GPU in every dtype."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from arena_harness import Harness, Sequence
from kernel_cases import (
    DEVICE,
    SMALL,
    Case,
    assert_null_state_untouched,
    check,
    gpu_cases,
    make_kernels,
    watch_launches,
)

from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.ops import report

# Layers are alike: where a test is not of several, one, as the interpreter takes its time.
CASE = Case(layers=1, tuning=replace(SMALL, programs=8, copy_block=16))

LENGTHS = (1, 40, 66)


@pytest.mark.parametrize("chunks", [(256,), (33, 1, 5, 1), (64, 17)], ids=str)
@pytest.mark.parametrize("window", [1, 7, 16])
@pytest.mark.parametrize("shift", [0, 1])
def test_kernels_equal_the_plain_operations(window, shift, chunks):
    layers = 2 if window == 7 else 1
    check(replace(CASE, window=window, layers=layers, shift=shift, chunks=chunks, lengths=LENGTHS))


@pytest.mark.parametrize("shift", [0, 1])
def test_token_by_token(shift):
    check(replace(CASE, window=7, layers=1 + shift, shift=shift, chunks=(1,), lengths=(1, 18, 35)))


@pytest.mark.parametrize(("storage", "dim"), [("model", 16), ("fp8", 16), ("int4", 64)])
def test_a_row_of_several_tiles_is_read_by_one_program(storage, dim):
    """So that weights are added up over tiles, of which later ones may have the largest score."""
    sizes = {"dim": dim, "window": 30, "rates": (0.1, 0.2), "lengths": (57, 49)}
    tuning = replace(SMALL, programs=1)
    check(replace(CASE, **sizes, storage=storage, tuning=tuning, chunks=(45, 1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("dim", "heads", "group", "page"),
    [(64, 1, 1, 8), (80, 2, 3, 16), (128, 3, 4, 8), (32, 2, 8, 32), (16, 5, 7, 8)],
    ids=str,
)
def test_odd_shapes(dim, heads, group, page):
    shape = {"dim": dim, "heads": heads, "group": group, "page": page}
    check(replace(CASE, **shape, chunks=(20, 1, 1), lengths=(55, 34)))


@pytest.mark.parametrize(
    ("leaf", "page", "shape"),
    [
        (2, 8, {"chunks": (1,), "lengths": (40,), "rates": (0.1, 0.6)}),
        (2, 8, {"chunks": (61, 1, 1), "lengths": (100, 71), "heads": 3, "rates": (0.0, 0.9, 0.3)}),
        (1, 16, {"chunks": (50, 1, 33), "lengths": (140,), "rates": (0.1, 0.6)}),
        (4, 8, {"chunks": (33, 1, 5), "lengths": (120,), "evict": False, "storage": "fp8"}),
    ],
    ids=str,
)
def test_rows_outgrow_their_page_tables(leaf, page, shape):
    """Pages listed in leaves: of one page, of two, of many; with a tile's pages in one leaf."""
    check(replace(CASE, leaf=leaf, page=page, window=7, **shape))


def test_without_eviction_every_token_stays():
    check(replace(CASE, evict=False, chunks=(30, 1), lengths=(70,)))


ROUNDED = [((1,), (33, 17)), ((33, 1, 5), (60, 45))]  # chunks, lengths


@pytest.mark.parametrize(("chunks", "lengths"), ROUNDED, ids=str)
def test_fp8_storage(chunks, lengths):
    check(replace(CASE, storage="fp8", layers=2, chunks=chunks, lengths=lengths))


def test_fp8_storage_of_an_odd_shape():
    shape = {"dim": 80, "group": 3, "page": 16}
    check(replace(CASE, storage="fp8", **shape, chunks=(20, 1, 1), lengths=(55, 34)))


@pytest.mark.parametrize(("chunks", "lengths"), ROUNDED, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_int4_storage(dim, chunks, lengths):
    check(replace(CASE, storage="int4", dim=dim, group=3, chunks=chunks, lengths=lengths))


def test_the_report_equals_the_plain_one():
    case = replace(CASE, window=7, heads=3, chunks=(20, 1), lengths=(30, 55))
    harness, _ = case.run(kernels=True)
    shape = (harness.state.num_states, REPORT_WIDTH)
    outs = [torch.full(shape, -1, dtype=torch.int32, device=DEVICE) for _ in "ab"]
    harness.ops.report(outs[0])
    report(harness.state, outs[1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("merge_block", [1, 16])
@pytest.mark.parametrize("merge_cuts", [0, 99], ids=["by another kernel", "by the last of them"])
def test_many_programs_share_one_row(merge_block, merge_cuts):
    """13 of them: merged in several rounds or at once."""
    tuning = replace(CASE.tuning, programs=32, merge_block=merge_block, merge_cuts=merge_cuts)
    shape = {"heads": 1, "group": 4, "window": 4}
    check(replace(CASE, **shape, evict=False, chunks=(190, 1), lengths=(200,), tuning=tuning))


@pytest.mark.parametrize("merge_cuts", [0, 99])
@pytest.mark.parametrize("programs", [8, 3])
def test_a_program_ends_one_row_and_begins_another(programs, merge_cuts):
    """Nine rows of four tiles: five tiles a program, with parts of two rows, or three whole rows.

    Lengths are equal: a row read with its neighbor's state has the right number of slots.
    """
    tuning = replace(CASE.tuning, programs=programs, merge_cuts=merge_cuts)
    rows = {"heads": 3, "layers": 2, "window": 4, "evict": False, "lengths": (49, 49, 49)}
    check(replace(CASE, **rows, chunks=(48,), tuning=tuning))


def test_idle_programs_look_at_tiles_that_exist():
    """Many rows, the last ones of a low state index, then few: most programs have no work."""
    case = replace(CASE, heads=1, window=4, evict=False, lengths=(150,) * 6)
    make_ops = partial(make_kernels, group=case.group, tuning=case.tuning)
    harness = Harness(make_ops, case.config(), case.layout(), 6, max_tokens=1024, device=DEVICE)
    seqs = case.sequences()
    for index in reversed(range(6)):
        harness.start(index)
    harness.step([(i, seq, 140) for i, seq in reversed(list(enumerate(seqs)))])
    harness.step([(i, seq, 1) for i, seq in reversed(list(enumerate(seqs)))])
    seq = Sequence(5, case.layout(), 2, 0.5, seed=9, device=DEVICE)
    harness.start(5)
    harness.step([(5, seq, 1)])
    begin = harness.ops.schedule.begin
    assert (begin[..., 0] >= begin[..., 3]).all(), "a tile before the row's first"


def test_a_layer_launches_only_what_has_work(monkeypatch):
    """A ring of 8: survivors are copied where a chunk ends beyond it, wherever decodes are."""
    tuning = replace(CASE.tuning, merge_cuts=99)  # rows are merged by whoever is last
    case = replace(CASE, window=7, lengths=(40, 40, 40), tuning=tuning)
    harness, seqs = case.harness(kernels=True), case.sequences()
    names = watch_launches(monkeypatch)

    def launched(*work):
        names.clear()
        harness.step([(place, seqs[place], tokens) for place, tokens in work])
        assert names[0] == "schedule"
        return names[1:]

    for place in range(3):
        harness.start(place)
    chunk, decode = ["store_plan", "prefill", "store_window"], ["decode"]
    beyond = ["store_plan", "store_copy", "prefill", "store_window"]
    assert launched((0, 3)) == chunk
    assert launched((0, 5)) == chunk
    assert launched((0, 1)) == ["store_token", *decode]
    assert launched((0, 1), (1, 8)) == chunk + decode
    assert launched((0, 1), (1, 2)) == beyond + decode
    assert launched((1, 2), (2, 9)) == beyond


def test_only_padding_leaves_no_trace():
    case = replace(CASE, window=4, lengths=(12, 12))
    harness = case.harness(kernels=True)
    seq = case.sequences()[0]
    harness.state.state_of_block.zero_()  # nobody was started: everything is the null state
    pages = harness.state.pages.k[harness.layout.pages_per_block :]
    before = pages.clone()
    harness.step([(0, seq, 5), (1, seq, 1)])
    assert torch.equal(before.view(torch.uint8), pages.view(torch.uint8))
    assert_null_state_untouched(harness)


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases("triton"))
def test_production_tiles_on_the_gpu(case):
    for leaf, chunks in [(0, (256,)), (0, (100, 1, 1, 37)), (4, (256,)), (4, (90, 1, 1, 37))]:
        check(replace(case, chunks=chunks, leaf=leaf))
