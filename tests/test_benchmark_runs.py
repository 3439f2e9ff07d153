"""A run's JSON says where its numbers are from; its arms differ in the cache only; what is missing
fails it."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_serving
import multi_turn
import offline
import record
import synthetic
import through_server
from arms import ARMS, flags
from benchmark_options import MODEL, TINY, args_of, options
from processes import RunError
from shapes import SHAPES


def test_arms_differ_in_checkpoint_cache_and_plugin_only():
    workloads = ",".join(bench_serving.WORKLOADS)
    chosen = options("--dms", '{"page_size": 32}', workloads=workloads)
    per_arm = {arm: args_of(arm, chosen) for arm in ARMS}
    own = ("model", "kv_cache_dtype", "additional_config")
    for engines in zip(*per_arm.values(), strict=True):
        common = [{k: v for k, v in args.items() if k not in own} for args in engines]
        assert all(c == common[0] for c in common)
        caches = common[0]["max_model_len"] == multi_turn.LONGEST
        assert common[0]["enable_prefix_caching"] is caches
        assert common[0]["kv_cache_memory_bytes"] == 2 << 30
    kept = per_arm["dms_keep"][0]["additional_config"]
    assert kept == {"dms": {"page_size": 32, "evict": False}}
    assert "additional_config" not in per_arm["bf16"][0]
    talking = next(a for a in per_arm["dms_keep"] if a["enable_prefix_caching"])
    kept |= {"dms": kept["dms"] | {"prefix_cache": True}}
    assert talking["additional_config"] == kept
    groups = {group.name: group.limits for group in bench_serving.groups(chosen)}
    assert groups["steps"]["max_cudagraph_capture_size"] == 1024
    assert groups["prefill-128k"]["max_model_len"] > 131072
    assert groups["reason-1k-8k"] == {"max_model_len": 9216, "max_num_seqs": 256}


def test_quantized_weights_are_those_of_every_arm_and_said_so(tmp_path):
    chosen = options("--quantization", "fp8")
    assert all(args_of(arm, chosen)[0]["quantization"] == "fp8" for arm in ARMS)
    assert "quantization" not in args_of("dms", options())[0]
    (tmp_path / "dms").mkdir()
    (tmp_path / "dms" / "synthetic.json").write_text(json.dumps(MODEL))
    settings = {name: vars(chosen)[name] for name in bench_serving.COMMON}
    found = record.Record(tmp_path / "out", tmp_path, settings, "c").report
    assert found["weights_dtype"] == found["settings"]["quantization"] == "fp8"


def test_vllm_knows_all_flags_that_it_is_started_with(tmp_path, monkeypatch):
    from vllm.benchmarks import latency, serve, throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # moved in vLLM 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser

    monkeypatch.setattr(through_server.processes, "start", lambda *args: None)
    chosen = options(workloads="serve-mixed")
    (args,) = args_of("fp8", chosen)
    server = through_server.Server(ARMS["fp8"], args, chosen, tmp_path / "x.log")
    assert server.command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(server.command[4:])
    assert parsed.kv_cache_memory_bytes == 2 << 30 and parsed.enable_prefix_caching is False
    assert parsed.enable_prompt_tokens_details is True
    assert parsed.served_model_name == [server.name] and parsed.max_model_len == 16384
    client = server.bench_arguments(through_server.SERVED["serve-mixed"], (160, 160))
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    parsed = parser.parse_args(client)
    assert parsed.random_range_ratio == "0.8" and parsed.max_concurrency == 160
    assert parsed.ready_check_timeout_sec == 0  # else the first request is not the first
    for workload, module in (("prefill-32k", latency), ("reason-1k-8k", throughput)):
        parser = FlexibleArgumentParser()
        module.add_cli_args(parser)
        (args,) = args_of("fp8", options(workloads=workload))
        command = offline.bench_flags(workload, scale=1)[1:] + flags(args)
        parsed = parser.parse_args([*command, "--disable-detokenize", "--output-json", "x"])
        assert parsed.max_model_len == args["max_model_len"]


def test_arms_together_take_turns_workload_by_workload(tmp_path, monkeypatch):
    order = []

    def measure(arm, workloads, engine, *_):
        order.append(f"start {engine['arm']}")

        def rows():
            order.append(f"{engine['arm']} ready")
            yield {}
            for workload in workloads:
                order.append(f"{engine['arm']} {workload}")
                if (engine["arm"], workload) == ("fp8", "b"):
                    raise RunError("gone")
                yield {"workload": workload}

        return rows()

    group = bench_serving.Group("server", ["a", "b"], {}, measure, served=True)
    monkeypatch.setattr(bench_serving, "groups", lambda _: [group])
    monkeypatch.setattr(record.Record, "add", lambda *_: None)
    (tmp_path / "dms").mkdir()
    (tmp_path / "dms" / "synthetic.json").write_text(json.dumps(MODEL))
    chosen = options("--together", out=tmp_path / "out", workloads="first-request", arms="bf16,fp8")
    chosen.model = tmp_path
    assert bench_serving.run(chosen) == ["fp8 did not measure all of a, b: gone"]
    assert order == [
        "start bf16",
        "start fp8",
        "bf16 ready",
        "fp8 ready",
        "bf16 a",
        "fp8 a",
        "bf16 b",
        "fp8 b",
    ]
    order.clear()
    chosen.together, chosen.out = False, tmp_path / "apart"
    bench_serving.run(chosen)
    assert order == ["start bf16", "bf16 ready", "bf16 a", "bf16 b",
                     "start fp8", "fp8 ready", "fp8 a", "fp8 b"]  # fmt: skip


def test_offline_rows_are_of_all_tokens_and_say_what_waited():
    row = offline.row_of("prefill-8k", 1, {"latencies": [1.0, 3.0]}, "")
    assert row["prefill_tok_s"] == 4096
    log = "Running: 256 reqs, Waiting: 0 reqs\nRunning: 170 reqs, Waiting: 86 reqs, Preemptions: 5"
    log += (
        "\nRunning: 167 reqs, Waiting: 89 reqs, Preemptions: 84\nRunning: 3 reqs, Waiting: 1 reqs"
    )
    row = offline.row_of("reason-1k-8k", 1, {"elapsed_time": 256.0}, log)
    assert row["decode_tok_s"] == 8192
    assert (row["requests_held"], row["preemptions"]) == (167, 89)


@pytest.mark.slow
def test_a_rehearsal_measures_two_arms_in_two_commands(tmp_path):
    """Of each kind of engine one: stepped, offline, with clocks in it, a server."""
    model, out = tmp_path / "model", tmp_path / "run"
    synthetic.make_checkpoint(model, "tiny", {**SHAPES["Qwen3-8B"], **TINY}, window=16)
    common = ("--pool-gib", "0.004", "--scale", "64", "--levels", "1,3", "--steps", "6", "--eager")
    common += ("--max-requests", "32", "--chunk", "64", "--seconds", "1200")
    given = {"model": model, "out": out}
    both = options(*common, **given, arms="bf16,dms", workloads="decode-8k,capacity-8k")
    assert bench_serving.run(both) == []
    last = "prefill-8k,host-mixed,first-request,document-16k"
    others = options(*common, **given, workloads=last)
    assert bench_serving.run(others) == []
    report = json.loads((out / "run.json").read_text())
    steps = {engine["arm"]: engine for engine in report["engines"] if engine["group"] == "steps"}
    assert steps["dms"]["log"]["DMS attention:"] and "DMS attention:" not in steps["bf16"]["log"]
    held = {r["arm"]: r["requests_held"] for r in report["rows"] if r["workload"] == "capacity-8k"}
    assert held["dms"] > held["bf16"] > 3
    compression = [r["live_compression"] for r in report["rows"] if r["workload"] == "decode-8k"
                   and r["arm"] == "dms"]  # fmt: skip
    assert all(3 < value < 6 for value in compression)  # 17 in the window, 111 of which 1/8 stay
    assert "live_compression" not in report["rows"][0]
    prefill, mixed, first = (next(r for r in report["rows"] if r["workload"] == name) for name in
                             ("prefill-8k", "host-mixed", "first-request"))  # fmt: skip
    assert prefill["prefill_tok_s"] > 0 and mixed["num_steps"] == 20 and first["completed"] == 10
    assert first["live_compression"] >= 1 and first["server_did_before"] == []
    asked = [r for r in report["rows"] if r["workload"] == "document-16k"]
    assert [r["concurrency"] for r in asked] == [1, 64] and asked[0]["hit_tokens"] == 64 * 256
