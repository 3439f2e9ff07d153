"""Through the front door: `vllm serve`, and `vllm bench serve` with random prompts.

    python benchmarks/bench_server.py --model /tmp/qwen3-8b --arms bf16,dms --pool-gib 106 \
        --input-len 8192 --output-len 256 --concurrency 1,32,64

A server per arm, and a client per concurrency. The workload is named after its lengths, as in
serve-8192-256; decode_tok_s is output tokens per second of the whole time, prefills included, and
mean_tpot_ms the time per token of a request after its first.
"""

import argparse
import json
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import serving_results as results
import serving_run
from bench_serving import (
    ARMS,
    GIB,
    Arm,
    add_report_options,
    engine_args,
    names_of,
    rising,
    start_report,
    with_results,
)
from serving_plan import FIGURES, Plan
from serving_process import end_on_signals, start_group, stop_group

CLI = (sys.executable, "-m", "vllm.entrypoints.cli.main")  # `vllm`, where that is not installed
STOP_SECONDS = 10  # kept back for the end of the server
LATENCIES = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms")
# Options that all parts of a run have in common.
COMMON = ("pool_gib", "input_len", "output_len", "rounds", "rate", "max_requests", "chunk", "dms",
          "eager", "seed")  # fmt: skip


def workload(options: argparse.Namespace) -> str:
    return f"serve-{options.input_len}-{options.output_len}"


def server_args(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """As in bench_serving, but for the lengths and the tokenizer: the client sends text."""
    plan = Plan(["prefill-8k"], [], 0, options.max_requests, options.chunk)
    args = engine_args(arm, options.model, plan, int(options.pool_gib * GIB), options)
    args["max_model_len"] = options.input_len + options.output_len + 64
    del args["skip_tokenizer_init"]
    return args


def serve_command(args: dict[str, Any], port: int) -> list[str]:
    command = [*CLI, "serve", args["model"], "--port", str(port)]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        elif name != "model":
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*command, "--served-model-name", "synthetic"]


