"""Serving benchmark: vLLM's own caches and DMS, on the same weights, pool and requests.

    python benchmarks/synthetic.py Qwen3-8B --out /tmp/qwen3-8b
    python benchmarks/bench_serving.py --model /tmp/qwen3-8b --arms bf16,dms --pool-gib 110

Each arm is a process of its own (`--worker`), so that none sees another's CUDA context. Results
are written after every measurement: RESULTS/<run_id>.json, and RESULTS/summary.json with the latest
run of every workload. README.md beside this says what the workloads are.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import serving_results as results
from serving_workloads import WORKLOADS, Plan

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
SHUTDOWN_SECONDS = 15
FULL_REASON_REQUESTS = 256
# vLLM captures graphs up to 512 requests. More are run here, so all arms get these as well.
WIDE_BATCHES = range(576, 1025, 64)


@dataclass(frozen=True)
class Arm:
    checkpoint: str  # subdirectory of what synthetic.py made
    kv_cache_dtype: str
    dms: dict[str, Any] | None = None  # "dms" of --additional-config; None: without the plugin


ARMS = {
    "bf16": Arm("dense", "auto"),
    "fp8": Arm("dense", "fp8"),
    "dms_noevict": Arm("dms", "dms", {"evict": False}),
    "dms": Arm("dms", "dms", {}),
    "dms_fp8": Arm("dms", "dms_fp8", {}),
}


def capture_sizes(max_num_seqs: int) -> list[int]:
    """vLLM's own list, continued beyond 512."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *WIDE_BATCHES]
    return sorted({*(s for s in sizes if s < max_num_seqs), min(max_num_seqs, sizes[-1])})


