"""A run's JSON says where its numbers are from; its arms differ in the cache only; what is missing
fails it."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_serving
import multi_turn
import offline
import processes
import record
import synthetic
import through_server
from arms import ARMS, engine_args, flags
from processes import RunError
from shapes import SHAPES

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 10240,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
MODEL = {"shape": "tiny", "layers": 1, "window": 4, "dialect": "d", "rates": "r", "mean_keep": 0.1}


def options(*changes, out="/o", model="/m", arms="dms", workloads="prefill-8k"):
    given = ("--model", str(model), "--out", str(out), "--arms", arms, "--workloads", workloads)
    return bench_serving.parse_args([*given, "--pool-gib", "2", "--commit", "c", *changes])


def args_of(arm, chosen):
    return [engine_args(ARMS[arm], chosen, group.limits) for group in bench_serving.groups(chosen)]


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


def test_a_stock_arm_has_no_plugin_and_no_arm_more_time_than_there_is(tmp_path):
    log, shown = tmp_path / "x.log", "import os; print(repr(os.environ['VLLM_PLUGINS']))"
    for arm, plugins in (("bf16", "''\n"), ("dms", "'dms'\n")):
        processes.run(ARMS[arm], [sys.executable, "-c", shown], log, time.monotonic() + 60)
        assert log.read_text() == plugins
    with pytest.raises(RunError, match=r"out of time: see x\.log"):
        processes.run(ARMS["bf16"], ["sleep", "60"], log, time.monotonic() + 0.5)
    with pytest.raises(RunError, match="exit code 1: OSError: first"):
        failing = "print(' WARNING ImportError: no'); print('OSError: first'); raise KeyError('x')"
        processes.run(ARMS["bf16"], [sys.executable, "-uc", failing], log, time.monotonic() + 60)


def test_one_client_answers_for_each_command_and_ends_with_the_run(tmp_path):
    client = through_server.Client(tmp_path / "client.log")
    deadline = time.monotonic() + 120
    with pytest.raises(RunError, match=r"SystemExit: 2: see x\.log"):
        client.run(["--no-such-flag"], tmp_path / "x.log", deadline)
    with pytest.raises(RunError, match=r"out of time before y\.log"):
        client.run(REFUSED, tmp_path / "y.log", time.monotonic())
    assert not (tmp_path / "y.log").exists()
    with pytest.raises(RunError, match=r"ValueError: --max-concurrency .*: see y\.log"):
        client.run(REFUSED, tmp_path / "y.log", deadline)
    processes.stop_all()
    assert client.process.poll() is not None
    with pytest.raises(RunError, match=r"the client ended: see z\.log"):
        client.run(REFUSED, tmp_path / "z.log", deadline)


def test_a_late_answer_is_not_the_next_command_s(tmp_path):
    client = through_server.Client(tmp_path / "client.log")
    os.mkfifo(tmp_path / "x.log")  # that nobody reads: the command does not end
    with pytest.raises(RunError, match=r"out of time: see x\.log"):
        client.run(REFUSED, tmp_path / "x.log", time.monotonic() + 0.1)
    with pytest.raises(RunError, match=r"the client ended: see y\.log"):
        client.run(REFUSED, tmp_path / "y.log", time.monotonic() + 120)


REFUSED = ["--model", "x", "--max-concurrency", "0"]


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


class Served:
    """A server's measurement whose processes do nothing and whose client saved ``client``."""

    def __init__(self, monkeypatch, out, client=None, names=None):
        self.out, self.waiting = out, (sys.executable, "-c", "import time; time.sleep(60)")
        monkeypatch.setattr(through_server, "CLI", self.waiting)
        monkeypatch.setattr(
            through_server.Server, "ask", lambda server, path, *_, **__: names or server.name
        )
        monkeypatch.setattr(through_server.Server, "live", lambda *_: {})
        saved = out / "bf16-server-first-request-1.json"
        monkeypatch.setattr(
            through_server.Client, "run", lambda *_: saved.write_text(json.dumps(client))
        )

    def row(self):
        chosen = options(out=self.out, workloads="first-request")
        engine = {"arm": "bf16", "args": args_of("bf16", chosen)[0]}
        rows = through_server.measure(
            ARMS["bf16"], ["first-request"], engine, chosen, time.monotonic() + 60
        )
        assert next(rows) == {}
        return next(rows)


def test_a_server_that_does_not_start_says_why(monkeypatch, tmp_path):
    server = Served(monkeypatch, tmp_path)
    monkeypatch.setattr(
        through_server, "CLI", (sys.executable, "-c", "raise ValueError('no such flag')")
    )
    monkeypatch.setattr(through_server.Server, "ask", refuse)
    with pytest.raises(RunError, match="did not start: ValueError: no such flag"):
        server.row()


