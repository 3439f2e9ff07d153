"""One arm through the front door: `vllm serve`, and `vllm bench serve` with random prompts.

    python benchmarks/bench_server.py --model /tmp/qwen3-8b --arm dms --pool-gib 110 \
        --input-len 1024 --output-len 512 --concurrency 64 --num-prompts 256

Arms of one comparison get the same --run-id, so that their rows stay together in the summary. The
workload is named after its lengths, as in serve-1024-512; decode_tok_s is output tokens per second
of the whole run, prefills included.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import serving_results as results
from bench_serving import ARMS, GIB, HERE, Arm, engine_args, start_group, stop_group
from serving_workloads import FIGURES, Plan

CLI = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def serve_command(arm: Arm, options: argparse.Namespace) -> list[str]:
    plan = Plan(
        workloads=["prefill-8k"],
        levels=[],
        window_steps=0,
        max_requests=options.max_requests,
        chunk=options.chunk,
    )
    args = engine_args(arm, options.model, plan, int(options.pool_gib * GIB), options)
    args["max_model_len"] = options.input_len + options.output_len + 64
    del args["skip_tokenizer_init"]  # the client sends text
    command = [*CLI, "serve", args.pop("model"), "--port", str(options.port)]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*command, "--served-model-name", "synthetic"]


def client_command(arm: Arm, options: argparse.Namespace, result: Path) -> list[str]:
    model = str(options.model / arm.checkpoint)
    flags = {
        "backend": "vllm",
        "model": "synthetic",
        "tokenizer": model,
        "port": options.port,
        "dataset-name": "random",
        "random-input-len": options.input_len,
        "random-output-len": options.output_len,
        "num-prompts": options.num_prompts,
        "max-concurrency": options.concurrency,
        "request-rate": options.rate,
        "temperature": 1.0,
        "seed": options.seed,
        "ready-check-timeout-sec": 300,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    command = [*CLI, "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return command


def preemptions(port: int) -> int:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    counts = re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", text, re.MULTILINE)
    return int(sum(float(count) for count in counts))


def row_of(options: argparse.Namespace, client: dict[str, Any], compression: str) -> dict[str, Any]:
    """``client``: what `vllm bench serve` saved; ``compression``: the server's last line on it"""
    found = re.search(r"live compression ([\d.]+)x", compression)
    latencies = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms")
    return {
        "workload": f"serve-{options.input_len}-{options.output_len}",
        **dict.fromkeys(FIGURES),
        "concurrency": options.concurrency,
        "decode_tok_s": client["output_throughput"],
        "live_compression": float(found.group(1)) if found else None,
        "request_rate": options.rate,
        "completed": client["completed"],
        **{name: client.get(name) for name in latencies},
    }


def run(options: argparse.Namespace) -> None:
    report = results.new_report(options.run_id, options.commit, options.model)
    options.results.mkdir(parents=True, exist_ok=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    arm, name = ARMS[options.arm], f"{report['run_id']}-{options.arm}-server"
    saved, log = options.logs / f"{name}.json", options.logs / f"{name}.log"
    serve, client = serve_command(arm, options), client_command(arm, options, saved)
    deadline = time.monotonic() + options.seconds
    server = start_group(serve, arm.dms is not None, log)
    try:
        with (options.logs / f"{name}-client.log").open("w") as file:
            left = deadline - time.monotonic()
            subprocess.run(client, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=True)
        num_preemptions = preemptions(options.port)
    finally:
        stop_group(server)
    facts = results.facts_of_log(log.read_text(errors="replace"))
    row = row_of(options, json.loads(saved.read_text()), " ".join(facts["compression"]))
    row["preemptions"] = num_preemptions
    engine = {"pool_bytes": int(options.pool_gib * GIB)}
    commands = {"serve": shlex.join(serve), "client": shlex.join(client)}
    report["arms"][options.arm] = {"server": {"engine": engine, "log": facts, **commands}}
    report["rows"].append(results.full_row(report, options.arm, "server", row))
    print(results.one_line(report["rows"][0]))
    results.write_json(options.results / f"{name}.json", report)
    results.update_summary(options.results / "summary.json", report["rows"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory made by synthetic.py")
    parser.add_argument("--arm", choices=tuple(ARMS), required=True)
    parser.add_argument("--pool-gib", type=float, required=True)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rate", default="inf", help="requests per second")
    parser.add_argument("--max-requests", type=int, default=1024, help="max_num_seqs")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--dms", type=json.loads, default={}, help='"dms" of --additional-config')
    parser.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--run-id")
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/vllm-dms-bench"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(parse_args())
