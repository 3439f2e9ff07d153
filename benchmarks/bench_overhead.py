"""Host time that DMS adds to a decode step, against stock vLLM: CPU time of the core's thread.

    python benchmarks/bench_overhead.py --running 16 128 512 > overhead.json
    python benchmarks/bench_overhead.py --engine --model /tmp/qwen3-8b --pool-gib 80 > engine.json

The first steps vLLM's scheduler by hand and needs no GPU (scheduler_overhead.py). The second runs
whole engines and also has the worker (engine_overhead.py).
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import serving_results as results
from bench_serving import ARMS, names_of
from serving_process import end_on_signals


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compression", type=float, default=8.0,
                        help="of tokens past the window; not with --engine")  # fmt: skip
    parser.add_argument("--commit", help="where there is no .git to ask")
    engine = parser.add_argument_group("with --engine")
    engine.add_argument("--engine", action="store_true", help="whole engines, worker included")
    engine.add_argument("--model", type=Path, help="made by synthetic.py, or a DMS checkpoint, "
                        "which the stock arm has with random weights")  # fmt: skip
    engine.add_argument("--arms", type=names_of(ARMS), default=["bf16", "dms"])
    engine.add_argument("--pool-gib", type=float, help="KV pool of every arm")
    engine.add_argument("--prompt", type=int, default=640, help="tokens, a multiple of 8")
    engine.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    engine.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    engine.add_argument("--dms", type=json.loads, default={}, help='"dms" of --additional-config')
    engine.add_argument("--seconds", type=float, default=300, help="time for all arms")
    engine.add_argument("--logs", type=Path, default=Path("/tmp/vllm-dms-bench"))
    options = parser.parse_args(argv)
    if options.engine and (options.model is None or options.pool_gib is None):
        parser.error("--engine needs --model and --pool-gib")
    return options


def main() -> None:
    end_on_signals()
    options = parse_args()
    certificate = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit or results.git_commit(Path(__file__).parent),
        "vllm": results.version_of("vllm"),
        "torch": results.version_of("torch"),
        "cpus": os.cpu_count(),
        "steps": options.steps,
    }
    if options.engine:
        import engine_overhead

        certificate |= results.gpu_facts()
        result = engine_overhead.measure_all(options)
    else:
        import scheduler_overhead

        rows = scheduler_overhead.measure_all(options.running, options.steps, options.compression)
        result = {"compression": options.compression, "rows": rows}
    print(json.dumps(certificate | result, indent=1))
    if any("error" in engine for engine in result.get("engines", {}).values()):
        sys.exit("an engine ended with an error: see it above")


if __name__ == "__main__":
    main()
