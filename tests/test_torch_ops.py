"""The plain operations on the arena equal exact DMS attention, however the tokens arrive."""

import pytest
import torch
from arena_harness import Harness, Sequence, assert_taken_from_own_blocks, feed, make_config

from vllm_dms import reference
from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.arena.storage import FP8Storage, ModelStorage
from vllm_dms.backend.ops import report
from vllm_dms.backend.torch_ops import TorchOps

PLAIN = ModelStorage(torch.float32)


def make_layout(window, page_size=8, storage=PLAIN, heads=2, layers=1, leaf_size=0):
    return ArenaLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=16,
        window=window,
        page_size=page_size,
        block_size=16,
        storage=storage,
        max_model_len=256,
        leaf_size=leaf_size,
    )


@pytest.mark.parametrize("chunks", [(256,), (1,), (7, 1, 1), (32, 5, 1, 17), (9, 64)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 8, 16])
@pytest.mark.parametrize("shift", [0, 1])
def test_attention_is_exact_for_any_chunking(window, shift, chunks):
    layout, config = make_layout(window), make_config(window, shift)
    harness = Harness(TorchOps, config, layout, num_seqs=3)
    lengths = (1, 90, 133)
    seqs = [Sequence(n, layout, 2, [0.9, 0.5], seed=n) for n in lengths]
    feed(harness, seqs, chunks)
    for index, seq in enumerate(seqs):
        torch.testing.assert_close(torch.cat(seq.outputs), seq.expected(config, harness.scale))
        evict = reference.evicted(reference.decide(seq.alpha, 1.0, 0.0).T, shift)
        live = reference.live_counts(evict, window)
        assert harness.state.live[index + 1, 0].tolist() == live.tolist()
        pages = (live + layout.page_size - 1) // layout.page_size
        assert int(harness.state.pages_used[index + 1]) == int(pages.sum())
    assert not harness.state.live[0].any() and not harness.state.page_table[0].any()


@pytest.mark.parametrize("leaf_size", [1, 2, 8])
def test_leaves_are_taken_as_rows_grow_and_surplus_blocks_hold_none(leaf_size):
    """Many crossings from one leaf to the next, by steps of every size; checked at each."""
    layout, config = make_layout(8, heads=3, layers=2, leaf_size=leaf_size), make_config(8)
    harness = Harness(TorchOps, config, layout, num_seqs=2)
    seqs = [Sequence(250, layout, 2, [0.0, 0.5, 0.97], seed=i) for i in range(2)]
    for index in range(2):
        harness.start(index)
    for count in [1] * 20 + [60, 1, 1, 7, 90, 1, 33]:
        harness.step([(index, seq, count) for index, seq in enumerate(seqs)])
        assert_taken_from_own_blocks(harness, 2)
    assert harness.state.leaves_used[1:].min() > 20 // leaf_size
    for seq in seqs:
        expected = seq.expected(config, harness.scale)[: seq.stored]
        torch.testing.assert_close(torch.cat(seq.outputs), expected)


def test_without_eviction_every_token_stays():
    layout, config = make_layout(8), make_config(8, evict=False)
    harness = Harness(TorchOps, config, layout, num_seqs=1)
    seq = Sequence(100, layout, 2, 0.9, seed=0)
    feed(harness, [seq], (33, 1))
    assert harness.state.live[1, 0].tolist() == [100, 100]
    torch.testing.assert_close(torch.cat(seq.outputs), seq.expected(config, harness.scale))


def test_fp8_stays_close_and_moves_without_a_second_rounding():
    layout, config = make_layout(8, storage=FP8Storage()), make_config(8)
    harness = Harness(TorchOps, config, layout, num_seqs=1)
    seq = Sequence(120, layout, 2, 0.5, seed=0)
    # As stored: each value rounded once, at its own scale.
    for name in ("key", "value"):
        stored = layout.storage.encode(getattr(seq, name))
        setattr(seq, name, layout.storage.decode(*stored))
    feed(harness, [seq], (20, 1))
    error = torch.cat(seq.outputs) - seq.expected(config, harness.scale)
    assert error.abs().max() < 1e-3


def test_the_report_bounds_what_the_next_tokens_take():
    layout, config = make_layout(4), make_config(4)
    harness = Harness(TorchOps, config, layout, num_seqs=1)
    seq = Sequence(200, layout, 2, [0.9, 0.0], seed=3)
    harness.start(0)
    out = torch.zeros(harness.state.pages_used.shape[0], REPORT_HORIZON + 2, dtype=torch.int32)
    reports = []
    while seq.stored < len(seq):
        harness.step([(0, seq, 1)])
        report(harness.state, out)
        reports.append(out[1].clone())
    for step, row in enumerate(reports):
        for k in range(1, REPORT_HORIZON + 1):
            if step + k < len(reports):
                assert reports[step + k][0] - row[0] <= row[k]
    # Head 1 keeps everything: the bound is reached.
    assert any(reports[i + 1][0] - reports[i][0] == reports[i][1] > 0 for i in range(150))
