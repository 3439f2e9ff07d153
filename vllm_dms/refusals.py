"""What is set but not built, or not tested, with DMS: an entry for each, by what it belongs to."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_dms.config import DMSConfig
from vllm_dms.formats import SUPPORTED_FORMATS, quantizes_kv_cache
from vllm_dms.models.families import family_of_architectures

ANOTHER_MODEL = "Serve this model with --kv-cache-dtype auto."


@dataclass(frozen=True)
class Refusal:
    setting: str  # what is set, in the user's words
    applies: Any  # truthy: it is set
    reason: str
    remedy: str = "Remove it."

    def __str__(self) -> str:
        return f"{self.setting}, but {self.reason}. {self.remedy}"


def refusals(vllm_config: VllmConfig, config: DMSConfig) -> list[str]:
    """The texts of those that apply."""
    every = (
        *_of_the_model(vllm_config, config),
        *_of_features(vllm_config, config),
        *_of_parallelism(vllm_config, config),
        *_of_compilation(vllm_config, config),
        *_of_the_machine(vllm_config, config),
    )
    return [str(refusal) for refusal in every if refusal.applies]


def _of_the_model(vllm_config: VllmConfig, config: DMSConfig) -> list[Refusal]:
    head_dim = vllm_config.model_config.get_head_size()
    model, hf_config = vllm_config.model_config, vllm_config.model_config.hf_config
    architectures = getattr(hf_config, "architectures", None) or []
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    return [
        Refusal(
            f"architectures is {architectures}",
            family_of_architectures(architectures) is None,
            "DMS is not implemented for it",
            """If it is one of those below, say so: --hf-overrides '{"architectures": """
            f"""["Qwen3ForCausalLM"]}}'. {SUPPORTED_FORMATS}""",
        ),
        Refusal(
            f"--model-impl is {model.model_impl!r}",
            model.model_impl not in ("auto", "vllm"),
            "DMS is built into vLLM's own models",
        ),
        Refusal(
            "the model has sliding-window or linear attention layers",
            layer_types != {"full_attention"} or vllm_config.cache_config.sliding_window,
            "DMS replaces full attention only",
            ANOTHER_MODEL,
        ),
        Refusal(
            "the model has dual_chunk_attention_config",
            getattr(hf_config, "dual_chunk_attention_config", None),
            "DMS computes plain causal attention",
            f"Remove it from config.json, or: {ANOTHER_MODEL}",
        ),
        Refusal(
            "the model has is_causal: false (bidirectional attention)",
            getattr(hf_config, "is_causal", True) is False,
            "DMS computes plain causal attention",
            ANOTHER_MODEL,
        ),
        Refusal(
            "the checkpoint quantizes its KV cache to FP8",
            quantizes_kv_cache(hf_config),
            "DMS pages hold the model's dtype or their own formats",
            "Use a checkpoint without kv_cache_scheme.",
        ),
        Refusal(
            f"--kv-cache-dtype is dms_int4 and head_dim {head_dim}",
            config.storage == "int4" and (head_dim < 64 or head_dim & (head_dim - 1)),
            "4-bit pages are made for a head_dim of 64, 128 or another higher power of two",
            "Use --kv-cache-dtype dms_fp8.",
        ),
    ]


def _of_features(vllm_config: VllmConfig, config: DMSConfig) -> list[Refusal]:
    cache, model = vllm_config.cache_config, vllm_config.model_config
    return [
        Refusal(
            "--speculative-config is set",
            vllm_config.speculative_config,
            "draft tokens would commit evictions that a rejected draft can't undo",
        ),
        Refusal(
            "--kv-transfer-config is set",
            vllm_config.kv_transfer_config,
            "DMS uses vLLM's KV connector slot itself, and its pages can't be moved to another "
            "instance",
        ),
        Refusal(
            "--ec-transfer-config is set",
            vllm_config.ec_transfer_config,
            "that is not tested with DMS",
        ),
        Refusal(
            "--kv-offloading-size is set",
            cache.kv_offloading_size,
            "DMS pages can't be offloaded",
        ),
        Refusal(
            "--kv-cache-dtype-skip-layers is set",
            cache.kv_cache_dtype_skip_layers,
            "all layers share one arena",
        ),
        Refusal(
            "prefix_cache is true",
            config.prefix_cache and not model.is_prefix_caching_supported,
            "this pooling needs all of a prompt in one step",
        ),
        Refusal(
            "--enable-sleep-mode is set",
            model.enable_sleep_mode,
            "the device state beside the KV cache is not saved",
        ),
        Refusal(
            f"additional_config is a {type(vllm_config.additional_config).__name__}",
            not isinstance(vllm_config.additional_config, dict),
            "DMS keeps its settings there",
            "Make it a dict.",
        ),
    ]


