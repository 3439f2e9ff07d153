"""What one step of a served model consists of: host time, launches, GPU time by kernel, gaps.

    python benchmarks/synthetic.py Qwen3-8B --layers 12 --out /tmp/qwen3-8b-12
    python benchmarks/profile_step.py --model /tmp/qwen3-8b-12 --pool-gib 20 --out /tmp/profile

An engine per arm, in a process of its own, with the core in it (as `host_time`). Ten prompts, one
after the other, show what the first ones wait for. Then steps: one prompt of 1,024 beside 31
requests that decode at about 1,200 tokens, and 1, 8, 32 requests that decode. Host time is of steps
that run as in serving. Kernels are of such steps run by themselves, the GPU idle before and after,
under the profiler: `span` is from the first one's start to the last one's end, `idle` what none
covers.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import processes
from arms import ARMS, engine_args
from bench_serving import names_of
from certificate import certificate, command_and_date
from record import Row

PROMPT, BESIDE, CONTEXT, LEVELS = 1024, 31, 1200, (1, 8, 32)  # tokens, requests, tokens, requests
TIMES = 8  # steps of a kind, timed and profiled
GROUPS = (  # of kernels by name: the first that matches
    ("dms", r"^((?:store|prefill|decode|merge|schedule|report|alpha)\w*kernel)"),
    ("attention", r"(?i)(flash|fmha|attn_fwd)"),
    ("cache store", r"reshape_and_cache"),
    ("matrix products", r"(?i)(gemm|nvjet|cutlass|cublas|splitk|xmma)"),
    ("inductor", r"^triton_"),
    ("copies", r"(?i)(memcpy|memset)"),
)
LAUNCH = re.compile(r"^cu(da)?(LaunchKernel|GraphLaunch)")


def group_of(kernel: str) -> str:
    for name, pattern in GROUPS:
        if found := re.search(pattern, kernel):
            return found[1] if name == "dms" else name
    return "others"


def row_of(events: list[Any]) -> Row:
    """Of one step's events, in microseconds."""
    launches = sum(bool(LAUNCH.match(event.name())) for event in events)
    device = [event for event in events if event.device_type().name == "CUDA"]
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in device)
    groups, counts, busy, end = Counter(), Counter(), 0, spans[0][0]
    for event in device:
        groups[group_of(event.name())] += event.duration_ns() / 1000
        counts[group_of(event.name())] += 1
    for first, last in spans:
        busy += max(last - max(first, end), 0)
        end = max(end, last)
    span = end - spans[0][0]
    row = {"launches": launches, "kernels": len(device), "span_us": span / 1000}
    row |= {"busy_us": busy / 1000, "idle_us": (span - busy) / 1000}
    return row | {"groups_us": dict(groups), "groups": dict(counts)}


