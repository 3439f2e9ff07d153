"""Serving benchmark: vLLM's own caches and DMS, on the same weights, pool and requests.

    python benchmarks/synthetic.py Qwen3-8B --out /tmp/qwen3-8b
    python benchmarks/bench_serving.py --model /tmp/qwen3-8b --arms bf16,dms --pool-gib 110

Results are written after every measurement: RESULTS/<run_id>.json, and RESULTS/summary.json with
the latest run of every workload. README.md beside this says what the workloads are.
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import serving_run
from serving_plan import WORKLOADS, Plan
from serving_process import end_on_signals, run_engine

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
FULL_REASON_REQUESTS = 256
# Options that all parts of a run have in common.
COMMON = ("pool_gib", "levels", "max_requests", "chunk", "steps", "reason_requests", "one_engine",
          "dms", "eager", "unit", "seed")  # fmt: skip
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


def start_report(
    options: argparse.Namespace, common: tuple[str, ...], new: list[serving_run.Series]
) -> dict[str, Any]:
    """A new run, or the next part of one; ``new``: what it is going to measure."""
    settings = {name: vars(options)[name] for name in common}
    report = serving_run.new_report(options.run_id, options.commit, options.model, settings)
    if options.earlier:
        report = serving_run.continued(options.earlier, report, new)
    options.results.mkdir(parents=True, exist_ok=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    return report


def run(options: argparse.Namespace) -> list[str]:
    """Returns what went wrong."""
    started = time.monotonic()
    levels = {"decode-8k": options.levels}
    new = [(arm, w, levels.get(w, [])) for arm in options.arms for w in options.workloads]
    report, errors = start_report(options, COMMON, new), []
    engines = [(*plan, arm) for plan in plans(options) for arm in options.arms]
    for left, (group, plan, pool, arm_name) in zip(
        range(len(engines), 0, -1), engines, strict=True
    ):
        arm = ARMS[arm_name]
        args = engine_args(arm, options.model, plan, pool, options)
        record = serving_run.new_engine(report, arm_name, group, args)
        spec = {
            "engine": args,
            "measure": "serving_workloads",
            "plan": asdict(plan),
            "seed": options.seed,
        }
        remaining = options.seconds - (time.monotonic() - started)
        name, seconds = f"{report['run_id']}-{arm_name}-{group}", remaining / left
        updates = run_engine(name, spec, arm.dms is not None, options.logs, seconds)
        errors.append(serving_run.keep(report, arm_name, record, updates, options.results))
    return [error for error in errors if error]


def names_of(choices) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(choices))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(choices)}")
        return names

    return parse


def rising(text: str) -> list[int]:
    numbers = [int(n) for n in text.split(",")]
    if numbers[0] < 1 or any(b <= a for a, b in itertools.pairwise(numbers)):
        raise argparse.ArgumentTypeError(f"{text}: numbers from 1 on, each above the one before")
    return numbers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory made by synthetic.py")
    parser.add_argument("--arms", type=names_of(ARMS), default=list(ARMS))
    parser.add_argument("--workloads", type=names_of(WORKLOADS), default=list(WORKLOADS[:4]))
    parser.add_argument("--levels", type=rising, default=[1, 8, 32, 64],
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
    add_report_options(parser)
    return with_results(parser.parse_args(argv))


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Where a run comes from, and where it goes."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run-id", help="default: the time")
    which.add_argument("--continue", dest="earlier", type=Path, metavar="RUN_ID.json", help="add "
                       "arms or workloads to this run, on the same machine")  # fmt: skip
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--results", type=Path, help="directory; default: that of the run which is "
                        "continued, else results/ here")  # fmt: skip
    parser.add_argument("--logs", type=Path, default=Path("/tmp/vllm-dms-bench"))


def with_results(options: argparse.Namespace) -> argparse.Namespace:
    if options.results is None:
        options.results = options.earlier.parent if options.earlier else HERE / "results"
    return options


if __name__ == "__main__":
    end_on_signals()
    sys.exit("\n".join(run(parse_args())) or None)
