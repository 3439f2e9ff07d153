"""From the user's flags to an engine configured for DMS, or one clear error.

`configure` runs in the frontend, for every model, before vLLM resolves what depends on it; child
processes receive its result with the pickled config. It may run again on a copy of a config.
"""

import os
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_hf_file_to_dict

from vllm_dms.compat import check_hooks, check_vllm_version
from vllm_dms.config import DMSConfig
from vllm_dms.formats import SUPPORTED_FORMATS
from vllm_dms.models.families import family_of, family_of_architectures

logger = init_logger(__name__)

CACHE_DTYPES = {"dms": "model", "dms_fp8": "fp8"}  # flag value -> DMSConfig.storage
CONNECTOR = "DMSConnector"
# vLLM's own list plus ours; set before vLLM fills in its default.
ATTENTION_OP = "vllm_dms::attention"


def prepare(engine_args: Any) -> None:
    """Before vLLM reads config.json: what it would make of a student that Model-Optimizer exported.

    ``engine_args`` is a copy, and no other engine's.
    """
    if engine_args.kv_cache_dtype not in CACHE_DTYPES:
        return
    model = engine_args.model
    if engine_args.trust_remote_code and engine_args.tokenizer in (None, model):
        logger.info("--trust-remote-code is not used: DMS needs no code of %s.", model)
        engine_args.trust_remote_code = False
    config = get_hf_file_to_dict(
        "config.json", engine_args.hf_config_path or model, engine_args.revision
    )
    family = family_of(config or {})
    # Missing, or the bare backbone, which vLLM takes for a pooling model. (No dict: a function.)
    if family is None or family_of_architectures(config.get("architectures") or []) is not None:
        return
    if isinstance(engine_args.hf_overrides, dict):
        engine_args.hf_overrides = {
            "architectures": [family.architecture],
            **engine_args.hf_overrides,
        }


def configure(vllm_config: VllmConfig) -> None:
    """Apply ``--kv-cache-dtype dms`` or ``dms_fp8``; without it, only warn where DMS was meant."""
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in CACHE_DTYPES:
        _warn_if_dense(vllm_config)
        return
    check_vllm_version()
    check_hooks()
    storage = CACHE_DTYPES[cache_dtype]
    config = _read_config(vllm_config, storage)
    for refusal in _refusals(vllm_config, config):
        raise ValueError(f"--kv-cache-dtype {cache_dtype}: {refusal}")
    _apply(vllm_config, config)


def settings_in(additional_config: Any) -> Any:
    """What ``--additional-config`` has under "dms". vLLM allows other types than a dict there."""
    return additional_config.get("dms") if isinstance(additional_config, dict) else None


def _read_config(vllm_config: VllmConfig, storage: str) -> DMSConfig:
    model = vllm_config.model_config
    metadata = get_hf_file_to_dict("dms_metadata.json", model.model, model.revision)
    overrides = settings_in(vllm_config.additional_config)
    config = DMSConfig.from_checkpoint(model.hf_config, metadata, overrides, storage)
    if config is None:
        raise ValueError(
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} needs a DMS checkpoint, but "
            f"{model.model} has no DMS settings. {SUPPORTED_FORMATS} Serve this model with "
            "--kv-cache-dtype auto, or retrofit it."
        )
    return config