class Profiled:
    """Runs steps with a number of tokens by themselves, under the profiler."""

    def __init__(self, executor: Any) -> None:
        self.tokens, self.rows, self.profiler = 0, [], None
        self.inner = executor.execute_model, executor.sample_tokens
        executor.execute_model, executor.sample_tokens = self.execute, self.sample

    def execute(self, scheduled: Any, **kwargs: Any) -> Any:
        import torch

        if scheduled.total_num_scheduled_tokens == self.tokens and len(self.rows) < TIMES:
            torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            )
            self.profiler.start()
        return self.inner[0](scheduled, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        result = self.inner[1](*args, **kwargs)
        if self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.stop()
            self.rows.append(row_of(self.profiler.profiler.kineto_results.events()))
            self.profiler = None
        return result

    def figures(self) -> Row:
        """The step of median span, the first left out: the profiler starts up in it."""
        rows = sorted(self.rows[1:], key=lambda row: row["span_us"])
        return rows[len(rows) // 2]


def measure(driver: Any, clocks: Any, profiled: Profiled) -> list[Row]:
    from host_time import METHODS

    waits = []
    for _ in range(10):
        start = time.perf_counter()
        driver.submit(1, PROMPT, 1)
        driver.run_until(lambda: not driver.generated)
        waits.append(1000 * (time.perf_counter() - start))
    rows = [{"step": "first requests", "ttft_ms": waits, "first_over_tenth": waits[0] / waits[9]}]

    def step_of(name: str, tokens: int, prompts: int) -> None:
        first = len(clocks.steps)
        for kind in (0, tokens):  # unprofiled, profiled
            profiled.tokens, profiled.rows = kind, []
            for _ in range(TIMES + 1 if prompts or kind else 40):
                driver.submit(prompts, PROMPT, 1)
                driver.run_quiet(2, settle=0)
            if not kind:
                steps = [s for s in clocks.steps[first:] if s["tokens"] == tokens]
                steps = [s for s in steps[1:] if all(name in s for name in METHODS)]
                host = [sum(s[name][1] for name in METHODS) for s in steps]
                own = {name: median(s[name][1] for s in steps) for name in METHODS}
        rows.append({"step": name, "host_us": median(host), "host_us_of": own})
        rows[-1] |= profiled.figures()

    for level in LEVELS:
        if level > BESIDE:
            driver.admit(BESIDE, CONTEXT, 4000)
            step_of(f"{PROMPT} + {BESIDE}", PROMPT + BESIDE, 1)
        driver.admit(level, CONTEXT, 4000)
        step_of(f"{level} decode", level, 0)
    return rows


def run_engine(spec: dict[str, Any]) -> None:
    """The process of an arm."""
    from driver import Driver
    from host_time import Clocks
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    start = time.perf_counter()
    args = EngineArgs(**spec["engine"], skip_tokenizer_init=True, disable_log_stats=False)
    engine = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
    ready = time.perf_counter() - start
    core = engine.engine_core.engine_core
    clocks, profiled = Clocks(core), Profiled(core.model_executor)
    driver = Driver(engine, engine.model_config.get_vocab_size(), 0)
    rows = [{"step": "start", "seconds": ready}, *measure(driver, clocks, profiled)]
    Path(spec["to"]).write_text(json.dumps(rows))


def table(rows: list[Row]) -> str:
    """Markdown: a line for each step and arm, and the groups that take the most."""
    lines = ["| step | arm | host, us | launches | kernels | span, us | idle, us | GPU time, us |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    steps = defaultdict(list)
    for row in rows:
        steps[row["step"]].append(row)
    for row in (row for members in steps.values() for row in members if "span_us" in row):
        groups = sorted(row["groups_us"].items(), key=lambda pair: -pair[1])
        text = ", ".join(f"{name} {us:,.0f} ({row['groups'][name]})" for name, us in groups)
        numbers = [row[k] for k in ("host_us", "launches", "kernels", "span_us", "idle_us")]
        line = " | ".join(f"{number:,.0f}" for number in numbers)
        lines.append(f"| {row['step']} | {row['arm']} | {line} | {text} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory made by synthetic.py")
    add("--out", type=Path, required=True, help="directory of the run")
    add("--pool-gib", type=float, required=True, help="KV pool of every arm")
    add("--arms", type=names_of(ARMS), default=["bf16", "fp8", "dms", "dms_fp8"])
    add("--seconds", type=float, default=460, help="time for the whole command")
    add("--commit", help="where there is no .git to ask")
    options = parser.parse_args()
    options.chunk, options.eager, options.dms = 8192, False, {}
    options.quantization = None
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    report: Row = {**command_and_date(), **certificate(options.commit), "rows": []}
    report["model"] = json.loads((options.model / "dms" / "synthetic.json").read_text())
    for name in options.arms:
        limits = {"max_model_len": 16384, "jit_monitor_verbose": True}
        to, log = options.out / f"{name}.json", options.out / f"{name}.log"
        spec = {"engine": engine_args(ARMS[name], options, limits), "to": str(to)}
        command = [sys.executable, __file__, "--engine", json.dumps(spec)]
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        try:
            processes.run(ARMS[name], command, log, deadline, **env)
        except processes.RunError as error:
            print(name, error, flush=True)
            continue
        compiled = re.findall(r"compilation during inference: (\w+)", log.read_text())
        rows = [*json.loads(to.read_text()), {"step": "compiled in serving", "kernels": compiled}]
        report["rows"] += [{"arm": name, **row} for row in rows]
        (options.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    for row in report["rows"]:
        if "span_us" not in row:
            print({k: v for k, v in row.items() if k != "ttft_ms"})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        run_engine(json.loads(sys.argv[2]))
    else:
        main()
