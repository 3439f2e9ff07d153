"""Files of small checkpoints in each format, and the rules that they mean."""

import dataclasses

import pytest

from vllm_dms.config import DMSConfig

NVIDIA = {
    "architectures": ["Qwen3ForCausalLM"],
    "dms_window_size": 512,
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
}
RUN_TIME = {
    "dms_cr": 8,
    "dms_tau": 0.1,
    "dms_paged_attention_block_size": 256,
    "dms_compile_limit": 72,
    "dms_manual_inference_mode": False,
    "dms_chunked_prefill": None,
    "dms_preallocate_for_tokens": 4096,
}
LLAMA = {"architectures": ["LlamaForCausalLM"]}
FASTDMS = {"window_size": 256, "alpha_scale": 100.0, "alpha_offset": 5.0}
NVIDIA_RULE = {key: NVIDIA[key] for key in NVIDIA if key != "architectures"}
FASTDMS_DOC = {"target_cr": 8, "context_len": 8192, "compression_mode": "dms"}

BORROWED = DMSConfig("nvidia-borrowed", 512, 100.0, 5.0, shift=1)
ADAPTER = dataclasses.replace(BORROWED, dialect="nvidia-adapter")
UNSHIFTED = DMSConfig("fastdms", 256, 100.0, 5.0, shift=0, zero="before")


def changed(rule, **fields):
    return dataclasses.replace(rule, **fields)


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def check_refused(config, metadata, overrides, words):
    """Files and settings are refused, in a message that has these words."""
    with pytest.raises(ValueError) as error:
        DMSConfig.from_checkpoint(config, metadata, overrides)
    for word in words:
        assert word in str(error.value)
