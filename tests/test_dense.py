"""The reference without eviction against transformers: the families, and the variants of RoPE."""

import json

import pytest
import torch
import transformers
from checkpoints import LLAMA3_ROPE, random_tokens
from transformers import Qwen3ForCausalLM

from vllm_dms.reference import ReferenceModel
from vllm_dms.rope import rope_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PROMPT = random_tokens(400, seed=7)


@pytest.mark.parametrize(
    "dialect, arch, extra",
    [
        ("dense", "Qwen3ForCausalLM", {}),
        ("dense", "Qwen3ForCausalLM", {"rope_theta": 1e6}),
        ("dense", "LlamaForCausalLM", {"rope_scaling": LLAMA3_ROPE}),
        ("dense", "LlamaForCausalLM", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}}),
        ("dense", "LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("dense", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
        ("dense", "MistralForCausalLM", {"rope_scaling": YARN, "sliding_window": None}),
        ("dense", "MistralForCausalLM", {"rope_scaling": {**YARN, "attention_factor": 0.5}}),
        ("dense", "Qwen3ForCausalLM", {"rope_scaling": {**YARN, "truncate": False}}),
        ("dense", "Qwen2ForCausalLM", {}),
        ("dense", "Qwen3MoeForCausalLM", {}),
        ("dense", "Qwen3MoeForCausalLM", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
        ("nvidia-adapter", "Qwen3ForCausalLM", {"dms_disable_eviction": True}),
    ],
)
def test_without_eviction_it_is_the_model_that_transformers_runs(checkpoint, dialect, arch, extra):
    path = checkpoint(dialect, arch=arch, extra_config=extra)
    theirs = getattr(transformers, arch).from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    ours = ReferenceModel.from_dir(path).logits(PROMPT)
    # Frequencies differ in their last bit, angles by 400 times that.
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-4)


def test_a_tied_head_and_biases_are_told_from_the_weights(checkpoint):
    path = checkpoint("dense")
    config = json.loads((path / "config.json").read_text())
    theirs = Qwen3ForCausalLM.from_pretrained(
        path, dtype=torch.float32, tie_word_embeddings=True, attention_bias=True
    )
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.lm_head.weight = theirs.model.embed_tokens.weight
    weights = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    ours = ReferenceModel(config, weights, None).logits(PROMPT)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_both_spellings_of_rope_settings_mean_the_same():
    old = {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}
    new = {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}}
    assert torch.equal(rope_frequencies(old, 32)[0], rope_frequencies(new, 32)[0])
    with pytest.raises(ValueError, match=r"longrope.*the reference knows"):
        rope_frequencies({"rope_parameters": {"rope_type": "longrope"}}, 32)