def engine_args(arm: Arm, model: Path, plan: Plan, pool_bytes: int, options: argparse.Namespace):
    """Keyword arguments of EngineArgs; what is not here is vLLM's default."""
    args: dict[str, Any] = {
        "model": str(model / arm.checkpoint),
        "dtype": "bfloat16",
        "kv_cache_dtype": arm.kv_cache_dtype,
        "kv_cache_memory_bytes": pool_bytes,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_requests,
        "max_num_batched_tokens": plan.chunk,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if options.eager:
        args["enforce_eager"] = True
    else:
        sizes = capture_sizes(plan.max_requests)
        args["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if arm.dms is not None:
        args["additional_config"] = {"dms": {**options.dms, **arm.dms}}
    return args


def plans(options: argparse.Namespace) -> list[tuple[str, Plan, int]]:
    """(name, plan, pool bytes) of the engines that the chosen workloads need."""
    base = Plan(
        workloads=[],
        levels=options.levels,
        window_steps=options.steps,
        max_requests=options.max_requests,
        chunk=options.chunk,
        unit=options.unit,
    )
    pool = int(options.pool_gib * GIB)
    long = [w for w in options.workloads if w in ("prefill-32k", "prefill-128k")]
    short = [w for w in options.workloads if w not in (*long, "reason-1k-8k")]
    if options.one_engine and short:
        short, long = short + long, []
    chosen = []
    if short:
        chosen.append(("8k", replace(base, workloads=short), pool))
    if long:
        chosen.append(("long", replace(base, workloads=long, max_requests=8), pool))
    if "reason-1k-8k" in options.workloads:
        n = options.reason_requests
        plan = replace(base, workloads=["reason-1k-8k"], max_requests=n, reason_requests=n)
        chosen.append(("reason", plan, pool * n // FULL_REASON_REQUESTS))
    return chosen


def run_engine(name: str, spec: dict[str, Any], plugin: bool, logs: Path, seconds: float):
    """Runs one arm's engine in a child; yields what it writes, as it appears."""
    records, log = logs / f"{name}.jsonl", logs / f"{name}.log"
    records.write_text("")
    spec |= {"records": str(records), "seconds": seconds - SHUTDOWN_SECONDS}
    deadline = time.monotonic() + seconds
    child = start_group([sys.executable, __file__, "--worker", json.dumps(spec)], plugin, log)
    with records.open() as reader:
        try:
            while True:
                code = child.poll()
                lines = [json.loads(line) for line in reader]
                yield from lines
                if any("end" in line for line in lines):
                    break
                if code is not None:
                    yield {"error": f"exit code {code}: {results.first_error(log)}"}
                    break
                if time.monotonic() > deadline:
                    yield {"error": "killed: it did not end in time"}
                    break
                time.sleep(0.5)
        finally:
            stop_group(child)
    yield {"log": results.facts_of_log(log.read_text(errors="replace"))}


def start_group(command: list[str], plugin: bool, log: Path) -> subprocess.Popen:
    """A process group of its own. Stock arms run without the plugin: "" allows none at all."""
    env = os.environ | {"VLLM_PLUGINS": "dms" if plugin else ""}
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop_group(child: subprocess.Popen) -> None:
    """End the child and the engine core that it started."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)


def work(spec: dict[str, Any]) -> None:
    """The child: one engine, all workloads of its plan."""
    start = time.monotonic()
    records = Path(spec["records"])

    def write(record: dict[str, Any]) -> None:
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")

    from serving_driver import Driver, OutOfTimeError
    from serving_workloads import Bench
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(**spec["engine"], disable_log_stats=False)
    engine = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
    facts = results.facts_of_engine(engine.vllm_config)
    write({"engine": facts | {"startup_seconds": round(time.monotonic() - start, 1)}})
    vocab_size = engine.model_config.get_vocab_size()
    driver = Driver(engine, vocab_size, spec["seed"], deadline=start + spec["seconds"])
    bench = Bench(driver, Plan(**spec["plan"]), facts["pool_tokens"])
    try:
        for row in bench.run():
            write({"row": row})
    except OutOfTimeError:
        write({"error": "out of time: the workloads that are missing were not measured"})
    write({"end": {"seconds": round(time.monotonic() - start, 1), **results.gpu_memory()}})


def run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    report = results.new_report(options.run_id, options.commit, options.model)
    options.results.mkdir(parents=True, exist_ok=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    engines = [(*plan, arm) for plan in plans(options) for arm in options.arms]
    for left, (group, plan, pool, arm_name) in zip(
        range(len(engines), 0, -1), engines, strict=True
    ):
        arm = ARMS[arm_name]
        args = engine_args(arm, options.model, plan, pool, options)
        spec = {"engine": args, "plan": asdict(plan), "seed": options.seed}
        record = report["arms"].setdefault(arm_name, {})[group] = {"args": args}
        remaining = options.seconds - (time.monotonic() - started)
        name, seconds = f"{report['run_id']}-{arm_name}-{group}", remaining / left
        for update in run_engine(name, spec, arm.dms is not None, options.logs, seconds):
            if "row" in update:
                report["rows"].append(results.full_row(report, arm_name, group, update["row"]))
                print(results.one_line(report["rows"][-1]), flush=True)
            else:
                record.update(update)
                print(f"{arm_name} {group} {json.dumps(update)[:400]}", flush=True)
            results.write_json(options.results / f"{report['run_id']}.json", report)
        results.update_summary(options.results / "summary.json", report["rows"])


def names_of(choices) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(choices))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(choices)}")
        return names

    return parse


def integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory made by synthetic.py")
    parser.add_argument("--arms", type=names_of(ARMS), default=list(ARMS))
    parser.add_argument("--workloads", type=names_of(WORKLOADS), default=list(WORKLOADS[:4]))
    parser.add_argument("--levels", type=integers, default=[1, 8, 32, 64],
                        help="concurrency of decode-8k, rising")  # fmt: skip
    parser.add_argument("--pool-gib", type=float, required=True, help="KV pool of every arm")
    parser.add_argument("--max-requests", type=int, default=1024, help="max_num_seqs")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens; the "
                        "default is that of vllm serve on an H200")  # fmt: skip
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a measurement")
    parser.add_argument("--reason-requests", type=int, default=64, help="requests of reason-1k-8k; "
                        "the pool is scaled alike: --pool-gib is for 256")  # fmt: skip
    parser.add_argument("--one-engine", action="store_true",
                        help="long prompts in the engine of the 8k workloads")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=560, help="time for the whole run")
    parser.add_argument("--dms", type=json.loads, default={}, help='"dms" of --additional-config')
    parser.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    parser.add_argument("--unit", type=int, default=1024, help='tokens in a "k"; for rehearsals')
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--run-id")
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/vllm-dms-bench"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        run(parse_args())
