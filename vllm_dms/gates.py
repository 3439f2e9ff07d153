"""From the user's flags to an engine configured for DMS, or one clear error.

`configure` runs in the frontend, for every model, before vLLM resolves what depends on it; child
processes receive its result with the pickled config. It may run again on a copy of a config.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_hf_file_to_dict

from vllm_dms.adapter_paths import base_of_adapter_alone, fetch_adapter
from vllm_dms.adapters import (
    adapted_config,
    check_against_base,
    read_adapter,
)
from vllm_dms.compat import check_hooks, check_vllm_version
from vllm_dms.config import ADAPTER, ADAPTER_REVISION, OVERRIDES, DMSConfig
from vllm_dms.formats import SUPPORTED_FORMATS
from vllm_dms.models.families import family_of, family_of_architectures
from vllm_dms.refusals import refusals

logger = init_logger(__name__)

# Flag value -> DMSConfig.storage.
CACHE_DTYPES = {"dms": "model", "dms_fp8": "fp8", "dms_int4": "int4"}
CONNECTOR = "DMSConnector"
SCHEDULER = "vllm_dms.core.scheduler.make_scheduler"  # with `prefix_cache`
# vLLM's own list plus ours; set before vLLM fills in its default.
ATTENTION_OPS = ("vllm_dms::attention", "vllm_dms::attention_of_projection")


def prepare(engine_args: Any) -> None:
    """Before vLLM reads config.json: of an adapter alone the base is served, and a student that
    Model-Optimizer exported is no pooling model.

    ``engine_args`` is a copy, and no other engine's. What it says of an adapter (`dms_adapter`)
    comes back on the model's config.
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
    base = base_of_adapter_alone(model, config or {})
    if base is not None:
        engine_args.dms_adapter = {ADAPTER: model, ADAPTER_REVISION: engine_args.revision}
        engine_args.served_model_name = engine_args.served_model_name or model
        engine_args.model, engine_args.revision = base, None
        config = get_hf_file_to_dict("config.json", base, None)
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
    """Apply ``--kv-cache-dtype dms``, ``dms_fp8`` or ``dms_int4``; without it, only warn where DMS
    was meant."""
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in CACHE_DTYPES:
        _warn_if_dense(vllm_config)
        return
    check_vllm_version()
    check_hooks()
    _check_place_of_settings(vllm_config.additional_config)
    storage = CACHE_DTYPES[cache_dtype]
    config = _read_config(vllm_config, storage)
    for refusal in refusals(vllm_config, config):
        raise ValueError(f"--kv-cache-dtype {cache_dtype}: {refusal}")
    _apply(vllm_config, config)


def settings_in(additional_config: Any) -> Any:
    """What ``--additional-config`` has under "dms". vLLM allows other types than a dict there."""
    return additional_config.get("dms") if isinstance(additional_config, dict) else None


def _check_place_of_settings(additional_config: Any) -> None:
    """ValueError: DMS settings where nothing reads them."""
    if not isinstance(additional_config, dict):
        return  # refused later
    for key in additional_config:
        where = f"--additional-config has {key!r}, which has no effect there"
        if key in (*OVERRIDES, ADAPTER, ADAPTER_REVISION):
            raise ValueError(f"""{where}. Put it under "dms": '{{"dms": {{"{key}": ...}}}}'.""")
        if key != "dms" and str(key).lower().replace("-", "_") in ("dms", "vllm_dms"):
            raise ValueError(f"""{where}. Name it "dms": '{{"dms": {{...}}}}'.""")


