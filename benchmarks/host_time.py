"""Host time of a step: what the thread of the engine's core does for scheduler and worker.

The core runs in the process itself, so that its methods can be timed; nothing else differs from
serving. On a CPU the model itself is in the worker's time: there this is a rehearsal.
"""

import time
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

from driver import Driver
from record import Row
from steps import MIXED_TIMES, Plan

# Of vLLM's EngineCore: part, method. Each is called once per step, and `update` a step later.
METHODS = {
    "schedule": ("scheduler", "schedule"),
    "execute": ("model_executor", "execute_model"),
    "sample": ("model_executor", "sample_tokens"),
    "update": ("scheduler", "update_from_output"),
}
# A prompt that is read whole beside decodes.
MIXED_PROMPT, MIXED_DECODES = 1024, 31


class Clocks:
    """Microseconds of CPU time of this thread and of wall time, by step and method."""

    def __init__(self, core: Any) -> None:
        """``core``: vLLM's EngineCore, in this process"""
        self.steps: list[dict[str, Any]] = []  # "tokens" scheduled; a method: (CPU, wall)
        self.of_output: dict[int, dict[str, Any]] = {}  # steps whose update is still to come
        for name, (part, method) in METHODS.items():
            owner = getattr(core, part)
            setattr(owner, method, self.timed(name, getattr(owner, method)))

    def timed(self, name: str, inner: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = inner(*args, **kwargs)
            spent = time.thread_time() - cpu, time.perf_counter() - wall
            if name == "schedule":
                self.steps.append({"tokens": result.total_num_scheduled_tokens})
                self.of_output[id(result)] = self.steps[-1]
            step = self.of_output.pop(id(args[0])) if name == "update" else self.steps[-1]
            step[name] = tuple(1e6 * seconds for seconds in spent)
            return result

        return call

    def figures(self, first: int, tokens: int) -> Row:
        """Of the steps from ``first`` on with so many tokens. Means of CPU time, which are right
        even where that clock is coarse; medians of wall time."""
        steps = [s for s in self.steps[first:] if s["tokens"] == tokens and "update" in s]
        cpu = {name: round(mean(s[name][0] for s in steps), 1) for name in METHODS}
        wall = {name: round(median(s[name][1] for s in steps), 1) for name in METHODS}
        host = {"host_cpu_ms": sum(cpu.values()) / 1000, "host_wall_ms": sum(wall.values()) / 1000}
        return {**host, "cpu_us": cpu, "wall_us": wall, "num_steps": len(steps)}


def host_rows(driver: Driver, plan: Plan) -> Iterator[Row]:
    clocks = Clocks(driver.engine.engine_core.engine_core)
    if "host-mixed" in plan.workloads:
        driver.admit(MIXED_DECODES, plan.prompt_len, plan.output_limit)
        first, prompt = len(clocks.steps), MIXED_PROMPT // plan.scale
        for _ in range(MIXED_TIMES):
            driver.submit(1, prompt, 1)
            driver.run_quiet(2, settle=0)
        row = {"workload": "host-mixed", "concurrency": MIXED_DECODES}
        yield row | clocks.figures(first, prompt + MIXED_DECODES)
        driver.abort(list(driver.generated))
    if "host-decode" in plan.workloads:
        for level in plan.levels:
            driver.admit(level, plan.prompt_len, plan.output_limit)
            first = len(clocks.steps)
            row = {"workload": "host-decode", "concurrency": level}
            yield row | driver.run_quiet(plan.num_steps) | clocks.figures(first, level)
