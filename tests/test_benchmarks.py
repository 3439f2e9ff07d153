"""The serving benchmarks measure what they say: rates that were asked for, windows in which only
decoding happens, arms that differ in nothing but the cache."""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats

from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_server
import bench_serving
import serving_results
import synthetic
from serving_driver import Driver, OutOfTimeError, Step, Window, quiet_tail
from serving_workloads import FIGURES, MEASURING_SECONDS, WORKLOADS, Bench, Plan
from shapes import SHAPES, read_shape

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 4096,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
@pytest.mark.parametrize("rates", ["uniform", "heavy"])
@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-0.6B", "Llama-3.2-1B"])
def test_each_head_keeps_the_share_it_was_made_for(tmp_path, model, rates, dialect):
    shape, rule = {**SHAPES[model], **TINY}, {"keep": 0.2, "window": 16, "dialect": dialect}
    record = synthetic.make_checkpoint(tmp_path, model, shape, rates=rates, **rule)
    reference = ReferenceModel.from_dir(tmp_path / "dms")
    ids = torch.randint(0, 4096, (1200,), generator=torch.Generator().manual_seed(3))
    kept = (~reference.forward(ids).evict[..., :-1]).float().mean(-1)
    wanted = torch.tensor(record["keep"])
    assert wanted.mean().item() == pytest.approx(0.2, abs=1e-4)
    # Four standard deviations of 1200 draws, and some for a hidden size of only 128.
    assert ((kept - wanted).abs() < 4 * (wanted * (1 - wanted) / 1200).sqrt() + 0.02).all()
    assert kept.mean().item() == pytest.approx(0.2, abs=0.02)


def test_heavy_tailed_heads_of_the_8b_shape_live_at_1480_of_8192_tokens_on_average():
    keep = synthetic.head_keep_rates(36, 8, 0.126, "heavy", seed=0)
    live = 513 + (8192 - 513) * keep
    assert live.mean().item() == pytest.approx(1480, abs=5)
    assert live.max() > 8 * live.min()


def test_sampled_tokens_vary(tmp_path):
    """Tied embeddings could make a token predict itself."""
    synthetic.make_checkpoint(tmp_path, "tied", {**SHAPES["Qwen3-4B"], **TINY}, window=16)
    logits = ReferenceModel.from_dir(tmp_path / "dms").logits(list(range(50)))
    assert logits.softmax(-1).max() < 0.5


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
def test_the_dense_checkpoint_is_the_dms_checkpoint_without_its_adapter(tmp_path, dialect):
    synthetic.make_checkpoint(tmp_path, "tiny", {**SHAPES["Qwen3-8B"], **TINY}, dialect=dialect)
    weights = {}
    for kind in ("dms", "dense"):
        index = json.loads((tmp_path / kind / "model.safetensors.index.json").read_text())
        files = {file: load_file(tmp_path / kind / file) for file in index["weight_map"].values()}
        weights[kind] = {name: files[file][name] for name, file in index["weight_map"].items()}
        assert len(list((tmp_path / kind).glob("*.safetensors"))) == len(files)
    adapter = {name for name in weights["dms"] if "dms_" in name}
    assert len(adapter) == (2 * TINY["num_hidden_layers"] if "adapter" in dialect else 0)
    assert weights["dms"].keys() - adapter == weights["dense"].keys()
    assert all(torch.equal(weights["dms"][name], w) for name, w in weights["dense"].items())
    configs = [json.loads((tmp_path / k / "config.json").read_text()) for k in ("dms", "dense")]
    config = DMSConfig.from_checkpoint(configs[0])
    assert config.dialect == dialect and config.window == 512 and config.nominal_ratio == 8
    assert DMSConfig.from_checkpoint(configs[1]) is None
    assert configs[1]["architectures"] == ["Qwen3ForCausalLM"]


def test_a_shape_is_read_from_a_config_file(tmp_path):
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**SHAPES["Llama-3.1-8B"], "dms_cr": 8, "eos_token_id": 7}))
    assert read_shape(str(path)) == ("my-model", SHAPES["Llama-3.1-8B"])
    with pytest.raises(ValueError, match="neither a file nor one of Qwen3"):
        read_shape("Qwen3-9B")


def test_any_sequence_of_tokens_survives_the_tokenizer():
    tokenizer = synthetic.number_tokenizer(1000)
    ids = [5, 999, 0, 0, 17, 5]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def step(time, tokens, running, waiting=0, preemptions=0):
    return Step(time, tokens, running, waiting, usage=0.5, preemptions=preemptions)