def _read_config(vllm_config: VllmConfig, storage: str) -> DMSConfig:
    model = vllm_config.model_config
    metadata = get_hf_file_to_dict("dms_metadata.json", model.model, model.revision)
    overrides = settings_in(vllm_config.additional_config)
    if alone := getattr(model, "dms_adapter", None):
        overrides = alone | (overrides or {})
    if isinstance(overrides, dict) and {ADAPTER, ADAPTER_REVISION} & overrides.keys():
        return _read_adapter_config(vllm_config, overrides, storage)
    config = DMSConfig.from_checkpoint(model.hf_config, metadata, overrides, storage)
    if config is None:
        raise ValueError(
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} needs a DMS checkpoint, but "
            f"{model.model} has no DMS settings. {SUPPORTED_FORMATS} Serve this model with "
            "--kv-cache-dtype auto, or retrofit it."
        )
    return config


def _read_adapter_config(vllm_config: VllmConfig, settings: dict, storage: str) -> DMSConfig:
    """Decisions from an adapter's directory or repository, over this model as it is."""
    overrides = {k: v for k, v in settings.items() if k not in (ADAPTER, ADAPTER_REVISION)}
    if ADAPTER not in settings:
        raise ValueError(
            f'"{ADAPTER_REVISION}" is set in "dms" in --additional-config without "{ADAPTER}". Set '
            "both, or remove it."
        )
    path = fetch_adapter(
        settings[ADAPTER],
        settings.get(ADAPTER_REVISION),
        vllm_config.load_config.download_dir,
    )
    adapter, hf_config = read_adapter(path), vllm_config.model_config.hf_config
    check_against_base(adapter, hf_config)
    merged = adapted_config(adapter, hf_config)
    config = DMSConfig.from_checkpoint(merged, None, overrides, storage)
    assert config is not None and config.adapter, "adapted_config says so"
    logger.info("DMS decisions come from adapter %s.", settings[ADAPTER])
    return replace(config, adapter_dir=str(path))


def transfer_config() -> KVTransferConfig:
    """What makes vLLM load the connector, in the scheduler and in each worker."""
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="vllm_dms.connector",
        # How a request that can never go on is ended; see `vllm_dms.connector`.
        kv_load_failure_policy="fail",
        # Not a consumer: consumers make the scheduler delay freeing blocks.
        kv_role="kv_producer",
    )


def _apply(vllm_config: VllmConfig, config: DMSConfig) -> None:
    cache = vllm_config.cache_config
    if config.prefix_cache:
        _cut_chunks(vllm_config)
    elif cache.enable_prefix_caching:
        logger.warning(
            "Prefix caching is turned off: with --kv-cache-dtype dms it is DMS's own, and on with "
            """--additional-config '{"dms": {"prefix_cache": true}}'."""
        )
    cache.enable_prefix_caching = False  # vLLM's, which shares blocks: survivors are of one request
    if current_platform.is_cpu() and not cache.user_specified_block_size:
        # vLLM's own choice there, which 0.33 makes only after the model fixed the arena's layout.
        cache.block_size = 128
    backend = vllm_config.attention_config.backend
    if backend is not None:
        logger.warning("--attention-backend %s has no effect: DMS brings its own.", backend.name)
    # For `vllm:cache_config_info`, which shows what this object holds.
    cache.dms_cache_dtype = cache.cache_dtype
    # What the pages hold is DMS's own rule; vLLM's tables know none of its names.
    cache.cache_dtype = "auto"
    vllm_config.additional_config = {**vllm_config.additional_config, "dms": config.to_dict()}
    vllm_config.kv_transfer_config = transfer_config()
    compilation = vllm_config.compilation_config
    splitting = compilation.splitting_ops
    if splitting is None:
        splitting = [*compilation._attention_ops]
    if splitting:
        missing = [op for op in ATTENTION_OPS if op not in splitting]
        compilation.splitting_ops = [*splitting, *missing]
    _select_model(vllm_config)


def _cut_chunks(vllm_config: VllmConfig) -> None:
    """States are kept where a prompt's chunk ends, so chunks end where states are to be kept."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        logger.warning(
            "--scheduler-cls %s: prompts that begin the same share a state only where one of them "
            "ends, not where they diverge.",
            scheduler.scheduler_cls,
        )
        return
    scheduler.scheduler_cls = SCHEDULER


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