def client_command(
    arm: Arm, options: argparse.Namespace, concurrency: int, result: Path
) -> list[str]:
    flags = {
        "backend": "vllm",
        "model": "synthetic",
        "tokenizer": options.model / arm.checkpoint,
        "port": options.port,
        "dataset-name": "random",
        "random-input-len": options.input_len,
        "random-output-len": options.output_len,
        "num-prompts": max(options.rounds * concurrency, 4),
        "max-concurrency": concurrency,
        "request-rate": options.rate,
        "temperature": 1.0,
        "seed": options.seed,
        "ready-check-timeout-sec": 60,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    command = [*CLI, "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return command


def ask(port: int, path: str, body: dict[str, Any] | None = None, seconds: float = 120) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urlopen(request, timeout=seconds) as response:
        return response.read().decode()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def check_port(port: int) -> None:
    """Whoever answers before the server is started would be measured in its place."""
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", port)) == 0:
            raise RuntimeError(f"port {port} is in use by another process: end it, or leave --port "
                               "away for a free one")  # fmt: skip


def wait_until_ready(server: subprocess.Popen, port: int, log: Path, deadline: float) -> None:
    while server.poll() is None and time.monotonic() < deadline:
        try:
            ask(port, "/health", seconds=5)
            return
        except OSError:  # nobody listens, or nobody answers
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {results.first_error(log)}")


def live(options: argparse.Namespace) -> dict[str, float | None]:
    """What the plugin reports of one prompt; a warm-up, too."""
    prompt = random.Random(options.seed).choices(range(100, 400), k=options.input_len)
    body = {"model": "synthetic", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}
    answer = json.loads(ask(options.port, "/v1/completions", body))
    report = (answer.get("kv_transfer_params") or {}).get("dms") or {}
    return {"live_compression": report.get("compression"), "live_tokens": report.get("live_tokens")}


def preemptions(port: int) -> int:
    """Since the server's start."""
    counts = re.findall(
        r"^vllm:num_preemptions_total\S* (\S+)$", ask(port, "/metrics"), re.MULTILINE
    )
    return int(sum(float(count) for count in counts))


def row_of(
    options: argparse.Namespace, concurrency: int, client: dict[str, Any], num_preemptions: int
) -> dict[str, Any]:
    """``client``: what `vllm bench serve` saved"""
    return {
        "workload": workload(options),
        **dict.fromkeys(FIGURES),
        "concurrency": concurrency,
        "decode_tok_s": client["output_throughput"],
        "preemptions": num_preemptions,
        "request_rate": options.rate,
        "completed": client["completed"],
        "seconds": round(client["duration"], 2),
        **{name: client.get(name) for name in LATENCIES},
    }


def run_arm(
    arm: Arm, args: dict[str, Any], name: str, options: argparse.Namespace, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yields what becomes known, as `serving_process.run_engine` does."""
    begin = time.monotonic()
    deadline = begin + seconds - STOP_SECONDS
    log = options.logs / f"{name}.log"
    command = serve_command(args, options.port)
    yield {"serve": shlex.join(command), "engine": {"pool_bytes": args["kv_cache_memory_bytes"]}}
    try:
        check_port(options.port)
    except RuntimeError as error:
        yield {"error": str(error)}
        return
    server = start_group(command, arm.dms is not None, log)
    try:
        wait_until_ready(server, options.port, log, deadline)
        yield {"startup_seconds": round(time.monotonic() - begin, 1)}
        kept, before = live(options), preemptions(options.port)
        for concurrency in options.concurrency:
            saved = options.logs / f"{name}-{concurrency}.json"
            client = client_command(arm, options, concurrency, saved)
            yield {f"client-{concurrency}": shlex.join(client)}
            client_log = saved.with_suffix(".log")
            with client_log.open("w") as file:
                ended = subprocess.run(client, stdout=file, stderr=subprocess.STDOUT, check=False,
                                       timeout=deadline - time.monotonic())  # fmt: skip
            if server.poll() is not None:
                raise RuntimeError(f"the server ended: {results.first_error(log)}")
            if ended.returncode:
                raise RuntimeError(f"the client failed: {results.first_error(client_log)}")
            after = preemptions(options.port)
            answer = json.loads(saved.read_text())
            if answer["failed"]:
                raise RuntimeError(f"{answer['failed']} requests failed: see {saved.stem}.log")
            yield {"row": row_of(options, concurrency, answer, after - before) | kept}
            before = after
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        yield {"error": str(error)[:400]}
    finally:
        stop_group(server)
    yield {"log": results.facts_of_log(log.read_text(errors="replace"))}


def run(options: argparse.Namespace) -> list[str]:
    """Returns what went wrong."""
    started = time.monotonic()
    new = [(arm, workload(options), [c]) for arm in options.arms for c in options.concurrency]
    report, errors = start_report(options, COMMON, new), []
    for left, arm_name in zip(range(len(options.arms), 0, -1), options.arms, strict=True):
        args = server_args(ARMS[arm_name], options)
        record = serving_run.new_engine(report, arm_name, "server", args)
        name = f"{report['run_id']}-{arm_name}-server"
        seconds = (options.seconds - (time.monotonic() - started)) / left
        updates = run_arm(ARMS[arm_name], args, name, options, seconds)
        errors.append(serving_run.keep(report, arm_name, record, updates, options.results))
    return [error for error in errors if error]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory made by synthetic.py")
    parser.add_argument("--arms", type=names_of(ARMS), default=["bf16", "dms"])
    parser.add_argument("--pool-gib", type=float, required=True, help="KV pool of every arm")
    parser.add_argument("--input-len", type=int, default=8192)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--concurrency", type=rising, default=[1, 32, 64])
    parser.add_argument("--rounds", type=int, default=2, help="prompts for each concurrent request")
    parser.add_argument("--rate", default="inf", help="requests per second")
    parser.add_argument("--max-requests", type=int, default=1024, help="max_num_seqs")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--dms", type=json.loads, default={}, help='"dms" of --additional-config')
    parser.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    parser.add_argument("--seconds", type=float, default=560, help="time for the whole run")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--port", type=int, help="default: a free one")
    add_report_options(parser)
    options = with_results(parser.parse_args(argv))
    options.port = options.port or free_port()
    return options


if __name__ == "__main__":
    end_on_signals()
    sys.exit("\n".join(run(parse_args())) or None)