def test_a_window_has_no_step_with_a_prefill_a_preemption_or_another_batch():
    quiet = [step(t, 4, 4) for t in (2.0, 2.1, 2.2)]
    assert quiet_tail([step(1.0, 3, 4), *quiet]) == 3  # one of four is in its prompt
    assert quiet_tail([step(1.0, 4, 4, preemptions=1), *quiet]) == 3
    assert quiet_tail([step(1.0, 5, 5), *quiet]) == 3
    assert quiet_tail([*quiet, step(3.0, 3, 4)]) == 0 + quiet_tail([step(3.0, 3, 4)])
    window = Window.of(quiet)
    assert window.tokens == 8 and window.rate == pytest.approx(40)


class FakeEngine:
    """A prompt takes a step of 1 s, a decode step 0.1 s; ``capacity`` requests fit."""

    def __init__(self, capacity):
        self.capacity, self.now = capacity, 100.0
        self.waiting, self.running = [], []
        self.engine_core = self.input_processor = self

    def get_supported_tasks(self):
        return ("generate",)

    def process_inputs(self, request_id, prompt, params, tasks):
        return SimpleNamespace(request_id=request_id, prompt=prompt, params=params, made=0)

    def assign_request_id(self, request):
        request.request_id += "-x"

    def add_request(self, request):
        self.waiting.append(request)

    def abort_requests(self, ids):
        self.waiting = [r for r in self.waiting if r.request_id not in ids]
        self.running = [r for r in self.running if r.request_id not in ids]

    def get_output(self):
        events, start = {}, self.now
        if self.waiting and len(self.running) < self.capacity:
            request = self.waiting.pop(0)
            self.running.append(request)
            events[request.request_id] = [
                EngineCoreEvent(EngineCoreEventType.SCHEDULED, timestamp=start)
            ]
            self.now += 0.9
        self.now += 0.1
        outputs = []
        for request in list(self.running):
            request.made += 1
            done = request.made == request.params.max_tokens
            if done:
                self.running.remove(request)
            outputs.append(
                EngineCoreOutput(
                    request.request_id,
                    [0],
                    finish_reason=FinishReason.LENGTH if done else None,
                    events=events.get(request.request_id),
                    kv_transfer_params={"dms": {"live_tokens": 2.0, "dense_tokens": 8}},
                )
            )
        stats = SchedulerStats(
            num_running_reqs=len(self.running), num_waiting_reqs=len(self.waiting)
        )
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, timestamp=self.now)


def fake_bench(workloads, capacity=20, levels=(1, 4), max_requests=32, deadline=float("inf")):
    plan = Plan(workloads, list(levels), 10, max_requests, chunk=8, unit=1, reason_requests=6)
    return Bench(Driver(FakeEngine(capacity), 50, 0, deadline), plan, pool_tokens=20 * 8)


def test_each_workload_gives_rows_with_every_figure():
    rows = list(fake_bench(list(WORKLOADS)).run())
    assert [row["workload"] for row in rows] == [
        "prefill-8k", "decode-8k", "decode-8k", "capacity-8k", "saturated-8k", "prefill-32k",
        "prefill-128k", "reason-1k-8k",
    ]  # fmt: skip
    assert all(set(FIGURES) <= set(row) for row in rows)
    by_name = {(row["workload"], row["concurrency"]): row for row in rows}
    assert by_name["prefill-8k", 1]["prefill_tok_s"] == pytest.approx(8)  # 8 tokens in 1 s
    assert by_name["decode-8k", 4]["decode_tok_s"] == pytest.approx(40)
    assert by_name["capacity-8k", 20]["requests_held"] == 20
    assert all(row["live_compression"] == 4.0 for row in rows)
    saturated = next(row for row in rows if row["workload"] == "saturated-8k")
    assert saturated["decode_tok_s"] == pytest.approx(10 * saturated["concurrency"])
    assert saturated["requests_held"] == 20 and saturated["preemptions"] == 0
    reason = rows[-1]
    assert reason["complete"] and reason["generated"] == 6 * 8


def test_a_level_that_the_pool_does_not_hold_is_left_out():
    rows = list(fake_bench(["decode-8k"], capacity=3, levels=(2, 8)).run())
    assert [row["concurrency"] for row in rows] == [2]


def test_time_that_runs_short_ends_the_filling_and_what_was_admitted_is_measured():
    deadline = time.monotonic() + MEASURING_SECONDS / 2
    rows = list(fake_bench(["decode-8k", "saturated-8k"], levels=(4,), deadline=deadline).run())
    assert [row["workload"] for row in rows] == ["decode-8k", "capacity-8k", "saturated-8k"]
    assert [row.get("complete") for row in rows] == [None, False, False]
    assert 4 <= rows[1]["requests_held"] < 20
    saturated = rows[2]
    assert saturated["decode_tok_s"] == pytest.approx(10 * saturated["concurrency"])


def test_no_step_runs_after_the_time_is_up():
    with pytest.raises(OutOfTimeError):
        list(fake_bench(["decode-8k"], deadline=0.0).run())


