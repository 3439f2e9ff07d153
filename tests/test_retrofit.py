"""Laws of the retrofit: its files load as promised, its forward is the reference's, a run is
reproducible."""

import json

import pytest
import torch
from checkpoints import adapter_weights
from engines import NOISE, generate, sampling
from retrofit_runs import FAMILIES, WINDOW, dense, run  # noqa: F401 - dense is a fixture

from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel
from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit.checkpoint import load_dms
from vllm_dms.retrofit.forward import forward
from vllm_dms.retrofit.gates import hard


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", ["adapter", "borrowed"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_loads_and_agrees_with_the_reference(dense, tmp_path, family, dialect, bias):  # noqa: F811
    if bias and family in ("qwen2", "mistral"):
        pytest.skip("the family has biases always, or never")
    source = dense(family, **({} if family in ("qwen2", "mistral") else {"attention_bias": bias}))
    run(source, tmp_path, "--dialect", dialect)
    config = json.loads((tmp_path / "config.json").read_text())
    base = FAMILIES[family][1].__name__
    assert config["architectures"] == [base + "DMS" if dialect == "adapter" else base]
    assert DMSConfig.from_checkpoint(config) == DMSConfig(
        dialect=f"nvidia-{dialect}",
        window=WINDOW,
        alpha_scale=100.0,
        alpha_offset=5.0,
        shift=1,
        nominal_ratio=2.0,
    )

    model, dms = load_dms(tmp_path, torch.float32)
    reference = ReferenceModel.from_dir(tmp_path)
    expected = adapter_weights(2) if dms.adapter else set()
    if bias and dialect == "adapter":
        expected |= {f"model.layers.{i}.self_attn.dms_proj_alpha.bias" for i in range(2)}
    assert {n for n in reference.weights if "dms_" in n} == expected

    ids = torch.randint(1, 257, (1, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = forward(model, ids, dms, hard)
        logits = model.lm_head(output.hidden)[0]
        open_logits = model.lm_head(forward(model, ids, dms).hidden)[0]
    truth = reference.forward(ids[0])
    decisions = output.evict[:, 0].bool()
    assert torch.equal(decisions[..., 1:], truth.evict[..., :-1])
    share = decisions.float().mean()
    assert 0.1 < share < 0.95, f"{share} evicted: the comparison needs both kinds"
    torch.testing.assert_close(
        logits.log_softmax(-1), truth.logits.log_softmax(-1), rtol=0, atol=2e-4
    )
    assert (logits - open_logits).abs().max() > 0.05, (
        "eviction must matter for the comparison to mean anything"
    )


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_frozen_weights_stay(dense, tmp_path, family):  # noqa: F811
    source = dense(family, attention_bias=False)
    run(source, tmp_path)
    before, after = (
        ReferenceModel.from_dir(source).weights,
        ReferenceModel.from_dir(tmp_path).weights,
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_borrowed_changes_only_its_rows(dense, tmp_path):  # noqa: F811
    source = dense("llama", attention_bias=False)
    run(source, tmp_path, "--dialect", "borrowed")
    before, after = (
        ReferenceModel.from_dir(source).weights,
        ReferenceModel.from_dir(tmp_path).weights,
    )
    changed = {
        name: (before[name] != after[name]).any(-1).nonzero().flatten().tolist()
        for name in before
        if not torch.equal(before[name], after[name])
    }
    # Heads 0 and 2 of 16 channels are the first of their groups.
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight": [15, 47] for i in range(2)}


@pytest.mark.parametrize("train", ["decisions", "all"])
def test_resumed_run_equals_uninterrupted(dense, tmp_path, monkeypatch, train):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path / "whole", "--train", train)
    halves = ["--train", train, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(cli.Trainer, "run", _stop_after(5, cli.Trainer.run))
        assert run(source, tmp_path / "halves", *halves) == cli.STOPPED
    assert run(source, tmp_path / "halves", *halves) == cli.OK
    logs = []
    for name in ("whole", "halves"):
        lines = (tmp_path / name / "training" / "log.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 12
    whole, halves = (ReferenceModel.from_dir(tmp_path / n).weights for n in ("whole", "halves"))
    assert all(torch.equal(whole[n], halves[n]) for n in whole)


def _stop_after(step, run_method):
    def stopped(self, *args, **kwargs):
        run_method(self, *args, stop_after=step, **kwargs)
        return False

    return stopped


def test_resume_refuses_another_recipe(dense, tmp_path, monkeypatch, capsys):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    monkeypatch.setattr(cli.Trainer, "run", _stop_after(1, cli.Trainer.run))
    run(source, tmp_path)
    with pytest.raises(SystemExit):
        run(source, tmp_path, "--resume", "--tau", "0.2")
    assert "another tau" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0.5"], "--ratio is 0.5, but it must be at least 1"),
        (["--length", "6"], "--length is 6, but it must be more than the window"),
        (["--micro-batch", "3"], "--micro-batch is 3, but it must be a divisor of batch"),
        (["--dialect", "other"], "adapter or borrowed"),
        (["--train", "all", "--dtype", "bfloat16"], "needs --dtype float32"),
        (["--length", "4000"], "the model knows 512 positions"),
        (["--eval-rows", "100"], "give more text"),
        (["--data", "missing.txt"], "there is no such file"),
    ],
)
def test_errors_name_the_setting(dense, tmp_path, capsys, arguments, message):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        run(dense("qwen3", attention_bias=False), tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_dms_checkpoint_is_refused(dense, tmp_path, capsys):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path)
    (tmp_path / "text.txt").write_text("again " * 200)
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "again")
    assert "is a DMS checkpoint already" in capsys.readouterr().err


def test_a_sliding_window_is_refused(dense, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        run(dense("mistral", sliding_window=64), tmp_path)
    assert "has sliding-window layers" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_served(dense, tmp_path, make_engine, expert_group, family):  # noqa: F811
    """The engine gives the log-probabilities of the trainer's forward with hard decisions."""
    run(dense(family, attention_bias=False), tmp_path)
    llm = make_engine(
        tmp_path,
        dtype="float32",
        kv_cache_dtype="dms",
        max_model_len=256,
        max_num_batched_tokens=64,
        logprobs_mode="raw_logprobs",
    )
    prompt = torch.randint(1, 257, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    output = generate(llm, [prompt], sampling(20))[0]
    assert output.kv_transfer_params["dms"]["compression"] > 1.1
    model, dms = load_dms(tmp_path, torch.float32)
    ids = prompt + list(output.outputs[0].token_ids)
    with torch.no_grad():
        hidden = forward(model, torch.tensor([ids]), dms, hard).hidden[0]
        truth = model.lm_head(hidden).log_softmax(-1)
    for step, entries in enumerate(output.outputs[0].logprobs):
        for token, entry in entries.items():
            assert abs(truth[len(prompt) - 1 + step, token].item() - entry.logprob) < NOISE
