"""Laws of the retrofit: its files load as promised, its forward is the reference's, a run is
reproducible."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_dms.config import DMSConfig, weight_suffixes
from vllm_dms.reference import ReferenceModel
from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit import data
from vllm_dms.retrofit.checkpoint import load_dms
from vllm_dms.retrofit.forward import forward
from vllm_dms.retrofit.gates import GumbelSigmoid, RandomEviction, hard
from vllm_dms.retrofit.losses import live_tokens
from vllm_dms.retrofit.recipe import Recipe

WINDOW = 6
SIZE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
    initializer_range=0.2,
)
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """dense(family): a random tiny model with a byte tokenizer, and a text file beside it."""
    made = {}

    def make(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            config_class, model_class = FAMILIES[family]
            torch.manual_seed(0)
            model_class(config_class(**SIZE, **changes)).save_pretrained(path)
            vocab = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
            core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[]))
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(path)
            (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
            made[key] = path
        return made[key]

    return make


def run(model, out, *extra):
    """The command with settings under which 12 steps make a random model evict about half."""
    cli.main(
        [
            str(model),
            "--data",
            str(model / "text.txt"),
            "--out",
            str(out),
            "--window",
            str(WINDOW),
            "--ratio",
            "2",
            "--steps",
            "12",
            "--batch",
            "2",
            "--length",
            "48",
            "--lr",
            "2e-3",
            "--ramp",
            "0.3",
            "--penalty",
            "20",
            "--log-every",
            "1",
            "--save-dtype",
            "float32",
            *extra,
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", ["adapter", "borrowed"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_loads_and_agrees_with_the_reference(dense, tmp_path, family, dialect, bias):
    source = dense(family, attention_bias=bias)
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
    expected = {
        f"model.layers.{i}.{suffix}" for i in range(2) for suffix in weight_suffixes(dms)[0]
    }
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


def test_frozen_weights_stay(dense, tmp_path):
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path)
    before, after = (
        ReferenceModel.from_dir(source).weights,
        ReferenceModel.from_dir(tmp_path).weights,
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_borrowed_changes_only_its_rows(dense, tmp_path):
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
def test_resumed_run_equals_uninterrupted(dense, tmp_path, train):
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path / "whole", "--train", train)
    halves = ["--train", train, "--resume"]
    original, cli.Trainer.run = cli.Trainer.run, _stop_after(5, cli.Trainer.run)
    try:
        run(source, tmp_path / "halves", *halves)
    finally:
        cli.Trainer.run = original
    run(source, tmp_path / "halves", *halves)
    logs = []
    for name in ("whole", "halves"):
        lines = (tmp_path / name / "training" / "log.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 12
    whole, halves = (ReferenceModel.from_dir(tmp_path / n).weights for n in ("whole", "halves"))
    assert all(torch.equal(whole[n], halves[n]) for n in whole)


def _stop_after(step, run_method):
    def stopped(self, *args, **kwargs):
        return run_method(self, *args, stop_after=step, **kwargs)

    return stopped


def test_resume_refuses_another_recipe(dense, tmp_path, capsys):
    source = dense("qwen3", attention_bias=False)
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
        (["--length", "4000"], "less than one row"),
        (["--eval-rows", "100"], "give more text"),
        (["--data", "missing.txt"], "there is no such file"),
    ],
)
def test_errors_name_the_setting(dense, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(dense("qwen3", attention_bias=False), tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_dms_checkpoint_is_refused(dense, tmp_path, capsys):
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path)
    (tmp_path / "text.txt").write_text("again " * 200)
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "again")
    err = capsys.readouterr().err
    assert "already" in err or "architectures" in err


def test_gumbel_sigmoid_gates():
    logits = torch.linspace(-8, 8, 4000).repeat(2, 2, 1).requires_grad_()
    log_keep, evict = GumbelSigmoid(0.1, seed=3)(logits, layer=0)
    again = GumbelSigmoid(0.1, seed=3)(logits, layer=0)
    assert torch.equal(log_keep, again[0]) and torch.equal(evict, again[1])
    assert set(evict.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # Logistic noise: the share evicted at a logit is its sigmoid.
    near_one = evict[..., (logits[0, 0] > 0.5) & (logits[0, 0] < 1.5)].mean()
    assert abs(near_one - torch.sigmoid(torch.tensor(1.0))) < 0.05
    assert ((log_keep < -0.7) == (evict > 0.5)).float().mean() > 0.99
    evict.mean().backward()
    assert logits.grad.abs().sum() > 0 and (logits.grad >= 0).all()


def test_random_eviction_matches_its_rates():
    rates = torch.tensor([[0.2, 0.9]])
    _, evict = RandomEviction(rates, seed=0)(torch.zeros(4, 2, 5000), layer=0)
    torch.testing.assert_close(evict.mean((0, 2)), rates[0], rtol=0, atol=0.02)


def test_live_tokens_counts_survivors():
    evict = torch.zeros(10)
    evict[[1, 3, 9]] = 1
    # W = 2, shift 1: keys 0..6 are outside; deciders 1..7 evict keys 0 and 2; decider 9 speaks of
    # key 8, inside.
    assert live_tokens(evict, window=2, shift=1).item() == 8


def test_schedules():
    recipe = Recipe(ratio=8, ramp=0.5, lr=1.0)
    assert [recipe.target_ratio(p) for p in (0, 0.25, 0.5, 1)] == [1, 4.5, 8, 8]
    assert recipe.target_share(0) == 0 and recipe.target_share(1) == 1 - 1 / 8
    assert recipe.learning_rate(0.5) == 1.0 and abs(recipe.learning_rate(1.0) - 0.1) < 1e-9


def test_rows_and_batches():
    rows = data.pack([[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11]], length=4, eos=0)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 0, 7], [8, 9, 10, 11]]
    epoch = torch.cat([data.batch(rows, step, 1, seed=4) for step in range(3)])
    assert sorted(epoch.tolist()) == sorted(rows.tolist())
