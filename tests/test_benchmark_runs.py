"""A run's JSON says where its numbers are from, and goes on only where it began."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_serving
import serving_process
import serving_results
from serving_plan import FIGURES


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


def test_an_older_run_that_comes_later_replaces_nothing():
    newer = [row("2", "bf16"), row("2", "dms")]
    older = [row("1", "bf16"), row("1", "dms"), row("1", "dms", "prefill-8k")]
    assert serving_results.merge(newer, older) == [*newer, older[2]]


def test_the_gpu_of_a_run_is_the_one_that_the_process_may_use(monkeypatch):
    asked = []
    monkeypatch.setattr(
        serving_results, "_output_of", lambda *args: asked.append(args) or "H, U, 1"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert serving_results.gpu_facts() == {"gpu": "H", "gpu_uuid": "U", "driver": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    serving_results.gpu_facts()
    assert asked[0][-2:] == ("-i", "3") and "-i" not in asked[1]


def test_a_log_says_what_attended_in_place_of_what_vllm_names():
    log = "I 1] Using FLASH_ATTN attention backend out of\nI 2] Using FlashAttention version 3\n"
    assert serving_results.facts_of_log(log)["attention"] == "FLASH_ATTN (FA3)"
    log += "I 3] DMS attention: triton kernels, in place of"
    assert serving_results.facts_of_log(log)["attention"] == "triton"


def test_what_is_not_compared_does_not_stay():
    old = [row("1", arm) for arm in ("bf16", "dms", "fp8", "dms_fp8")]
    new = [row("2", arm) for arm in ("fp8", "dms_fp8")]
    assert serving_results.merge(old, new) == [*old[:2], *new]


def test_a_run_that_was_cut_short_replaces_the_loads_that_it_has():
    few, many = {"concurrency": 8}, {"concurrency": 64}
    old = [row("1", arm, **load) for load in (few, many) for arm in ("fp8", "dms_fp8")]
    new = [row("2", arm, **few) for arm in ("fp8", "dms_fp8")]
    assert serving_results.merge(old, new) == [*old[2:], *new]
    until_full = [row(run, "fp8", "saturated-8k", concurrency=int(run)) for run in ("90", "95")]
    assert serving_results.merge(until_full[:1], until_full[1:]) == until_full[1:]
    slow = row("1", "dms", "serve-8-4", request_rate="2")
    fast = row("2", "dms", "serve-8-4", request_rate="inf")
    assert serving_results.merge([slow], [fast]) == [slow, fast]


class Runs:
    """Runs of bench_serving whose engines are not started: each gives a row at once."""

    def __init__(self, monkeypatch, path):
        self.path, self.monkeypatch = path, monkeypatch
        self.gpu = {"gpu": "H", "gpu_uuid": "GPU-1", "driver": "580"}
        monkeypatch.setattr(serving_results, "gpu_facts", lambda: self.gpu)
        monkeypatch.setattr(bench_serving, "run_engine", self.engine)
        self.model = {"shape": "tiny", "layers": 1, "window": 4}
        (path / "dms").mkdir()

    def engine(self, name, spec, plugin, logs, seconds):
        yield {"engine": {"pool_bytes": spec["engine"]["kv_cache_memory_bytes"]}}
        for workload in spec["plan"]["workloads"]:
            figures = dict.fromkeys(FIGURES) | {"concurrency": 8}
            yield {"row": {"workload": workload, **figures, "decode_tok_s": 1.0}}

    def run(self, *flags):
        (self.path / "dms" / "synthetic.json").write_text(json.dumps(self.model))
        common = ["--model", str(self.path), "--commit", "c", "--logs", str(self.path)]
        flags = list(map(str, flags))
        self.monkeypatch.setattr(sys, "argv", ["bench_serving.py", *flags])
        if "--pool-gib" not in flags:
            flags += ["--pool-gib", "1"]
        bench_serving.run(bench_serving.parse_args([*common, *flags]))

    @property
    def first(self):
        return self.path / "r1.json"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    runs = Runs(monkeypatch, tmp_path)
    flags = ["--arms", "fp8", "--workloads", "reason-1k-8k", "--results", tmp_path]
    runs.run(*flags, "--run-id", "r1")
    return runs


LATER = ("--arms", "dms_fp8", "--workloads", "reason-1k-8k")


def test_a_run_goes_on_in_a_later_command_as_one_run(runs):
    runs.run(*LATER, "--continue", runs.first)
    report = json.loads(runs.first.read_text())
    assert [(r["arm"], r["run_id"]) for r in report["rows"]] == [("fp8", "r1"), ("dms_fp8", "r1")]
    assert json.loads((runs.path / "summary.json").read_text()) == report["rows"]
    assert report["gpu_uuid"] == "GPU-1" and report["driver"] == "580"
    commands = [part["command"] for part in report["parts"]]
    assert [r["command"] for r in report["rows"]] == commands and "--continue" in commands[1]
    assert all(arm["reason"]["started"] for arm in report["arms"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.gpu.update(gpu_uuid="GPU-2"), "gpu_uuid 'GPU-1', but it is 'GPU-2' h"),
        (lambda runs: runs.gpu.update(driver="590"), "driver '580', but it is '590' here"),
        (lambda runs: runs.model.update(window=8), "model.window '4', but it is '8' here"),
        (lambda _: ["--pool-gib", "2"], r"settings.pool_gib '1.0', but it is '2.0' here"),
        (lambda _: ["--reason-requests", "256"], "settings.reason_requests '64'"),
        (lambda _: ["--commit", "d"], "commit 'c', but it is 'd' here"),
        (lambda _: ["--arms", "fp8"], "already has reason-1k-8k of fp8. Leave it out"),
    ],
    ids=["card", "driver", "model", "pool", "load", "commit", "arm"],
)
def test_a_run_does_not_go_on_with_anything_else(runs, change, message):
    before = runs.first.read_text()
    flags = change(runs) or []
    with pytest.raises(ValueError, match=message):
        runs.run(*LATER, *flags, "--continue", runs.first)
    assert runs.first.read_text() == before


def test_a_run_that_does_not_say_its_gpu_does_not_go_on(runs):
    report = json.loads(runs.first.read_text())
    del report["gpu_uuid"]
    runs.first.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="does not say its 'gpu_uuid'"):
        runs.run(*LATER, "--continue", runs.first)


def test_a_series_that_was_cut_short_is_measured_again(runs):
    flags = ["--arms", "fp8", "--workloads", "decode-8k"]
    runs.run(*flags, "--levels", "4,8", "--run-id", "r2", "--results", runs.path)
    path = runs.path / "r2.json"
    with pytest.raises(ValueError, match=r"settings.levels '\[4, 8\]', but it is '\[8\]' here"):
        runs.run(*flags, "--levels", "8", "--continue", path)
    runs.run(*flags, "--levels", "4,8", "--continue", path)  # of 4 and 8 it had 8
    assert [row["concurrency"] for row in json.loads(path.read_text())["rows"]] == [8]
    runs.run(*flags, "--levels", "8", "--run-id", "r3", "--results", runs.path)
    with pytest.raises(ValueError, match="already has decode-8k at 8 of fp8"):
        runs.run(*flags, "--levels", "8", "--continue", runs.path / "r3.json")


@pytest.mark.parametrize("levels", ["4,1", "1,1", "0,2"])
def test_concurrencies_rise(capsys, levels):
    with pytest.raises(SystemExit):
        bench_serving.parse_args(["--model", "m", "--pool-gib", "1", "--levels", levels])
    assert "each above the one before" in capsys.readouterr().err


def test_what_was_not_measured_is_what_a_run_ends_with(runs, monkeypatch):
    def engine(name, *rest):
        yield {"error": "out of time"} if "dms" in name else {"end": {}}

    monkeypatch.setattr(bench_serving, "run_engine", engine)
    flags = ["--model", str(runs.path), "--pool-gib", "1", "--workloads", "prefill-8k"]
    flags += ["--results", str(runs.path), "--logs", str(runs.path), "--arms"]
    parse = bench_serving.parse_args
    (error,) = bench_serving.run(parse([*flags, "bf16,dms"]))
    assert error == "dms did not measure all: out of time"
    assert not bench_serving.run(parse([*flags, "bf16"]))


def test_an_engine_that_failed_is_tried_again_beside_its_first_record(runs):
    report = json.loads(runs.first.read_text())
    runs.first.write_text(json.dumps(report | {"rows": []}))
    runs.run("--arms", "fp8", "--workloads", "reason-1k-8k", "--continue", runs.first)
    assert list(json.loads(runs.first.read_text())["arms"]["fp8"]) == ["reason", "reason-2"]


CHILD = """
import json, sys, time
spec = json.loads(sys.argv[1])
with open(spec["records"], "a") as file:
    print(json.dumps({"row": {"left": spec["deadline"] - time.monotonic()}}), file=file, flush=True)
    if spec["end"]: print('{"end": {}}', file=file, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [True, False])
def test_what_an_engine_wrote_before_its_time_was_up_is_kept(monkeypatch, tmp_path, end):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(serving_process, "__file__", str(child))
    seconds = serving_process.SHUTDOWN_SECONDS + 30 if end else 3
    begin = time.monotonic()
    row, second, log = serving_process.run_engine("x", {"end": end}, False, tmp_path, seconds)
    # However long the child took to start, its time ends before it would be killed.
    assert row["row"]["left"] < seconds - serving_process.SHUTDOWN_SECONDS
    assert second == {"end": {}} if end else "did not end in time" in second["error"]
    assert "log" in log and time.monotonic() - begin < 12
