"""What a run says and how it ends: by its target, by a signal, by the clock."""

import json
import os
import signal

import pytest
import torch
from retrofit_runs import dense, run  # noqa: F401 - dense is a fixture

from vllm_dms.adapters import read_adapter
from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit import evaluation
from vllm_dms.retrofit.recipe import Recipe
from vllm_dms.retrofit.trainer import Trainer


def test_a_run_says_what_was_asked_and_reached(dense, tmp_path, capsys):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    assert run(source, tmp_path, form=()) == cli.OK
    said = capsys.readouterr().out
    assert "step 1/12" in said and "tokens/s" in said and "left" in said
    # 48 tokens, 7 in the window: 48 / (7 + 41 / 2)
    assert "asked     ratio 2 outside a window of 6: 1.75x live at 48 tokens" in said
    assert "reached          live" in said
    assert not (tmp_path / "training" / "state.pt").exists()
    assert "| 48 |" in (tmp_path / "README.md").read_text()
    assert run(source, tmp_path, "--resume", form=()) == cli.OK
    assert "nothing to resume" in capsys.readouterr().out


def test_a_missed_ratio_is_an_exit_code(dense, tmp_path, capsys):  # noqa: F811
    missed = run(dense("qwen3", attention_bias=False), tmp_path, "--lr", "1e-9")
    assert missed == cli.MISSED and "MISSED: 1.00x live" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()