def row(run_id, arm, workload="decode-8k", **figures):
    return {"run_id": run_id, "arm": arm, "workload": workload, "concurrency": 1, **figures}


def test_a_newer_run_replaces_an_older_one_whose_arms_it_has_all():
    old = [row("1", "bf16"), row("1", "dms"), row("1", "fp8", "prefill-8k")]
    new = [row("2", "bf16"), row("2", "dms"), row("2", "fp8")]
    assert serving_results.merge(old, new) == [*new, old[2]]


def test_rows_that_were_measured_side_by_side_stay_together():
    old = [row("1", "bf16"), row("1", "dms")]
    new = [row("2", "bf16"), row("2", "dms_noevict")]
    assert serving_results.merge(old, new) == [*old, *new]


def options(*flags):
    return bench_serving.parse_args(["--model", "/m", "--pool-gib", "2", *flags])


def test_arms_differ_in_checkpoint_cache_and_plugin_only():
    chosen = options("--workloads", ",".join(WORKLOADS), "--dms", '{"page_size": 32}')
    for _, plan, pool in bench_serving.plans(chosen):
        args = {
            name: bench_serving.engine_args(arm, chosen.model, plan, pool, chosen)
            for name, arm in bench_serving.ARMS.items()
        }
        own = ("model", "kv_cache_dtype", "additional_config")
        common = [{k: v for k, v in a.items() if k not in own} for a in args.values()]
        assert all(c == common[0] for c in common)
        assert common[0]["enable_prefix_caching"] is False
        assert common[0]["kv_cache_memory_bytes"] == pool
        assert args["dms_noevict"]["additional_config"] == {
            "dms": {"page_size": 32, "evict": False}
        }
        assert "additional_config" not in args["bf16"]


def test_long_prompts_and_long_answers_have_engines_of_their_own():
    chosen = options("--workloads", ",".join(WORKLOADS), "--reason-requests", "32")
    names = [(name, plan.max_requests, pool) for name, plan, pool in bench_serving.plans(chosen)]
    full = 2 << 30
    assert names == [("8k", 1024, full), ("long", 8, full), ("reason", 32, full // 8)]
    chosen.one_engine = True
    merged = bench_serving.plans(chosen)[0][1]
    assert merged.max_model_len > 131072 and merged.max_requests == 1024


def test_graphs_cover_every_batch_that_can_run():
    assert bench_serving.capture_sizes(1024)[-1] == 1024
    assert bench_serving.capture_sizes(256)[-2:] == [248, 256]
    assert bench_serving.capture_sizes(5) == [1, 2, 4, 5]


@pytest.mark.parametrize("arm", ["fp8", "dms"])
def test_the_server_and_its_client_are_started_with_vllms_own_flags(arm):
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    chosen = bench_server.parse_args(["--model", "/m", "--arm", arm, "--pool-gib", "2"])
    serve = bench_server.serve_command(bench_serving.ARMS[arm], chosen)
    flags = serve[serve.index("serve") + 2 :]
    if arm == "dms":  # the flag's choices need the plugin
        flags[flags.index("--kv-cache-dtype") + 1] = "auto"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    assert parsed.kv_cache_memory_bytes == 2 << 30 and parsed.enable_prefix_caching is False
    assert parsed.max_model_len == 1024 + 512 + 64
    client = bench_server.client_command(bench_serving.ARMS[arm], chosen, Path("/r/x.json"))
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(client[client.index("bench") + 2 :])
    assert parsed.random_output_len == 512 and parsed.max_concurrency == 64 and parsed.ignore_eos


@pytest.mark.slow
def test_a_rehearsal_writes_comparable_rows_of_two_arms(tmp_path):
    shape = {**SHAPES["Qwen3-8B"], **TINY, "vocab_size": 512}
    synthetic.make_checkpoint(tmp_path / "model", "tiny", shape, window=16)
    bench_serving.run(
        bench_serving.parse_args(
            ["--model", str(tmp_path / "model"), "--arms", "bf16,dms", "--pool-gib", "0.004",
             "--unit", "16", "--levels", "1,3", "--max-requests", "32", "--chunk", "64",
             "--steps", "6", "--eager", "--results", str(tmp_path), "--logs", str(tmp_path)]
        )
    )  # fmt: skip
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {row["run_id"] for row in rows} == {rows[0]["run_id"]}
    held = {row["arm"]: row["requests_held"] for row in rows if row["workload"] == "capacity-8k"}
    assert held["dms"] > held["bf16"] > 3
    assert {row["live_compression"] is None for row in rows if row["arm"] == "bf16"} == {True}
    compression = {row["live_compression"] for row in rows if row["arm"] == "dms"}
    assert all(3 < value < 6 for value in compression)  # 17 in the window, 111 of which 1/8 stay
