"""Spec, messages, device updates and statistics: what the two halves agree on."""

import logging
import pickle

import numpy as np
import pytest
import torch
from core_sim import make_config, make_engine, make_layout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_dms.arena import spec
from vllm_dms.arena.messages import DMSReport, DMSStepMeta
from vllm_dms.arena.report import REPORT_HORIZON, REPORT_WIDTH, Usage
from vllm_dms.arena.spec import make_spec
from vllm_dms.arena.storage import FP8Storage, ModelStorage
from vllm_dms.backend import updates
from vllm_dms.backend.state import allocate_scratch, allocate_state
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.updates import Reporter, apply_updates
from vllm_dms.core import stats
from vllm_dms.core.records import Growth, Step

LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")


FLOAT32 = ModelStorage(torch.float32)


def make_specs(storage=FLOAT32, reserve_compression=1.0):
    vllm_config, config = make_config(reserve_compression)
    return vllm_config, {
        name: make_spec(vllm_config, config, make_layout(storage=storage)) for name in LAYERS
    }


# The spec, as vLLM plans with it.


def plan(vllm_config, specs, memory):
    """vLLM's KV cache configuration for one worker with `memory` bytes."""
    vllm_config.cache_config.kv_cache_layout = "BLHNC"
    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:  # vLLM 0.32
        from vllm.v1.core import kv_cache_utils as planning

        (config,) = planning.get_kv_cache_configs(vllm_config, [specs], [memory])
    else:
        groups = planning.get_global_kv_cache_groups(vllm_config, [specs])
        (config,) = planning.get_kv_cache_configs(vllm_config, [specs], [memory], groups)
    return config


@pytest.mark.parametrize("storage", [FLOAT32, ModelStorage(torch.bfloat16), FP8Storage()], ids=str)
def test_vllm_plans_one_group_and_one_allocation_of_whole_blocks(storage):
    from vllm.v1.kv_cache_layout import KVCacheLayout

    vllm_config, specs = make_specs(storage)
    layout = specs[LAYERS[0]].layout
    assert specs[LAYERS[0]].page_size_bytes * len(LAYERS) == layout.block_bytes
    config = plan(vllm_config, specs, 20 * layout.block_bytes + 5)
    (group,) = config.kv_cache_groups
    assert group.kv_cache_spec == specs[LAYERS[0]]
    assert config.num_blocks == 20
    caches = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.BLHNC)
    storages = {cache.untyped_storage().data_ptr() for cache in caches.values()}
    assert len(storages) == 1
    assert caches[LAYERS[0]].untyped_storage().nbytes() == 20 * layout.block_bytes


@pytest.mark.parametrize(("reserve_compression", "blocks"), [(1.0, 16), (4.0, 4 + 3)])
def test_start_up_needs_a_dense_request_or_what_the_user_counts_on(
    reserve_compression, blocks, caplog, monkeypatch
):
    # 256 tokens are 16 blocks of 16; a chunk of 48 is 3.
    vllm_config, specs = make_specs(reserve_compression=reserve_compression)
    size = specs[LAYERS[0]].layout.block_bytes
    null = 1
    monkeypatch.setattr(spec.logger, "propagate", True)
    caplog.clear()
    plan(vllm_config, specs, (blocks + null) * size)
    assert not [r for r in caplog.records if "too small" in r.getMessage()]
    with pytest.raises(ValueError, match="max seq len"):
        plan(vllm_config, specs, (blocks + null) * size - 1)
    (record,) = [r for r in caplog.records if "too small" in r.getMessage()]
    assert f"may need {blocks} blocks of {size} bytes" in record.getMessage()
    assert f"reserve_compression {reserve_compression:g}: 16 blocks" in record.getMessage()


def test_a_page_longer_than_a_block_widens_the_workers_block_table():
    vllm_config, config = make_config()
    spec = make_spec(vllm_config, config, make_layout(page_size=64))
    # 65 tokens take two pages of 64 in every row: 8 blocks of 16 tokens.
    assert spec.dense_blocks(65) == spec.max_num_blocks_per_req(vllm_config, 65) == 8
    assert spec.layout.max_blocks_per_request == 16


# Messages.


