"""Two processes take one process's steps: on two GPUs, or where there is none on the CPU."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from retrofit_runs import dense, run  # noqa: F401 - dense is a fixture
from safetensors.torch import load_file

from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit.checkpoint import load_dense
from vllm_dms.retrofit.processes import Processes
from vllm_dms.retrofit.recipe import Recipe
from vllm_dms.retrofit.trainer import Trainer

SETTINGS = ["--window", "6", "--ratio", "2", "--batch", "2", "--length", "48", "--lr", "2e-3"]
SETTINGS += ["--steps", "12", "--ramp", "0.3", "--penalty", "20", "--log-every", "1"]
SETTINGS += ["--save-dtype", "float32"]


def two_processes(model, out, *extra):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "vllm_dms.retrofit", str(model), "--data", str(model / "text.txt")]
    command += ["--out", str(out), *SETTINGS, *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes take two GPUs, or none")
def test_two_processes_are_one_up_to_rounding(dense, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Also when one process began and two go on, and when each holds half of the layers."""
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path / "one", form=())
    one = capsys.readouterr().out
    said = two_processes(source, tmp_path / "two")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert f"{where} x 2" in said and said.count("asked") == 1 + said.count("ratio asked")

    original = Trainer.run
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda *a, **k: original(*a, stop_after=5, **k) and False)
        assert run(source, tmp_path / "mixed", form=()) == cli.STOPPED
    assert "resumed at step 5" in two_processes(source, tmp_path / "mixed", "--resume")

    said = two_processes(source, tmp_path / "shards", "--shard", "--recompute", "1")
    layers = sum(p.numel() for p in load_dense(source, torch.float32).model.layers.parameters())
    whole, share = (int(re.search(r"(\d+) parameters held", x)[1]) for x in (one, said))
    assert share == whole - layers // 2

    names = ("one", "two", "mixed", "shards")
    first, *others = (load_file(tmp_path / n / "adapter.safetensors") for n in names)
    for other in others:
        for name, true in first.items():
            torch.testing.assert_close(other[name], true, rtol=1e-3, atol=1e-5)
    files = [tmp_path / n / "training" / "log.jsonl" for n in names]
    logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert all(len(log) == 12 for log in logs)
    for records in zip(*logs, strict=True):
        assert len({r["step"] for r in records}) == 1
        assert all(abs(r["kl"] - records[0]["kl"]) < 1e-3 for r in records)


def test_forwards_must_be_shared_evenly(dense, tmp_path):  # noqa: F811
    model = load_dense(dense("qwen3", attention_bias=False), torch.float32)
    recipe = Recipe(batch=3, micro_batch=1, window=6, length=48)
    with pytest.raises(ValueError, match="3 forwards of --micro-batch 1, which 2 processes"):
        Trainer(model, torch.zeros(3, 48), recipe, tmp_path, processes=Processes(1, 2))


def test_shares_are_all_parts_once():
    parts = list("abcdef")
    shares = [Processes(rank, 3).share(parts) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == list(enumerate(parts))


@pytest.mark.parametrize(
    ("size", "extra", "message"),
    [(1, [], "start it with torchrun"), (2, ["--merge"], "without --merge")],
    ids=["one process", "weights written"],
)
def test_shares_are_refused_where_there_are_none(
    dense,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
    size,
    extra,
    message,
):
    place = (Processes(0, size), torch.device("cpu"))
    monkeypatch.setattr(cli, "joined", lambda: nullcontext(place))
    with pytest.raises(SystemExit):
        run(dense("qwen3", attention_bias=False), tmp_path, "--shard", *extra, form=())
    assert message in capsys.readouterr().err
