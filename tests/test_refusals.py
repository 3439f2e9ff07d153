"""Refusals that need what this machine may not have, or objects in place of flags."""

from dataclasses import replace

import pytest
import torch
from engines import engine_config

from vllm_dms import gates
from vllm_dms import refusals as module
from vllm_dms.config import DMSConfig


def refusals(vllm_config, config, **changes):
    vllm_config.kv_transfer_config = None  # the plugin's own, as is the architecture
    vllm_config.model_config.hf_config.architectures = ["Qwen3ForCausalLM"]
    return module.refusals(vllm_config, replace(config, **changes))


@pytest.fixture
def on_cuda(monkeypatch):
    """on_cuda(vllm_config): as if it were for an NVIDIA GPU with vLLM's V2 model runner, or not."""

    def pretend(vllm_config, runner_v2=True):
        monkeypatch.setattr(vllm_config.device_config, "device_type", "cuda")
        monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", runner_v2)

    return pretend


def test_vllms_old_model_runner_is_refused_on_a_gpu_only(checkpoint, on_cuda):
    vllm_config = engine_config(checkpoint("nvidia-borrowed"))
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    assert not vllm_config.use_v2_model_runner and not refusals(vllm_config, config)
    on_cuda(vllm_config)
    assert not refusals(vllm_config, config)
    on_cuda(vllm_config, runner_v2=False)
    (text,) = refusals(vllm_config, config)
    assert "V1 model runner" in text and "Unset VLLM_USE_V2_MODEL_RUNNER" in text


def test_a_decision_is_borrowed_from_a_rank_that_has_the_head(checkpoint):
    vllm_config = engine_config(checkpoint("nvidia-borrowed"), tensor_parallel_size=2)
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    assert not refusals(vllm_config, config)
    (text,) = refusals(vllm_config, config, alpha_per="layer")
    assert "--tensor-parallel-size is 2" in text and "Use at most 1" in text
    assert not refusals(vllm_config, config, alpha_per="layer", dialect="nvidia-adapter")


def test_plain_operations_do_not_go_into_a_cuda_graph(checkpoint, on_cuda, monkeypatch):
    vllm_config = engine_config(checkpoint("nvidia-borrowed"))
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    on_cuda(vllm_config)
    monkeypatch.setattr(vllm_config.model_config, "enforce_eager", False)
    assert any(
        "Add --enforce-eager" in text for text in refusals(vllm_config, config, kernels="torch")
    )
    assert not refusals(vllm_config, config, kernels="triton")
    vllm_config.model_config.enforce_eager = True
    assert not refusals(vllm_config, config, kernels="torch")


def test_reports_of_a_failed_step_are_not_to_be_joined_with_the_next_ones(checkpoint):
    vllm_config = engine_config(checkpoint("nvidia-borrowed"))
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    vllm_config.parallel_config.enable_fault_tolerance = True  # vLLM wants it with a balancer only
    (text,) = refusals(vllm_config, config)
    assert "--enable-fault-tolerance" in text


def test_lora_in_fp32_is_refused_on_a_gpu_only(checkpoint, on_cuda):
    """vLLM's own kernels for it take no fp32 there: without this an assert deep inside fails."""
    vllm_config = engine_config(checkpoint("nvidia-adapter"), enable_lora=True, dtype="float32")
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    assert not refusals(vllm_config, config)
    on_cuda(vllm_config)
    (text,) = refusals(vllm_config, config)
    assert "--enable-lora is set on a GPU" in text and "Add --dtype bfloat16" in text
    vllm_config.model_config.dtype = torch.bfloat16
    assert not refusals(vllm_config, config)


class Settings:
    """vLLM takes any hashable object as additional_config."""

    def compute_hash(self):
        return "x"


def test_additional_settings_of_another_kind(checkpoint):
    vllm_config = engine_config(checkpoint("dense"), kv_cache_dtype="auto")
    vllm_config.additional_config = Settings()
    gates.configure(vllm_config)
    assert isinstance(vllm_config.additional_config, Settings)
    vllm_config = engine_config(checkpoint("nvidia-borrowed"))
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    vllm_config.additional_config = Settings()
    assert any("Make it a dict" in text for text in refusals(vllm_config, config))


@pytest.mark.parametrize(
    ("dtype", "capability", "refused"),
    [("dms_fp8", 80, True), ("dms_fp8", 89, False), ("dms", 80, False)],
)
def test_fp8_needs_a_gpu_that_has_it(checkpoint, on_cuda, monkeypatch, dtype, capability, refused):
    vllm_config = engine_config(checkpoint("nvidia-borrowed"), kv_cache_dtype=dtype)
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    on_cuda(vllm_config)
    monkeypatch.setattr(
        module.current_platform, "has_device_capability", lambda needed: capability >= needed
    )
    texts = refusals(vllm_config, config)
    assert any("dms_fp8" in text for text in texts) == refused


@pytest.mark.parametrize(
    ("dtype", "head_dim", "refused"),
    [("dms_int4", 32, True), ("dms_int4", 64, False), ("dms_fp8", 32, False)],
)
def test_int4_needs_heads_that_it_can_cut(checkpoint, dtype, head_dim, refused):
    path = checkpoint("nvidia-borrowed", head_dim=head_dim)
    if refused:
        with pytest.raises(ValueError, match=r"head_dim 32.*dms_fp8"):
            engine_config(path, kv_cache_dtype=dtype)
    else:
        engine_config(path, kv_cache_dtype=dtype)


def test_other_platforms_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(module.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(module.current_platform, "is_cuda", lambda: False)
    vllm_config = engine_config(checkpoint("dense"), kv_cache_dtype="auto")
    config = DMSConfig("nvidia-borrowed", 64, 1.0, 0.0, shift=1)
    assert any("NVIDIA GPUs" in text for text in module.refusals(vllm_config, config))


@pytest.mark.parametrize(
    ("pooling", "refused"), [("LAST", False), ("MEAN", True)], ids=["last token", "mean"]
)
def test_prefix_cache_is_refused_where_pooling_needs_a_prompt_in_one_step(
    checkpoint, pooling, refused
):
    """vLLM's engine would end at the first prompt that is read in part."""
    path, kind = checkpoint("nvidia-borrowed"), {"runner": "pooling", "convert": "embed"}
    kind["pooler_config"] = {"seq_pooling_type": pooling}
    vllm_config = engine_config(path, **kind)
    config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
    assert not refusals(vllm_config, config)
    texts = refusals(vllm_config, config, prefix_cache=True)
    assert [text.startswith("prefix_cache is true") for text in texts] == [True] * refused
