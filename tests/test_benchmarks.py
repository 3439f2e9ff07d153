"""The benchmarks measure what they say: windows in which only decoding happens, full pools, kernels
that equal the plain operations."""

import json
import os
import subprocess
import sys
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
import kernel_arena
from decode import decode_rows
from driver import Driver, Step, quiet_tail, window_of
from host_time import METHODS, Clocks
from steps import DECODE, Plan


def step(time, tokens, running, resumed=0):
    return Step(time, tokens, running, waiting=0, usage=0.5, resumed=resumed)


def test_a_window_has_no_step_with_a_prefill_a_preemption_or_another_batch():
    quiet = [step(t, 4, 4) for t in (2.0, 2.1, 2.2)]
    assert quiet_tail([step(1.0, 3, 4), *quiet]) == 3  # one of four is in its prompt
    assert quiet_tail([step(1.0, 4, 4, resumed=1), *quiet]) == 3
    assert quiet_tail([step(1.0, 5, 5), *quiet]) == 3
    assert quiet_tail([*quiet, step(3.0, 3, 4)]) == 0
    assert window_of(quiet)["decode_tok_s"] == pytest.approx(40)


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
            scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, timestamp=start)
            events[request.request_id] = [scheduled]
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
        running, waiting = len(self.running), len(self.waiting)
        stats = SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting)
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, timestamp=self.now)


def rows_of(capacity, levels):
    plan = Plan(list(DECODE), 8, levels, num_steps=10, max_requests=32, chunk=8, scale=1024)
    return decode_rows(Driver(FakeEngine(capacity), 50, seed=0), plan, pool_tokens=20 * 8)


def test_decode_capacity_and_a_full_pool_are_measured_in_one_engine():
    rows = list(rows_of(capacity=20, levels=[1, 4]))
    assert [(row["workload"], row["concurrency"]) for row in rows[:3]] == [
        ("decode-8k", 1), ("decode-8k", 4), ("capacity-8k", 20)
    ]  # fmt: skip
    assert [row["decode_tok_s"] for row in rows[:2]] == pytest.approx([10, 40])
    assert rows[2]["requests_held"] == 20 and rows[2]["offered"] == 32
    full = rows[3]
    assert full["workload"] == "saturated-8k" and full["concurrency"] < 20
    assert full["decode_tok_s"] == pytest.approx(10 * full["concurrency"])
    assert full["requests_held"] == 20 and full["preemptions"] == 0
    assert all(row["live_compression"] == 4.0 for row in rows)


def test_a_pool_that_does_not_hold_the_load_ends_the_run():
    rows = rows_of(capacity=3, levels=[2, 8])
    assert next(rows)["concurrency"] == 2
    with pytest.raises(RuntimeError, match="does not hold 8 requests"):
        next(rows)


def test_host_times_are_those_of_steps_with_so_many_tokens(monkeypatch):
    now = iter(range(1000))
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(f"time.{clock}", lambda: next(now) * 1e-6)
    made = iter(SimpleNamespace(total_num_scheduled_tokens=n) for n in (9, 4, 9, 9))
    part = SimpleNamespace(**{method: lambda *args: None for _, method in METHODS.values()})
    part.schedule = lambda: next(made)
    clocks = Clocks(SimpleNamespace(scheduler=part, model_executor=part))
    for _ in range(4):  # of the last the update is still to come
        output = part.schedule()
        part.execute_model(output), part.sample_tokens(None)
        if len(clocks.steps) < 4:
            part.update_from_output(output, None)
    figures = clocks.figures(first=1, tokens=9)
    assert figures["num_steps"] == 1 and set(figures["cpu_us"]) == set(METHODS)
    assert figures["host_cpu_ms"] == pytest.approx(4e-3) == 4 * figures["cpu_us"]["update"] / 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's run of bench_kernels does this")
@pytest.mark.parametrize("storage", bench_kernels.STORAGE)
@pytest.mark.parametrize(("chunk", "stored"), [(1, 600), (40, 600), (40, 0)])
def test_a_store_that_is_wrong_is_not_timed(monkeypatch, storage, chunk, stored):
    torch.manual_seed(chunk + stored)
    kind = bench_kernels.STORAGE[storage]
    arena = kernel_arena.Arena(kind, 2, chunk, stored, num_layers=1, device="cpu")
    before = arena.raw.clone()
    bench_kernels.gate_store("store", arena)
    assert torch.equal(arena.raw, before) and torch.equal(arena.state.live, arena.saved_live)
    monkeypatch.setattr(arena.plain, "store", lambda *args: None)
    with pytest.raises(SystemExit, match="not timed"):
        bench_kernels.gate_store("store", arena)


def test_attention_that_is_wrong_is_not_timed():
    exact = torch.randn(4, 8)
    bench_kernels.gate("decode", (exact.bfloat16(), exact))
    for wrong in (exact + 0.1, exact * float("nan")):
        with pytest.raises(SystemExit, match="not timed"):
            bench_kernels.gate("decode", (wrong, exact))


@pytest.mark.skipif(torch.cuda.is_available(), reason="without one the launches are left out")
def test_launches_are_timed_by_batch_and_part_without_a_gpu(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script, path = Path(bench_kernels.__file__).with_name("bench_launches.py"), tmp_path / "a.json"
    command = [sys.executable, str(script), "--json", str(path), "--rounds", "2", "--layers", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    assert report["launches"] == "none: the plugin's Python alone" and report["versions"]["triton"]
    rows = {row["batch"]: row for row in report["rows"]}
    launched = {name: [*row["launches_us"]] for name, row in rows.items()}
    assert launched == {
        "fresh prompt within the window": ["schedule", "project_window", "prefill"],
        "fresh prompt beyond the window": [
            "schedule", "project", "store_plan", "store_copy", "prefill", "store_window",
        ],
        "later chunk": [
            "schedule", "project", "store_plan", "store_copy", "prefill", "store_window",
        ],
        "fresh prompt within the window, 31 decodes": [
            "schedule", "project_window", "prefill", "decode",
        ],
        "32 decodes": ["schedule", "project_token", "decode"],
    }  # fmt: skip
    for row in rows.values():
        assert row["layer_us"] == pytest.approx(sum(row["parts_us"].values()), abs=0.1)
        # `op` is what is left of rounds that others were timed in: on a busy machine anything.
        rest = {name: us for name, us in row["parts_us"].items() if name != "op"}
        assert min(rest.values()) > 0 and "project" in rest and len(rest) < len(row["parts_us"])
