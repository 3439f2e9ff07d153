"""Host time of a decode step in a whole engine: what the core's thread does for scheduler and
worker, in stock vLLM and with DMS.

The core runs in the child process itself instead of one of its own, so that its methods can be
timed; nothing else differs from serving: asynchronous scheduling, full CUDA graphs, the production
model runner. A measurement is a stretch of steps in which the same requests all decode. `host` is
scheduler and worker; the rest of a `step` is waiting for results and handing them over. On a CPU
the model itself is in the worker's time: there this is a rehearsal.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import mean, median
from typing import Any

import serving_results as results
from bench_serving import ARMS, GIB, Arm, engine_args
from report import PAIRS
from serving_plan import Plan
from serving_process import run_engine

# Of vLLM's EngineCore: (attribute, or itself, method). Each is called once per step.
METHODS = {
    "schedule": ("scheduler", "schedule"),
    "execute": ("model_executor", "execute_model"),
    "sample": ("model_executor", "sample_tokens"),
    "update": ("scheduler", "update_from_output"),
    "step": ("", "step_fn"),
}
SUMS = {
    "scheduler": ("schedule", "update"),
    "worker": ("execute", "sample"),
    "host": ("schedule", "execute", "sample", "update"),
}
STATISTICS = ("cpu_us", "mean_cpu_us", "wall_us")


class Clocks:
    """What calls take: CPU time of this thread and wall time, in microseconds."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """``owner``: an object, or a class"""
        inner: Callable = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = inner(*args, **kwargs)
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            self.calls[name].append((cpu * 1e6, wall * 1e6))
            return result

        setattr(owner, method, timed)

    def last(self, name: str, count: int, clock: int) -> list[float]:
        """Of the last ``count`` calls; zeros if there were fewer. ``clock`` 0: CPU, 1: wall"""
        calls = self.calls[name][-count:]
        return [call[clock] for call in calls] if len(calls) == count else [0.0] * count

    def figures(self, steps: int) -> dict[str, Any]:
        """Medians; the mean has what rarer steps cost, and is right if the CPU clock is coarse."""
        figures: dict[str, Any] = {"cpu_clock_us": round(clock_step_us(), 3)}
        for statistic, clock in zip(STATISTICS, (0, 0, 1), strict=True):
            typical = mean if statistic.startswith("mean") else median
            times = {name: self.last(name, steps, clock) for name in list(self.calls)}
            for name, parts in SUMS.items():
                times[name] = [sum(of) for of in zip(*(times[p] for p in parts), strict=True)]
            figures[statistic] = {n: round(typical(t), 1) for n, t in times.items()}
        return figures


def clock_step_us() -> float:
    """The CPU clock's step: some machines count a thread's time in ticks of milliseconds."""
    start = now = time.thread_time()
    while now == start:
        now = time.thread_time()
    return (now - start) * 1e6


def watch_engine(core: Any, dms: bool) -> Clocks:
    """``core``: vLLM's EngineCore, in this process"""
    clocks = Clocks()
    for name, (part, method) in METHODS.items():
        clocks.watch(getattr(core, part) if part else core, method, name)
    if dms:
        from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

        from vllm_dms.backend.attention import DMSMetadataBuilder
        from vllm_dms.connector import DMSConnector
        from vllm_dms.core.ledger import Ledger

        # What of the worker's and the scheduler's time is the plugin's own.
        clocks.watch(ActiveKVConnector, "pre_forward", "dms_before")
        clocks.watch(ActiveKVConnector, "post_forward", "dms_after")
        clocks.watch(DMSMetadataBuilder, "build", "dms_metadata")
        clocks.watch(DMSConnector, "start_load_kv", "dms_block_rows")
        clocks.watch(DMSConnector, "build_connector_worker_meta", "dms_report")
        clocks.watch(DMSConnector, "build_connector_meta", "dms_step_meta")
        clocks.watch(DMSConnector, "update_connector_output", "dms_merge")
        clocks.watch(Ledger, "merge", "dms_ledger")
    return clocks


def measure(driver: Any, plan: dict[str, Any], facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `serving_process` runs in the child."""
    from serving_workloads import Bench

    dms = plan.pop("dms")
    bench = Bench(driver, Plan(**plan), facts["pool_tokens"])
    core = driver.engine.engine_core.engine_core
    clocks = watch_engine(core, dms)
    for level in bench.plan.levels:
        if not bench.admit(level):
            raise ValueError(f"the pool does not hold {level} requests: raise --pool-gib")
        driver.run_quiet(bench.plan.window_steps)
        figures = clocks.figures(bench.plan.window_steps)
        yield {"running": level, "context": round(driver.context(), 1), **figures}


def arm_args(arm: Arm, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """As in bench_serving; graphs of the batches that are measured and no others."""
    args = engine_args(arm, options.model, plan, int(options.pool_gib * GIB), options)
    if not options.eager:
        args["compilation_config"] = {"cudagraph_capture_sizes": sorted(options.running)}
    if not (options.model / arm.checkpoint).is_dir():
        args["model"] = str(options.model)
        if arm.dms is None:
            config = json.loads((options.model / "config.json").read_text())
            published = [name.removesuffix("DMS") for name in config["architectures"]]
            args |= {"hf_overrides": {"architectures": published}, "load_format": "dummy"}
    return args


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    plan = Plan(
        workloads=["decode-8k"],  # in units of an eighth of the prompt
        levels=sorted(options.running),
        window_steps=options.steps,
        max_requests=max(options.running),
        chunk=options.chunk,
        unit=options.prompt // 8,
    )
    options.logs.mkdir(parents=True, exist_ok=True)
    engines: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for left, name in zip(range(len(options.arms), 0, -1), options.arms, strict=True):
        arm = ARMS[name]
        args, dms = arm_args(arm, plan, options), arm.dms is not None
        spec = {"engine": args, "measure": "engine_overhead", "in_process": True, "seed": 0}
        spec["plan"] = asdict(plan) | {"dms": dms}
        record = engines[name] = {"args": args}
        rows[name] = {}
        seconds = (options.seconds - (time.monotonic() - started)) / left
        for update in run_engine(f"overhead-{name}", spec, dms, options.logs, seconds):
            if "row" in update:
                rows[name][update["row"]["running"]] = update["row"]
            else:
                record.update(update)
            print(f"{name} {json.dumps(update)[:400]}", file=sys.stderr, flush=True)
    return {
        "model": {k: v for k, v in results.model_facts(options.model).items() if k != "keep"},
        "engines": engines,
        "rows": [{"arm": name} | row for name, of_arm in rows.items() for row in of_arm.values()],
        "added": added(rows),
    }


def added(rows: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the DMS arm takes more than the stock arm, for each number of requests."""
    differences = []
    for stock, dms in PAIRS:
        for running in sorted(rows.get(stock, {}).keys() & rows.get(dms, {}).keys()):
            old, new = rows[stock][running], rows[dms][running]
            more = {
                s: {name: round(new[s][name] - time_us, 1) for name, time_us in old[s].items()}
                for s in STATISTICS
            }
            differences.append({"arms": [stock, dms], "running": running} | more)
    return differences
