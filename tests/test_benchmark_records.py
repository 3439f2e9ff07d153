"""Commands with one folder are one run, of one commit, GPU and model."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_serving
import certificate
import offline
from benchmark_options import MODEL, options
from processes import RunError


def test_the_gpu_of_a_run_is_the_one_that_the_process_may_use(monkeypatch):
    asked = []
    monkeypatch.setattr(certificate, "output_of", lambda *args: asked.append(args) or "H, U, 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert certificate.gpu_facts() == {"gpu": "H", "gpu_uuid": "U", "driver": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    certificate.gpu_facts()
    assert asked[0][-2:] == ("-i", "3") and "-i" not in asked[1]


class Runs:
    """Runs of bench_serving whose engines are not started."""

    def __init__(self, monkeypatch, path):
        self.path, self.monkeypatch, self.problem = path, monkeypatch, None
        self.gpu = {"gpu": "H", "gpu_uuid": "GPU-1", "driver": "580"}
        monkeypatch.setattr(certificate, "gpu_facts", lambda: self.gpu)
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
