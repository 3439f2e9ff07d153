"""Every family of the table in both NVIDIA forms, through vLLM's engine: equal to the reference."""

import json
import re
from pathlib import Path

import pytest
from checkpoints import LLAMA3_ROPE, random_tokens
from engines import (
    NOISE,
    check_exact,
    engine_args,
    generate,
    prompts,
    sampling,
    scheduler_of,
    worst_error,
)

from vllm_dms.models.families import FAMILIES, family_of_architectures
from vllm_dms.reference import ReferenceModel

ROPE = {
    "llama3": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 8192},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
}


def shape(heads, kv_heads, head_dim, hidden=128, rope=None, **config):
    """Sizes of a checkpoint; what is beyond them goes into config.json."""
    if rope is not None:
        config["rope_parameters"] = ROPE[rope] | {"rope_theta": 1000.0}
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return sizes | {"hidden": hidden, "extra_config": config}


# Sizes as the family has them: grouped by 1 to 7, head_dim 64 to 128, also 80 and 96.
SHAPES = {
    "Qwen3ForCausalLM": shape(6, 2, 128, 96, rope="yarn", attention_bias=True),
    "Qwen3MoeForCausalLM": shape(4, 1, 64),
    "Qwen2ForCausalLM": shape(7, 1, 96, 672),
    "LlamaForCausalLM": shape(3, 3, 80, 120, rope="llama3", attention_bias=True),
    "MistralForCausalLM": shape(8, 2, 96, rope="linear", sliding_window=None),
    "tied LlamaForCausalLM": shape(9, 3, 64, 144, rope="dynamic", tie_word_embeddings=True),
}
FORMS = ("nvidia-borrowed", "nvidia-adapter")


def test_every_family_is_here_and_in_the_readme():
    families = {family_of_architectures([name.split()[-1]]) for name in SHAPES}
    assert families == set(FAMILIES)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    row = re.search(r"\| models \| (.*)", readme).group(1)
    assert all(re.search(rf"\b{family.name}\b(?!-)", row) for family in FAMILIES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_families_are_exact_chunked_batched_and_preempted(
    checkpoint, make_engine, expert_group, name, form
):
    """Eight requests in chunks of 32 tokens, half of them kept: more than the pool has room for."""
    path = checkpoint(form, arch=name.split()[-1], evict_rate=0.5, seed=3, **SHAPES[name])
    llm = make_engine(path, **engine_args(32, max_model_len=256, num_gpu_blocks_override=18))
    stats = scheduler_of(llm).connector.stats
    stats.preemptions = 0
    reference = ReferenceModel.from_dir(path)
    token_ids = prompts(range(40, 120, 10), seed=9)
    for prompt, output in zip(token_ids, generate(llm, token_ids, sampling(60)), strict=True):
        assert worst_error(reference, prompt, output) < NOISE
    assert stats.preemptions > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_families_are_exact_on_the_gpu_with_graphs(
    checkpoint, make_engine, expert_group, monkeypatch, name
):
    # vLLM's experts leave the precision of fp32 products to Triton's default, which is TF32: three
    # digits. Triton's own setting for it; DMS's kernels name theirs.
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    path = checkpoint("nvidia-adapter", arch=name.split()[-1], seed=3, **SHAPES[name])
    args = engine_args(96, enforce_eager=False, gpu_memory_utilization=0.2)
    check_exact(path, make_engine(path, **args), prompts((20, 97, 230, 512, 700)))


def test_yarn_by_override_goes_past_the_checkpoints_context(
    checkpoint, make_engine, fresh_connector
):
    """With eviction off the model is the dense one, which vLLM serves without the plugin."""
    path = checkpoint("nvidia-adapter", extra_config={"max_position_embeddings": 128})
    config = json.loads((path / "config.json").read_text())
    rope = ROPE["yarn"] | {"original_max_position_embeddings": 128, "rope_theta": 1000.0}
    overrides = {"rope_parameters": rope, "max_position_embeddings": 512}
    args = engine_args(96, max_model_len=512, hf_overrides=overrides)
    stock = {"kv_cache_dtype": "auto", "block_size": 128}
    control = {"additional_config": {"dms": {"evict": False}}}
    reference = ReferenceModel.from_dir(path, {"evict": False})
    reference = ReferenceModel(config | overrides, reference.weights, reference.dms)
    prompt = random_tokens(430, seed=4)
    for kind in (stock, control):
        llm = make_engine(path, **args | kind)
        assert worst_error(reference, prompt, generate(llm, [prompt], sampling(20))[0]) < NOISE
