"""Engines that the benchmarks start: through vLLM's own server and client, in whole rehearsals, and
with clocks around their steps."""

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_overhead
import bench_server
import bench_serving
import engine_overhead
import synthetic
from shapes import SHAPES

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip


def server_options(*flags):
    return bench_server.parse_args(["--model", "/m", "--pool-gib", "2", *flags])


@pytest.mark.parametrize("arm", ["fp8", "dms"])
def test_the_server_and_its_client_are_started_with_vllms_own_flags(arm):
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    chosen, arm = server_options(), bench_serving.ARMS[arm]
    serve = bench_server.serve_command(bench_server.server_args(arm, chosen), 80)
    assert serve[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    flags = serve[4:]
    if arm.dms is not None:  # the flag's choices need the plugin
        flags[flags.index("--kv-cache-dtype") + 1] = "auto"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    assert parsed.kv_cache_memory_bytes == 2 << 30 and parsed.enable_prefix_caching is False
    assert parsed.max_model_len == 8192 + 256 + 64 and parsed.port == 80
    client = bench_server.client_command(arm, chosen, 32, Path("/r/x.json"))
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(client[client.index("bench") + 2 :])
    assert parsed.random_output_len == 256 and parsed.max_concurrency == 32 and parsed.ignore_eos
    assert parsed.num_prompts == 64


def test_a_server_that_does_not_start_says_why(monkeypatch, tmp_path):
    broken = [sys.executable, "-c", "raise ValueError('no such flag')"]
    monkeypatch.setattr(bench_server, "serve_command", lambda args, port: broken)
    chosen = server_options("--logs", str(tmp_path), "--port", "9")
    args = {"kv_cache_memory_bytes": 1}
    *_, error, log = bench_server.run_arm(bench_serving.ARMS["bf16"], args, "x", chosen, 60)
    assert "did not start: ValueError: no such flag" in error["error"] and "log" in log


def test_another_server_on_the_port_is_not_measured(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        chosen = server_options("--logs", str(tmp_path), "--port", str(port))
        args = {"model": "m", "kv_cache_memory_bytes": 1}
        *_, last = bench_server.run_arm(bench_serving.ARMS["bf16"], args, "x", chosen, 60)
    assert f"port {port} is in use by another process" in last["error"]


def test_host_times_are_those_of_the_last_steps(monkeypatch):
    now = iter(range(1000))
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: next(now) * 1e-6)
    methods = engine_overhead.METHODS.values()
    part = SimpleNamespace(**dict.fromkeys([method for _, method in methods], lambda: None))
    core = SimpleNamespace(scheduler=part, model_executor=part, step_fn=lambda: None)
    clocks = engine_overhead.watch_engine(core, dms=False)
    for _ in range(3):
        for owner, method in methods:
            getattr(getattr(core, owner) if owner else core, method)()
    figures = clocks.figures(2)
    assert figures["cpu_us"]["host"] == 4 * figures["cpu_us"]["schedule"] > 0
    more = {s: {n: t + 5 for n, t in figures[s].items()} for s in engine_overhead.STATISTICS}
    (added,) = engine_overhead.added({"bf16": {16: figures, 128: figures}, "dms": {16: more}})
    assert added["running"] == 16 and set(added["wall_us"].values()) == {5}


def test_host_times_of_whole_engines(monkeypatch, tmp_path):
    model = str(ROOT / "vllm_dms" / "assets" / "tiny")
    flags = ["--engine", "--model", model, "--pool-gib", "0.05", "--prompt", "80", "--eager"]
    flags += ["--running", "4", "2", "--steps", "5", "--logs", str(tmp_path)]
    result = engine_overhead.measure_all(bench_overhead.parse_args(flags))
    assert not [engine["error"] for engine in result["engines"].values() if "error" in engine]
    assert [(r["arm"], r["running"]) for r in result["rows"]] == [
        ("bf16", 2), ("bf16", 4), ("dms", 2), ("dms", 4)
    ]  # fmt: skip
    for row in result["rows"]:
        assert 0 < row["wall_us"]["host"] <= row["wall_us"]["step"]
    assert result["rows"][-1]["cpu_us"]["dms_metadata"] > 0
    assert [a["running"] for a in result["added"]] == [2, 4]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    path = tmp_path_factory.mktemp("rehearsal")
    synthetic.make_checkpoint(path, "tiny", {**SHAPES["Qwen3-8B"], **TINY}, window=16)
    return path


@pytest.mark.slow
def test_a_rehearsal_writes_comparable_rows_of_two_arms(tmp_path, rehearsal, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    failed = bench_serving.run(
        bench_serving.parse_args(
            ["--model", str(rehearsal), "--arms", "bf16,dms", "--pool-gib", "0.004",
             "--unit", "16", "--levels", "1,3", "--max-requests", "32", "--chunk", "64",
             "--steps", "6", "--eager", "--results", str(tmp_path), "--logs", str(tmp_path)]
        )
    )  # fmt: skip
    assert not failed
    (report,) = tmp_path.glob("2*.json")
    arms = json.loads(report.read_text())["arms"]
    logs = {arm: arms[arm]["8k"]["log"] for arm in arms}
    assert logs["dms"]["attention"] == "torch" != logs["bf16"]["attention"]
    assert logs["dms"]["banner"] and not logs["bf16"]["banner"]
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {row["run_id"] for row in rows} == {rows[0]["run_id"]}
    held = {row["arm"]: row["requests_held"] for row in rows if row["workload"] == "capacity-8k"}
    assert held["dms"] > held["bf16"] > 3
    assert {row["live_compression"] is None for row in rows if row["arm"] == "bf16"} == {True}
    compression = {row["live_compression"] for row in rows if row["arm"] == "dms"}
    assert all(3 < value < 6 for value in compression)  # 17 in the window, 111 of which 1/8 stay


@pytest.mark.slow
def test_a_server_answers_vllms_own_client(tmp_path, rehearsal):
    failed = bench_server.run(
        bench_server.parse_args(
            ["--model", str(rehearsal), "--arms", "dms", "--pool-gib", "0.06", "--input-len", "512",
             "--output-len", "16", "--concurrency", "2", "--max-requests", "8", "--chunk", "64",
             "--eager", "--results", str(tmp_path), "--logs", str(tmp_path)]
        )
    )  # fmt: skip
    assert not failed
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["workload"] == "serve-512-16" and row["completed"] == 4 and row["preemptions"] == 0
    assert row["decode_tok_s"] > 0 and 5 < row["live_compression"] < 8