def _refusals(vllm_config: VllmConfig, config: DMSConfig) -> list[str]:
    """What is set but not built or not tested with DMS: the setting, the reason, the remedy."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    parallel, hf_config = vllm_config.parallel_config, model.hf_config
    architectures = getattr(hf_config, "architectures", None) or []
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    ranks = parallel.tensor_parallel_size
    borrowers = 1 if config.alpha_per == "layer" else model.get_total_num_kv_heads()
    checks = {
        f"architecture {architectures} is not supported. {SUPPORTED_FORMATS}": (
            family_of_architectures(architectures) is None
        ),
        f"--model-impl is {model.model_impl!r}, but DMS is built into vLLM's own models. Remove "
        "it.": model.model_impl not in ("auto", "vllm"),
        "--speculative-config is set, but draft tokens would commit evictions that a rejected "
        "draft can't undo. Remove --speculative-config.": vllm_config.speculative_config,
        "--kv-transfer-config is set, but DMS uses vLLM's KV connector slot itself, and its pages "
        "can't be moved to another instance. Remove --kv-transfer-config.": (
            vllm_config.kv_transfer_config
        ),
        "--ec-transfer-config is set, which is not tested with DMS. Remove it.": (
            vllm_config.ec_transfer_config
        ),
        "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, which vLLM refuses with any KV "
        "connector, and DMS is one for vLLM. Unset it.": (
            "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
            and not model.enable_cumem_allocator
        ),
        "VLLM_USE_BREAKABLE_CUDAGRAPH is set, but it cuts CUDA graphs at vLLM's own attention, "
        "not at DMS's. Unset it.": envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
        "VLLM_BATCH_INVARIANT is set, but how DMS splits a row over the GPU depends on the whole "
        "batch, and with it the last bits of the result. Unset it.": envs.VLLM_BATCH_INVARIANT,
        "--kv-offloading-size is set, but DMS pages can't be offloaded. Remove it.": (
            cache.kv_offloading_size
        ),
        "--decode-context-parallel-size or --prefill-context-parallel-size is above 1, but a row "
        "of survivors is not split over ranks. Set both to 1.": (
            (parallel.decode_context_parallel_size or 1) > 1
            or (parallel.prefill_context_parallel_size or 1) > 1
        ),
        f"--tensor-parallel-size is {ranks}, but the query head whose channel decides for "
        f"{borrowers} KV head(s) is on one rank only. Use at most {borrowers}.": (
            ranks > borrowers and not config.adapter
        ),
        "--pipeline-parallel-size is above 1, but reports of pages in use come from one stage "
        "only. Use --tensor-parallel-size instead.": parallel.pipeline_parallel_size > 1,
        "--enable-dbo is set, but DMS keeps one step's state at a time. Remove it.": (
            parallel.use_ubatching
        ),
        "--enable-fault-tolerance is set, but after a failed step vLLM may hand on its report of "
        "pages in use with the next step's. Remove --enable-fault-tolerance.": (
            parallel.enable_fault_tolerance
        ),
        "--enable-lora is set, but adapters on q_proj would change eviction decisions, which is "
        "not tested. Merge the adapter into the checkpoint or remove --enable-lora.": (
            vllm_config.lora_config
        ),
        "--enable-sleep-mode is set, but the device state beside the KV cache is not saved. Remove "
        "--enable-sleep-mode.": model.enable_sleep_mode,
        "--compilation-config has pass_config.fuse_attn_quant on, which fuses a quantization into "
        "vLLM's own attention op, but DMS replaces that op. Remove it.": (
            vllm_config.compilation_config.pass_config.fuse_attn_quant
        ),
        "the model has sliding-window or linear attention layers, but DMS replaces full attention "
        "only. Serve it with --kv-cache-dtype auto.": (
            layer_types != {"full_attention"} or cache.sliding_window is not None
        ),
        "the model has dual_chunk_attention_config, but DMS computes plain causal attention. "
        "Remove it from config.json, or serve this model with --kv-cache-dtype auto.": (
            getattr(hf_config, "dual_chunk_attention_config", None)
        ),
        "the model has is_causal: false (bidirectional attention), but DMS computes plain causal "
        "attention. Serve it with --kv-cache-dtype auto.": (
            getattr(hf_config, "is_causal", True) is False
        ),
        "--kv-cache-dtype-skip-layers is set, but all layers share one arena. Remove it.": (
            cache.kv_cache_dtype_skip_layers
        ),
        "the checkpoint quantizes its KV cache to FP8, but DMS pages hold the model's dtype or "
        "their own FP8 format. Use a checkpoint without kv_cache_scheme.": _fp8_kv(hf_config),
        'kernels is "triton", but this platform has no CUDA device. Use "auto" or "torch".': (
            config.kernels == "triton" and vllm_config.device_config.device_type != "cuda"
        ),
        'kernels is "torch", which waits for the GPU in the middle of a step and so can\'t be in a '
        'CUDA graph. Add --enforce-eager or use "auto".': (
            config.kernels == "torch"
            and vllm_config.device_config.device_type == "cuda"
            and not model.enforce_eager
        ),
        f"additional_config is a {type(vllm_config.additional_config).__name__}, but DMS keeps its "
        "settings there. Make it a dict.": not isinstance(vllm_config.additional_config, dict),
        f"the platform is {current_platform.device_name}, but DMS is built for NVIDIA GPUs and "
        "CPUs only. Serve this model with --kv-cache-dtype auto.": not (
            current_platform.is_cuda() or current_platform.is_cpu()
        ),
        "--kv-cache-dtype dms_fp8 needs a GPU that converts FP8 itself: compute capability 8.9 "
        "(Ada, Hopper) or newer. Use --kv-cache-dtype dms.": (
            config.storage == "fp8"
            and config.kernels != "torch"
            and vllm_config.device_config.device_type == "cuda"
            and not current_platform.has_device_capability(89)
        ),
    }
    return [text for text, is_set in checks.items() if is_set]


def _fp8_kv(hf_config: Any) -> bool:
    quantization = getattr(hf_config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    nested = quantization.get("quantization") or {}
    return any(
        section.get(key)
        for section in (quantization, nested)
        for key in ("kv_cache_scheme", "kv_cache_quant_algo")
    )


def _apply(vllm_config: VllmConfig, config: DMSConfig) -> None:
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching:
        logger.warning(
            "Prefix caching is turned off: with --kv-cache-dtype dms a block holds survivors of "
            "one request, which another request can't share."
        )
        cache.enable_prefix_caching = False
    if current_platform.is_cpu() and not cache.user_specified_block_size:
        # vLLM's own choice there, which 0.33 makes only after the model fixed the arena's layout.
        cache.block_size = 128
    backend = vllm_config.attention_config.backend
    if backend is not None:
        logger.warning("--attention-backend %s has no effect: DMS brings its own.", backend.name)
    # The pages hold the model's dtype or FP8 by DMS's own rule; vLLM's tables know neither name.
    cache.cache_dtype = "auto"
    vllm_config.additional_config = {**vllm_config.additional_config, "dms": config.to_dict()}
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="vllm_dms.connector",
        # How a request that can never go on is ended; see `vllm_dms.connector`.
        kv_load_failure_policy="fail",
        # Not a consumer: consumers make the scheduler delay freeing blocks.
        kv_role="kv_producer",
    )
    compilation = vllm_config.compilation_config
    splitting = compilation.splitting_ops
    if splitting is None:
        splitting = [*compilation._attention_ops]
    if splitting and ATTENTION_OP not in splitting:
        compilation.splitting_ops = [*splitting, ATTENTION_OP]
    _select_model(vllm_config)


def _select_model(vllm_config: VllmConfig) -> None:
    """Serve this model, and no other of its architecture, with the DMS model class."""
    model = vllm_config.model_config
    family = family_of_architectures(model.hf_config.architectures)
    assert family is not None, "refused above"
    architectures = [family.dms_architecture]
    model.hf_config.architectures = architectures
    model.model_arch_config.architectures = architectures
    model._model_info, model._architecture = model.registry.inspect_model_cls(architectures, model)


def _warn_if_dense(vllm_config: VllmConfig) -> None:
    model, overrides = vllm_config.model_config, settings_in(vllm_config.additional_config)
    connector = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    if connector == CONNECTOR and isinstance(overrides, dict) and "dialect" in overrides:
        return  # configured already
    if overrides is not None:
        raise ValueError(
            f'--additional-config has "dms": {overrides!r}, but --kv-cache-dtype is '
            f"{vllm_config.cache_config.cache_dtype!r}, so it would have no effect. Add "
            "--kv-cache-dtype dms or remove the setting."
        )
    if family_of_architectures(getattr(model.hf_config, "architectures", None) or []) is None:
        return
    keys = model.hf_config.to_dict()
    local = Path(model.model, "dms_metadata.json").is_file()
    if local or "dms_window_size" in keys or {"alpha_scale", "alpha_offset"} <= keys.keys():
        logger.warning(
            "%s is a DMS checkpoint served without --kv-cache-dtype dms: nothing is evicted, the "
            "KV cache keeps its full size, and where the decision borrows a query channel that "
            "channel's noise enters attention. Add --kv-cache-dtype dms.",
            model.model,
        )
