"""The serving benchmarks measure what they say: windows in which only decoding happens, arms that
differ in nothing but the cache."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_kernels
import bench_serving
from kernel_arena import Arena
from serving_driver import Driver, OutOfTimeError, Step, Window, quiet_tail
from serving_plan import FIGURES, WORKLOADS, Plan
from serving_workloads import MEASURING_SECONDS, Bench, held_when_full, mean_running


def step(time, tokens, running, waiting=0, preemptions=0):
    return Step(time, tokens, running, waiting, usage=0.5, preemptions=preemptions)


def test_a_window_has_no_step_with_a_prefill_a_preemption_or_another_batch():
    quiet = [step(t, 4, 4) for t in (2.0, 2.1, 2.2)]
    assert quiet_tail([step(1.0, 3, 4), *quiet]) == 3  # one of four is in its prompt
    assert quiet_tail([step(1.0, 4, 4, preemptions=1), *quiet]) == 3
    assert quiet_tail([step(1.0, 5, 5), *quiet]) == 3
    assert quiet_tail([*quiet, step(3.0, 3, 4)]) == 0 + quiet_tail([step(3.0, 3, 4)])
    window = Window.of(quiet)
    assert window.tokens == 8 and window.rate == pytest.approx(40)


class FakeEngine:
    """A prompt takes a step of 1 s, a decode step 0.1 s; ``capacity`` requests fit."""

    def __init__(self, capacity):
        self.capacity, self.now = capacity, 100.0
        self.waiting, self.running = [], []
        self.engine_core = self.input_processor = self

    def get_supported_tasks(self):
        return ("generate",)

    def process_inputs(self, request_id, prompt, params, tasks):
        return SimpleNamespace(request_id=request_id, prompt=prompt, params=params, made=0)

    def assign_request_id(self, request):
        request.request_id += "-x"

    def add_request(self, request):
        self.waiting.append(request)

    def abort_requests(self, ids):
        self.waiting = [r for r in self.waiting if r.request_id not in ids]
        self.running = [r for r in self.running if r.request_id not in ids]

    def get_output(self):
        events, start = {}, self.now
        if self.waiting and len(self.running) < self.capacity:
            request = self.waiting.pop(0)
            self.running.append(request)
            events[request.request_id] = [
                EngineCoreEvent(EngineCoreEventType.SCHEDULED, timestamp=start)
            ]
            self.now += 0.9
        self.now += 0.1
        outputs = []
        for request in list(self.running):
            request.made += 1
            done = request.made == request.params.max_tokens
            if done:
                self.running.remove(request)
            outputs.append(
                EngineCoreOutput(
                    request.request_id,
                    [0],
                    finish_reason=FinishReason.LENGTH if done else None,
                    events=events.get(request.request_id),
                    kv_transfer_params={"dms": {"live_tokens": 2.0, "dense_tokens": 8}},
                )
            )
        stats = SchedulerStats(
            num_running_reqs=len(self.running), num_waiting_reqs=len(self.waiting)
        )
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, timestamp=self.now)


def fake_bench(workloads, capacity=20, levels=(1, 4), max_requests=32, deadline=float("inf")):
    plan = Plan(workloads, list(levels), 10, max_requests, chunk=8, unit=1, reason_requests=6)
    return Bench(Driver(FakeEngine(capacity), 50, 0, deadline), plan, pool_tokens=20 * 8)


def test_each_workload_gives_rows_with_every_figure():
    rows = list(fake_bench(list(WORKLOADS)).run())
    assert [row["workload"] for row in rows] == [
        "prefill-8k", "decode-8k", "decode-8k", "capacity-8k", "saturated-8k", "prefill-32k",
        "prefill-128k", "reason-1k-8k",
    ]  # fmt: skip
    assert all(set(FIGURES) <= set(row) for row in rows)
    by_name = {(row["workload"], row["concurrency"]): row for row in rows}
    assert by_name["prefill-8k", 1]["prefill_tok_s"] == pytest.approx(8)  # 8 tokens in 1 s
    assert by_name["decode-8k", 4]["decode_tok_s"] == pytest.approx(40)
    assert by_name["capacity-8k", 20]["requests_held"] == 20
    assert all(row["live_compression"] == 4.0 for row in rows)
    saturated = next(row for row in rows if row["workload"] == "saturated-8k")
    assert saturated["decode_tok_s"] == pytest.approx(10 * saturated["concurrency"])
    assert saturated["requests_held"] == 20 and saturated["preemptions"] == 0
    reason = rows[-1]
    assert reason["complete"] and reason["generated"] == 6 * 8 and reason["finished"] == 6
    assert reason["requests_held"] == 6 and reason["preemptions"] == 0


def test_a_level_that_the_pool_does_not_hold_is_left_out():
    rows = list(fake_bench(["decode-8k"], capacity=3, levels=(2, 8)).run())
    assert [row["concurrency"] for row in rows] == [2]


def test_time_that_runs_short_ends_the_filling_and_what_was_admitted_is_measured():
    deadline = time.monotonic() + MEASURING_SECONDS / 2
    rows = list(fake_bench(["decode-8k", "saturated-8k"], levels=(4,), deadline=deadline).run())
    assert [row["workload"] for row in rows] == ["decode-8k", "capacity-8k", "saturated-8k"]
    assert [row.get("complete") for row in rows] == [None, False, False]
    assert 4 <= rows[1]["requests_held"] < 20
    saturated = rows[2]
    assert saturated["decode_tok_s"] == pytest.approx(10 * saturated["concurrency"])


def test_no_step_runs_after_the_time_is_up():
    with pytest.raises(OutOfTimeError):
        list(fake_bench(["decode-8k"], deadline=0.0).run())


def test_long_answers_that_run_out_of_time_are_counted_as_far_as_they_came(monkeypatch):
    bench = fake_bench(["reason-1k-8k"])
    time_left = iter([*[1.0] * 8, *[-1.0] * 9])
    monkeypatch.setattr(bench.driver, "seconds_left", lambda: next(time_left))
    (row,) = bench.run()
    # A step for each of 6 prompts, in which those before it decode, then 2 more.
    assert row["complete"] is False and row["generated"] == 1 + 2 + 3 + 4 + 5 + 6 + 6 + 6
    assert row["finished"] == 1 and row["decode_tok_s"] == pytest.approx(row["generated"] / 6.2)


def test_held_is_what_ran_while_others_waited_before_the_first_end():
    running_and_waiting = [(2, 8), (10, 0), (8, 2), (7, 3), (6, 3), (1, 2), (2, 0)]
    steps = [step(float(t), 0, *both) for t, both in enumerate(running_and_waiting)]
    assert held_when_full(steps, 10) == 7
    assert held_when_full([step(0.0, 0, 4), step(1.0, 0, 10)], 10) == 10
    assert mean_running([step(0.0, 0, 10), step(3.0, 0, 2), step(4.0, 0, 0)]) == 8


def options(*flags):
    return bench_serving.parse_args(["--model", "/m", "--pool-gib", "2", *flags])


def test_arms_differ_in_checkpoint_cache_and_plugin_only():
    chosen = options("--workloads", ",".join(WORKLOADS), "--dms", '{"page_size": 32}')
    for _, plan, pool in bench_serving.plans(chosen):
        args = {
            name: bench_serving.engine_args(arm, chosen.model, plan, pool, chosen)
            for name, arm in bench_serving.ARMS.items()
        }
        own = ("model", "kv_cache_dtype", "additional_config")
        common = [{k: v for k, v in a.items() if k not in own} for a in args.values()]
        assert all(c == common[0] for c in common)
        assert common[0]["enable_prefix_caching"] is False
        assert common[0]["kv_cache_memory_bytes"] == pool
        assert args["dms_noevict"]["additional_config"] == {
            "dms": {"page_size": 32, "evict": False}
        }
        assert "additional_config" not in args["bf16"]


def test_long_prompts_and_long_answers_have_engines_of_their_own():
    chosen = options("--workloads", ",".join(WORKLOADS), "--reason-requests", "32")
    names = [(name, plan.max_requests, pool) for name, plan, pool in bench_serving.plans(chosen)]
    full = 2 << 30
    assert names == [("8k", 1024, full), ("long", 8, full), ("reason", 32, full // 8)]
    chosen.one_engine = True
    merged = bench_serving.plans(chosen)[0][1]
    assert merged.max_model_len > 131072 and merged.max_requests == 1024


def test_graphs_cover_every_batch_that_can_run():
    assert bench_serving.capture_sizes(1024)[-1] == 1024
    assert bench_serving.capture_sizes(256)[-2:] == [248, 256]
    assert bench_serving.capture_sizes(5) == [1, 2, 4, 5]


@pytest.mark.parametrize("seed", range(3))
def test_an_arena_is_made_at_every_draw_of_rates(seed):
    """A row that keeps all it is given needs every page of a request's longest length."""
    torch.manual_seed(seed)
    for chunk, stored in ((1, 600), (40, 600), (40, 0)):
        arena = Arena(bench_kernels.STORAGE["bf16"], 8, chunk, stored, num_layers=1, device="cpu")
        assert int(arena.saved_live.max()) <= stored
        assert int((arena.state.block_rows > 0).sum(1).max()) <= arena.layout.max_blocks_per_request


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's run of bench_kernels does this")
@pytest.mark.parametrize("storage", bench_kernels.STORAGE)
@pytest.mark.parametrize(("chunk", "stored"), [(1, 600), (40, 600), (40, 0)])
def test_stores_are_gated_and_what_they_move_is_counted(monkeypatch, storage, chunk, stored):
    torch.manual_seed(chunk + stored)
    arena = Arena(bench_kernels.STORAGE[storage], 2, chunk, stored, num_layers=1, device="cpu")
    before = arena.raw.clone()
    bench_kernels.gate_store("store", arena)
    assert torch.equal(arena.raw, before) and torch.equal(arena.state.live, arena.saved_live)

    arena.store(0)
    moved, rows = arena.bytes_moved(0), 2 * 8
    slot = 512 if storage == "bf16" else 2 * (128 + 2)
    kept = int(arena.state.live.sum() - arena.saved_live.sum()) - (0 if stored else rows * chunk)
    if chunk == 1:
        assert moved == {"store": rows * (512 + slot) + kept * 2 * slot}
    else:
        assert moved["store"] == kept * (512 + slot)
        assert moved["store_window"] == rows * chunk * (512 + slot)
        stored_slots = int(arena.saved_live.sum())
        assert moved["prefill"] == 2 * chunk * (8 * 512 + 2 * 32 * 256) + stored_slots * slot

    arena.restore()
    arena.raw.copy_(before)
    monkeypatch.setattr(arena.plain, "store", lambda *args: None)
    with pytest.raises(SystemExit, match="not timed"):
        bench_kernels.gate_store("store", arena)