def make_report(rows, step_id=7) -> DMSReport:
    host = torch.tensor(rows, dtype=torch.int32)
    return DMSReport(step_id, np.arange(len(rows)), host)


def test_of_several_ranks_the_fullest_counts_and_what_is_live_adds_up():
    merged = make_report([[1, 5], [2, 2]]).aggregate(make_report([[3, 4], [1, 9]]))
    assert merged.usage.fullest.tolist() == [[3, 5], [2, 9]]
    assert merged.usage.live.tolist() == [9, 11]
    assert merged.step_id == 7
    again = merged.aggregate(make_report([[0, 6], [9, 0]]))
    assert again.usage.fullest.tolist() == [[3, 6], [9, 9]] and again.usage.live.tolist() == [
        15,
        11,
    ]


def test_a_report_is_read_when_it_is_pickled():
    host = torch.zeros(3, 2, dtype=torch.int32)
    report = DMSReport(7, np.array([2, 0]), host)
    host.copy_(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    copy = pickle.loads(pickle.dumps(report))
    assert (copy.step_id, copy.usage.fullest.tolist()) == (7, [[5, 6], [1, 2]])
    assert copy.usage.live.tolist() == [6, 2]


# Device updates.


def make_meta(states, row_updates=(), starts=(), step_id=1) -> DMSStepMeta:
    return DMSStepMeta(
        step_id=step_id,
        states=np.array(states, dtype=np.int32),
        row_updates=np.array(row_updates, dtype=np.int32).reshape(-1, 3),
        starts=np.array(starts, dtype=np.int32).reshape(-1, 2),
        fail_blocks=frozenset(),
        fail_requests=frozenset(),
    )


def make_state(device="cpu"):
    layout = make_layout()
    storage = torch.zeros(20 * layout.block_bytes, dtype=torch.uint8, device=device)
    return allocate_state(storage, layout, 20, max_num_seqs=4)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_updates_reach_the_device_state(device):
    state = make_state(device)
    counters = (state.pages_used, state.leaves_used)
    for counter in counters:
        counter.fill_(5)
    apply_updates(state, make_meta([1]))
    assert all(counter.tolist() == [5] * 5 for counter in counters)
    updates = [(2, 0, 9), (2, 1, 4), (3, 0, 11), (1, 2, 6)]
    apply_updates(state, make_meta([1, 2, 3], updates, [(2, 9), (3, 11)]))
    assert state.block_rows[2, :2].tolist() == [9, 4]
    assert state.block_rows[1, 2] == 6 and state.block_rows[3, 0] == 11
    assert state.block_rows.sum() == 30
    assert state.state_of_block[9] == 2 and state.state_of_block[11] == 3
    assert state.state_of_block.sum() == 5
    assert all(counter.tolist() == [5, 5, 0, 0, 5] for counter in counters)


class LateBuffer:
    """A buffer and its event: what was copied is there once it was waited for, no sooner."""

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.copied = source.clone()

    def record(self):
        self.sent = self.copied

    def synchronize(self):
        self.arrived = self.sent

    def numpy(self):
        return self.arrived.numpy()


@pytest.mark.parametrize("device", [*DEVICES, "cpu that copies late"])
def test_reports_keep_their_own_step_while_later_ones_are_made(device, monkeypatch):
    if device not in ("cpu", "cuda"):
        buffers = [(late, late) for late in (LateBuffer(), LateBuffer(), LateBuffer())]
        monkeypatch.setattr(updates, "make_buffers", lambda *args: buffers)
        device = "cpu"
    state = make_state(device)
    scratch = allocate_scratch(state.layout, 1, device)
    reporter = Reporter(state, TorchOps(state, scratch, make_config()[1], 1.0))
    reports = []
    for step in range(1, 20):
        state.live.fill_(step)
        state.pages_used.fill_(10 * step)
        reports.append((step, reporter.report(make_meta([3, 1], step_id=step))))
    rows = state.layout.num_rows
    for step, report in reports:
        # P = 8: a row at `step` slots takes a page more within k tokens if k > -step mod 8.
        need = [rows * (-(-(step + k) // 8) - -(-step // 8)) for k in range(1, REPORT_HORIZON + 1)]
        assert report.step_id == step
        assert report.usage.fullest.tolist() == [[10 * step, *need, rows * step]] * 2


# Statistics.


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_client_is_told_live_and_dense_tokens_of_all_that_was_stored(lag):
    engine = make_engine(1.0, lag=lag)
    engine.add("kept", 100, 20, keep=1.0)
    engine.add("evicted", 100, 20, keep=0.0)
    engine.add("short", 5, 1, keep=1.0)
    engine.drain()
    # The last of the tokens is never stored.
    assert engine.params["kept"]["dms"] == {
        "live_tokens": 119.0, "dense_tokens": 119, "compression": 1.0, "blocks": 8,
    }  # fmt: skip
    assert engine.params["evicted"]["dms"]["live_tokens"] == 16.0  # W + 1
    assert engine.params["evicted"]["dms"]["compression"] == pytest.approx(119 / 16, abs=0.001)
    assert engine.params["short"]["dms"]["dense_tokens"] == 5


def test_statistics_of_several_ranks_are_means_over_all_their_rows():
    engine = make_engine(1.0, ranks=2)
    evict_all = engine.workers[1]
    run = evict_all.run
    evict_all.run = lambda meta, num, keep, *texts: run(meta, num, [0.0 for _ in keep], *texts)
    engine.add("a", 48, 2, keep=1.0)
    engine.step()  # one rank keeps 48 tokens in each of its rows, the other W + 1 = 16
    ledger = engine.manager.ledger
    assert ledger.live[1] / ledger.all_rows == 32
    assert ledger.fullest[1] / ledger.num_rows == 48
    stats = engine.connector.stats
    assert (stats.eligible_tokens, stats.evicted_tokens) == (32, 16)
    assert "live compression 1.50x" in stats.line()
    assert engine.manager.admission.live_fraction.value == 1.0  # blocks follow the fullest rank
    engine.drain()
    assert engine.params["a"]["dms"]["live_tokens"] == 32.5


def test_the_line_states_live_compression_and_blocks():
    engine = make_engine(1.0)
    assert "no running requests, 0/16 blocks" in engine.connector.stats.line()
    engine.add("a", 150, 50, keep=0.0)
    for _ in range(8):
        engine.step()
    tokens = int(engine.manager.ledger.reported_end[1])
    held = len(engine.manager.req_to_blocks["a"])
    line = engine.connector.stats.line()
    assert f"live compression {tokens / 16:.2f}x over 1 running requests" in line
    assert f"{held}/16 blocks held, {engine.manager.returned_blocks} returned" in line
    assert f"{tokens - 16} of {tokens - 16} past-window tokens evicted" in line
    engine.drain()
    assert "no running requests, 0/16 blocks" in engine.connector.stats.line()


NO_STEP = Step(0, (), *[np.zeros(0)] * 3)
NO_USAGE = Usage.of_rank(np.zeros((0, REPORT_WIDTH)))


@pytest.mark.parametrize(
    ("evict", "kept", "warns"), [(True, 5000, True), (True, 4990, False), (False, 5000, False)]
)
def test_a_warning_if_nothing_was_evicted(caplog, monkeypatch, evict, kept, warns):
    monkeypatch.setattr(stats.logger, "propagate", True)
    manager = make_engine(1.0).manager
    counters = stats.Stats(manager, evict, log_interval=0.0)
    rows = manager.ledger.num_rows
    with caplog.at_level(logging.WARNING, logger=stats.logger.name):
        for _ in range(3):
            counters.add(NO_STEP, NO_USAGE, Growth(5000, kept * rows, kept * rows))
    found = [r for r in caplog.records if "nothing is compressed" in r.getMessage()]
    assert len(found) == (1 if warns else 0)


def test_the_line_is_logged_at_its_interval(caplog, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stats.time, "monotonic", lambda: now)
    monkeypatch.setattr(stats.logger, "propagate", True)
    counters = stats.Stats(make_engine(1.0).manager, True, log_interval=10.0)
    with caplog.at_level(logging.INFO, logger=stats.logger.name):
        for now in (105.0, 111.0, 112.0, 121.5):  # noqa: B007 read by the clock above
            counters.add(NO_STEP, NO_USAGE, Growth(0, 0, 0))
    assert sum("running requests" in r.getMessage() for r in caplog.records) == 2
