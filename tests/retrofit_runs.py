"""Tiny dense models and the retrofit command over them, for the tests of what it does."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vllm_dms.retrofit import __main__ as cli

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
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
OWN = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


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
            model = model_class(config_class(**(SIZE | OWN.get(family, {}) | changes)))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(path)
            vocab = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
            core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[]))
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(path)
            (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
            made[key] = path
        return made[key]

    return make


def run(model, out, *extra, form=("--merge",)):
    """The command with settings under which 12 steps make a random model evict about half; -> its
    exit code"""
    return cli.main(
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
            *form,
            *extra,
        ]
    )
