"""Shapes of published models, as their config.json has them, and a tokenizer for any vocabulary."""

import json
from pathlib import Path
from typing import Any

MAX_POSITION = 1 << 18  # raised for every shape, so that long prompts need no flag

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def _shape(
    base: dict, hidden: int, inner: int, layers: int, heads: int, tied: bool, **extra: Any
) -> dict:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        **extra,
    }


def _llama3_rope(factor: float) -> dict:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    return {"rope_scaling": {**scaling, "factor": factor, "original_max_position_embeddings": 8192}}


SHAPES = {
    "Qwen3-0.6B": _shape(_QWEN3, 1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _shape(_QWEN3, 2048, 6144, 28, 16, True),
    "Qwen3-4B": _shape(_QWEN3, 2560, 9728, 36, 32, True),
    "Qwen3-8B": _shape(_QWEN3, 4096, 12288, 36, 32, False),
    "Qwen3-14B": _shape(_QWEN3, 5120, 17408, 40, 40, False),
    "Qwen3-32B": _shape(_QWEN3, 5120, 25600, 64, 64, False),
    "Llama-3.2-1B": _shape(_LLAMA, 2048, 8192, 16, 32, True, head_dim=64, **_llama3_rope(32.0)),
    "Llama-3.1-8B": _shape(_LLAMA, 4096, 14336, 32, 32, False, head_dim=128, **_llama3_rope(8.0)),
}
_KEYS = (*SHAPES["Qwen3-8B"], "rope_scaling", "rope_parameters")


def read_shape(name: str) -> tuple[str, dict]:
    """A name in SHAPES, or the path of a config.json -> (name, shape)"""
    if name in SHAPES:
        return name, dict(SHAPES[name])
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor one of {', '.join(SHAPES)}.")
    config = json.loads(path.read_text())
    shape = {key: config[key] for key in _KEYS if key in config}
    shape.setdefault("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return path.resolve().parent.name, shape


def number_tokenizer(vocab_size: int):
    """Token i is the word "ti": any sequence of tokens survives decoding and encoding.

    The last one has a longer name. vLLM refuses text with more characters than a prompt of the
    longest token would have, and does not know of the spaces between these words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = {f"t{i}": i for i in range(vocab_size - 1)} | {end: vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="t0",
        eos_token=end,
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )
