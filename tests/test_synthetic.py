"""Checkpoints of the benchmarks evict at the rates that were asked for, and their dense twins have
the same weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic
from shapes import SHAPES

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 4096,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
@pytest.mark.parametrize("rates", ["uniform", "heavy"])
@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B", "Llama-3.2-1B"])
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


def test_any_sequence_of_tokens_survives_the_tokenizer():
    tokenizer = synthetic.number_tokenizer(1000)
    ids = [5, 999, 0, 0, 17, 5]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    # Else vLLM refuses prompts near the longest, by their characters.
    longest = max(map(len, tokenizer.get_vocab()))
    assert len(tokenizer.decode([998] * 100)) <= 100 * longest