def _of_parallelism(vllm_config: VllmConfig, config: DMSConfig) -> list[Refusal]:
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    heads = vllm_config.model_config.get_total_num_kv_heads()
    borrowers = 1 if config.alpha_per == "layer" else heads
    return [
        Refusal(
            "--decode-context-parallel-size or --prefill-context-parallel-size is above 1",
            (parallel.decode_context_parallel_size or 1) > 1
            or (parallel.prefill_context_parallel_size or 1) > 1,
            "a row of survivors is not split over ranks",
            "Set both to 1.",
        ),
        Refusal(
            f"--tensor-parallel-size is {ranks}",
            ranks > borrowers and not config.adapter,
            f"the query head whose channel decides for {borrowers} KV head(s) is on one rank only",
            f"Use at most {borrowers}.",
        ),
        Refusal(
            "--pipeline-parallel-size is above 1",
            parallel.pipeline_parallel_size > 1,
            "stages hold different layers, whose pages are not counted together",
            "Use --tensor-parallel-size instead.",
        ),
        Refusal(
            "--enable-dbo is set",
            parallel.use_ubatching,
            "DMS keeps one step's state at a time",
        ),
        Refusal(
            "--enable-fault-tolerance is set",
            parallel.enable_fault_tolerance,
            "after a failed step vLLM may hand on its report of pages in use with the next step's",
        ),
    ]


def _of_compilation(vllm_config: VllmConfig, config: DMSConfig) -> list[Refusal]:
    return [
        Refusal(
            "--compilation-config has pass_config.fuse_attn_quant on",
            vllm_config.compilation_config.pass_config.fuse_attn_quant,
            "it fuses a quantization into vLLM's own attention op, which DMS replaces",
        ),
        Refusal(
            "VLLM_USE_BREAKABLE_CUDAGRAPH is set",
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
            "it cuts CUDA graphs at vLLM's own attention, not at DMS's",
            "Unset it.",
        ),
        Refusal(
            "VLLM_BATCH_INVARIANT is set",
            envs.VLLM_BATCH_INVARIANT,
            "how DMS splits a row over the GPU depends on the whole batch, and with it the last "
            "bits of the result",
            "Unset it.",
        ),
        Refusal(
            'kernels is "torch"',
            config.kernels == "torch"
            and _on_cuda(vllm_config)
            and not vllm_config.model_config.enforce_eager,
            "these operations wait for the GPU in the middle of a step and so can't be in a CUDA "
            "graph",
            'Add --enforce-eager or use "auto".',
        ),
    ]


def _of_the_machine(vllm_config: VllmConfig, config: DMSConfig) -> list[Refusal]:
    on_cuda = _on_cuda(vllm_config)
    return [
        Refusal(
            f"the platform is {current_platform.device_name}",
            not (current_platform.is_cuda() or current_platform.is_cpu()),
            "DMS is built for NVIDIA GPUs and CPUs only",
            ANOTHER_MODEL,
        ),
        Refusal(
            "vLLM uses its V1 model runner (VLLM_USE_V2_MODEL_RUNNER is 0, or there is no Triton)",
            on_cuda and not vllm_config.use_v2_model_runner,
            "on a GPU its empty steps would overwrite the pages of paused requests",
            "Unset VLLM_USE_V2_MODEL_RUNNER, and install Triton.",
        ),
        Refusal(
            "--enable-lora is set on a GPU, and the dtype is float32",
            vllm_config.lora_config and on_cuda and vllm_config.model_config.dtype == torch.float32,
            "vLLM's LoRA kernels take float16 and bfloat16 only",
            "Add --dtype bfloat16.",
        ),
        Refusal(
            'kernels is "triton"',
            config.kernels == "triton" and not on_cuda,
            "this platform has no CUDA device",
            'Use "auto" or "torch".',
        ),
        Refusal(
            "--kv-cache-dtype is dms_fp8",
            config.storage == "fp8"
            and config.kernels != "torch"
            and on_cuda
            and not current_platform.has_device_capability(89),
            "it needs a GPU that converts FP8 itself, of compute capability 8.9 (Ada, Hopper) or "
            "newer",
            "Use --kv-cache-dtype dms.",
        ),
        Refusal(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True",
            "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
            and not vllm_config.model_config.enable_cumem_allocator,
            "vLLM refuses that with any KV connector, and DMS is one for vLLM",
            "Unset it.",
        ),
    ]


def _on_cuda(vllm_config: VllmConfig) -> bool:
    return vllm_config.device_config.device_type == "cuda"