def test_a_signal_stops_after_the_step_and_the_run_goes_on(
    dense,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    source = dense("qwen3", attention_bias=False)
    step = Trainer.train_step

    def interrupted(self, *args, **kwargs):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run(source, tmp_path) == cli.STOPPED
    assert signal.getsignal(signal.SIGINT) is before
    log = tmp_path / "training" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 4
    with log.open("a") as more:  # as if it had been killed later, after its last state
        more.write(json.dumps({"step": 4}) + "\n")
    assert run(source, tmp_path, "--resume") == cli.OK
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == list(range(12))


def test_a_signal_while_loading_is_no_traceback(dense, tmp_path, monkeypatch, capsys):  # noqa: F811
    def load_data(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_data", load_data)
    assert run(dense("qwen3", attention_bias=False), tmp_path) == cli.STOPPED
    assert capsys.readouterr().out == "stopped\n"


@pytest.mark.parametrize("flag", ["--eval-rows", "--log-every"])
def test_none_is_too_few(dense, tmp_path, capsys, flag):  # noqa: F811
    with pytest.raises(SystemExit):
        run(dense("qwen3", attention_bias=False), tmp_path, flag, "0")
    assert f"{flag} is 0, but it must be at least 1" in capsys.readouterr().err


def test_the_last_step_is_told(dense, tmp_path, capsys):  # noqa: F811
    run(dense("qwen3", attention_bias=False), tmp_path, "--log-every", "5")
    log = (tmp_path / "training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 5, 10, 11]
    assert "step 12/12" in capsys.readouterr().out


def test_no_time_is_no_step(dense, tmp_path, capsys):  # noqa: F811
    """Loading alone takes longer, so there is nothing left to train in."""
    source = dense("qwen3", attention_bias=False)
    assert run(source, tmp_path, "--max-minutes", "1e-5") == cli.MISSED
    assert "--max-minutes is over at step 0 of 12" in capsys.readouterr().out


def test_time_is_left_for_the_evaluation(dense, tmp_path):  # noqa: F811
    """After the first steps it is known that an evaluation this long would not fit."""
    from vllm_dms.retrofit.checkpoint import load_dense

    recipe = Recipe(ratio=2, window=6, length=48, steps=10_000, batch=1)
    model = load_dense(dense("qwen3", attention_bias=False), torch.float32)
    trainer = Trainer(model, torch.ones(1, 48, dtype=torch.int32), recipe, tmp_path)
    trainer.run(0.1, tokens_after=10**9)
    assert 0 < trainer.step <= 2


def test_live_ratio_counts_the_window():
    recipe = Recipe(ratio=4, window=9, length=20)
    assert recipe.live_ratio(8) == 1
    assert recipe.live_ratio(50) == pytest.approx(50 / (10 + 40 / 4))


def test_the_threshold_moves_to_the_live_ratio_that_was_asked(dense, tmp_path, capsys):  # noqa: F811
    """And a run that starts from an adapter's decisions starts where that one ended."""
    source, first, second = dense("qwen3", attention_bias=False), tmp_path / "1", tmp_path / "2"
    assert run(source, first, "--live", "1.5", "--ratio", "4", form=()) == cli.OK
    assert "asked     --live: 1.50x live at 48 tokens" in capsys.readouterr().out
    summary = json.loads((first / "training" / "summary.json").read_text())
    assert 1.48 < summary["evaluation"]["live_compression"] < 1.6
    config = json.loads((first / "config.json").read_text())
    assert config["dms_initial_alpha_offset"] == summary["alpha_offset"] != 5.0

    go_on = ["--init", str(first), "--ratio", "4", "--start-ratio", "4", "--lr", "1e-9"]
    run(source, second, *go_on, "--alpha-offset", str(summary["alpha_offset"]), form=())
    found, true = (read_adapter(path).tensors for path in (second, first))
    for name, value in true.items():  # Adam moves by the learning rate, however small
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    log = (second / "training" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["target_ratio"] == 4 and json.loads(log[0])["share_evicted"] > 0.2
    third = tmp_path / "3"
    assert run(source, third, *go_on, "--steps", "0", "--live", "1.2", form=()) == cli.OK
    moved = read_adapter(third)
    assert all(torch.equal(moved.tensors[name], value) for name, value in true.items())
    assert moved.settings["dms_initial_alpha_offset"] > summary["alpha_offset"]
    said = (third / "README.md").read_text()
    assert "These are the decisions of 1. The threshold was moved to a live ratio of 1.2" in said
    with pytest.raises(SystemExit):
        run(source, third, "--steps", "0", "--live", "1.2", form=())
    assert "--steps is 0, so nothing is trained" in capsys.readouterr().err
    refused = {
        ("--live", "7"): "have live ratios between 1 and 6.86",
        ("--init", str(first), "--dialect", "borrowed"): "an adapter goes on as an adapter",
        ("--init", str(first), "--window", "7"): "was trained with 6: give --window 6.",
    }
    for number, (settings, message) in enumerate(refused.items(), 4):
        with pytest.raises(SystemExit):
            run(source, tmp_path / str(number), *settings, form=())
        assert message in capsys.readouterr().err


def test_controls_hold_as_many_tokens(dense, tmp_path, capsys):  # noqa: F811
    source = dense("llama", attention_bias=False)
    run(source, tmp_path / "adapter", form=())
    out = tmp_path / "report.json"
    paths = [tmp_path / "adapter", "--base", source, "--data", source / "text.txt", "--out", out]
    settings = ["--length", "48", "--controls"]
    evaluation.main([*map(str, paths), *settings])
    found = json.loads(out.read_text())
    arms = found["arms"]
    assert found["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    live = [arm["live_compression"] for arm in arms.values()]
    assert list(arms) == ["dms", "random eviction", "window only"] and live[0] > 1.3
    assert all(abs(x / live[0] - 1) < 0.1 for x in live)
    assert set(arms["dms"]["at_length"]) == {"12", "24", "48"}
    for picture in (out.with_suffix(".png"), tmp_path / "adapter" / "evaluation.png"):
        assert picture.stat().st_size > 10_000


def test_an_evaluation_that_cannot_be_is_refused(dense, tmp_path, capsys):  # noqa: F811
    """A result that could not be written above all: it takes long to have."""
    source = dense("llama", attention_bias=False)
    for model, out, message in (
        (source, tmp_path / "none" / "report.json", "there is no directory"),
        (tmp_path / "none", tmp_path / "report.json", "has no config.json"),
        (source, tmp_path / "report.json", "it is not a DMS checkpoint"),
    ):
        with pytest.raises(SystemExit) as refused:
            evaluation.main([str(model), "--data", str(source / "text.txt"), "--out", str(out)])
        assert refused.value.code == 2 and message in capsys.readouterr().err


def test_compare_is_the_kl_of_whole_logits(monkeypatch):
    monkeypatch.setattr(evaluation, "TOKEN_CHUNK", 3)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 5)
    heads = [torch.nn.Linear(5, 11) for _ in range(2)]
    kl, same = evaluation.compare(student, teacher, *heads)
    guess, truth = (h(x).log_softmax(-1) for h, x in zip(heads, (student, teacher), strict=True))
    torch.testing.assert_close(kl, (truth.exp() * (truth - guess)).sum(-1))
    assert torch.equal(same, guess.argmax(-1) == truth.argmax(-1))
