"""Shapes of published models, as their config.json has them, and a tokenizer for any vocabulary."""

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
_QWEN3_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
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
    base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **extra: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, "tie_word_embeddings": False, **extra}


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    return {"rope_scaling": {**scaling, "factor": factor, "original_max_position_embeddings": 8192}}


_TIED = {"tie_word_embeddings": True}
SHAPES = {
    "Qwen3-0.6B": _shape(_QWEN3, 1024, 3072, 28, 16, **_TIED),
    "Qwen3-1.7B": _shape(_QWEN3, 2048, 6144, 28, 16, **_TIED),
    "Qwen3-4B": _shape(_QWEN3, 2560, 9728, 36, 32, **_TIED),
    "Qwen3-8B": _shape(_QWEN3, 4096, 12288, 36, 32),
    "Qwen3-14B": _shape(_QWEN3, 5120, 17408, 40, 40),
    "Qwen3-32B": _shape(_QWEN3, 5120, 25600, 64, 64),
    "Qwen3-30B-A3B": _shape(_QWEN3_MOE, 2048, 6144, 48, 32),
    "Llama-3.2-1B": _shape(_LLAMA, 2048, 8192, 16, 32, head_dim=64, **_TIED, **_llama3_rope(32.0)),
    "Llama-3.1-8B": _shape(_LLAMA, 4096, 14336, 32, 32, head_dim=128, **_llama3_rope(8.0)),
}


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