def refuse(*args, **kwargs):
    raise ConnectionRefusedError


def test_another_server_on_the_port_is_not_measured(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="another server answers"):
        Served(monkeypatch, tmp_path, names="another").row()


def test_the_first_request_stands_beside_the_tenth_if_all_were_answered(monkeypatch, tmp_path):
    client = {"completed": 10, "failed": 0, "output_throughput": 5.0, "duration": 2.0}
    client |= {"ttfts": [0.2, *[0.1] * 9], "mean_ttft_ms": 7.0}
    row = Served(monkeypatch, tmp_path, client).row()
    assert row["first_over_tenth"] == pytest.approx(2) and row["mean_ttft_ms"] == 7.0
    assert row["server_did_before"] == []
    with pytest.raises(RunError, match="9 of 10 requests were answered"):
        Served(monkeypatch, tmp_path, client | {"failed": 1, "completed": 9}).row()


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


def test_the_gpu_of_a_run_is_the_one_that_the_process_may_use(monkeypatch):
    asked = []
    monkeypatch.setattr(record, "output_of", lambda *args: asked.append(args) or "H, U, 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert record.gpu_facts() == {"gpu": "H", "gpu_uuid": "U", "driver": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    record.gpu_facts()
    assert asked[0][-2:] == ("-i", "3") and "-i" not in asked[1]


class Runs:
    """Runs of bench_serving whose engines are not started."""

    def __init__(self, monkeypatch, path):
        self.path, self.monkeypatch, self.problem = path, monkeypatch, None
        self.gpu = {"gpu": "H", "gpu_uuid": "GPU-1", "driver": "580"}
        monkeypatch.setattr(record, "gpu_facts", lambda: self.gpu)
        monkeypatch.setattr(offline, "measure", self.measure)
        (path / "dms").mkdir()
        (path / "dms" / "synthetic.json").write_text(json.dumps(MODEL))

    def measure(self, arm, workloads, engine, options, deadline):
        yield {"workload": workloads[0], "concurrency": 1, "prefill_tok_s": 1.0}
        if self.problem:
            raise RunError(self.problem)

    def run(self, arms, *changes):
        argv = ["bench_serving.py", "--arms", arms]
        self.monkeypatch.setattr(sys, "argv", argv)
        chosen = options(*changes, model=self.path, out=self.path / "out", arms=arms)
        return bench_serving.run(chosen)

    def report(self):
        return json.loads((self.path / "out" / "run.json").read_text())


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return Runs(monkeypatch, tmp_path)


def test_commands_with_one_folder_are_one_run_with_one_certificate(runs):
    assert runs.run("bf16") == [] == runs.run("dms")
    report = runs.report()
    assert [(row["arm"], row["engine"]) for row in report["rows"]] == [("bf16", 0), ("dms", 1)]
    assert {row["run_id"] for row in report["rows"]} == {report["run_id"]}
    commands = [command["command"] for command in report["commands"]]
    assert [row["command"] for row in report["rows"]] == commands and "--arms dms" in commands[1]
    assert report["gpu_uuid"] == "GPU-1" and report["driver"] == "580" and report["commit"] == "c"
    assert {row["gpu"] for row in report["rows"]} == {"H"} and report["versions"]["vllm"]
    assert {row["pool_bytes"] for row in report["rows"]} == {2 << 30}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.gpu.update(gpu_uuid="GPU-2"), "gpu_uuid GPU-1, here it is GPU-2"),
        (lambda _: ["--pool-gib", "3"], "settings .*'pool_gib': 2.0, .* here .*'pool_gib': 3.0"),
        (lambda _: ["--commit", "d"], "commit c, here it is d"),
    ],
    ids=["card", "pool", "commit"],
)
def test_what_is_not_the_same_does_not_become_one_run(runs, change, message):
    runs.run("bf16")
    before = runs.report()
    with pytest.raises(ValueError, match=message):
        runs.run("dms", *(change(runs) or []))
    assert runs.report() == before


def test_an_engine_that_did_not_measure_all_fails_the_run_and_may_try_again(runs):
    runs.problem = "out of time"
    assert runs.run("dms") == ["dms did not measure all of prefill-8k: out of time"]
    assert runs.report()["engines"][0]["error"] == "out of time"
    runs.problem = None
    assert runs.run("dms") == []
    assert [row["engine"] for row in runs.report()["rows"]] == [1]
    with pytest.raises(ValueError, match="already has prefill-8k of dms"):
        runs.run("dms")


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
