"""Run-time patches of vLLM 0.32, one function each, and the check of the hooks the plugin needs.

Every patch says: symptom, cause, what changes, when to remove it. Each is idempotent, changes
nothing for a server that does not ask for DMS, and raises `MissingHookError` naming its target
if vLLM no longer has it. `patches/` holds the source diff that makes each of them unnecessary.
"""

import copy
import functools
import importlib
import logging
import typing
from collections.abc import Callable, Iterable

# vLLM gives handlers and a level only to the loggers below "vllm"; this package's join them.
# Without it warnings come bare, and the start-up banner not at all.
logging.getLogger("vllm_dms").parent = logging.getLogger("vllm")
logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32.0",)

# What the plugin builds on, "module:attribute.path", and what for. Listed is what a newer vLLM may
# rename without an import error in the plugin itself: what is overridden, filled in or patched.
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1."
_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnector"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager."
REQUIRED_HOOKS = {
    "vllm.config.cache:CacheDType": "the flag --kv-cache-dtype",
    "vllm.config.vllm:VllmConfig.try_verify_and_update_config": "checks before the engine starts",
    "vllm.engine.arg_utils:EngineArgs.create_model_config": "checkpoints without architectures",
    "vllm.config:CompilationConfig._attention_ops": "CUDA graphs around attention",
    "vllm.model_executor.models.registry:ModelRegistry.inspect_model_cls": "the models",
    "vllm.model_executor.models.registry:ModelRegistry.register_model": "the models",
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": "the KV cache spec",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM": "the attention backend",
    "vllm.v1.attention.backends.registry:register_backend": "the attention backend",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": "the KV cache spec",
    "vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs": "the KV cache spec",
    _MANAGER + "get_num_blocks_to_allocate": "blocks that follow the survivors",
    _MANAGER + "allocate_new_blocks": "blocks that follow the survivors",
    _MANAGER + "new_step_starts": "blocks that follow the survivors",
    _MANAGER + "pop_blocks_for_free": "the end of a request",
    _MANAGER + "remove_skipped_blocks": "leaving eviction to the worker",
    _MANAGER + "cache_blocks": "keeping blocks out of the prefix cache",
    _CONNECTOR + "bind_kv_cache_manager": "the channel from scheduler to worker",
    _CONNECTOR + "build_connector_meta": "the channel from scheduler to worker",
    _CONNECTOR + "on_new_request": "streaming input",
    _CONNECTOR + "register_kv_caches": "the arena",
    _CONNECTOR + "requires_kv_delivery": "freeing blocks at once",
    _CONNECTOR + "start_load_kv": "the channel from scheduler to worker",
    _CONNECTOR + "build_connector_worker_meta": "reports of the pages in use",
    _CONNECTOR + "update_connector_output": "reports of the pages in use",
    _CONNECTOR + "has_pending_block_frees": "waiting for blocks that are about to return",
    _CONNECTOR + "get_block_ids_with_load_errors": "ending a request that can never fit",
    _CONNECTOR + "get_transfer_results": "ending a waiting request that can never fit",
    _CONNECTOR + "get_kv_connector_stats": "the metrics",
    _CONNECTOR + "build_kv_connector_stats": "the metrics",
    _CONNECTOR + "build_prom_metrics": "the metrics",
    _METRICS + "Stats.is_empty": "the metrics",
    _METRICS + "Stats.aggregate": "the metrics",
    _METRICS + "Stats.reduce": "the metrics",
    _METRICS + "PromMetrics.observe": "the metrics",
    "vllm.v1.request:RequestStatus.WAITING_FOR_REMOTE_KVS": "ending such a waiting request",
}


class MissingHookError(RuntimeError):
    """vLLM no longer has something the plugin builds on."""

    def __init__(self, hooks: dict[str, str]) -> None:
        names = "; ".join(f"{name} ({purpose})" for name, purpose in hooks.items())
        super().__init__(
            f"vllm-dms needs hooks that vLLM {vllm_version()} does not have: {names}. "
            f"Install vLLM {TESTED_VERSIONS[-1]}, or a vllm-dms made for this vLLM."
        )


def vllm_version() -> str:
    import vllm

    return vllm.__version__


@functools.cache
def check_vllm_version() -> bool:
    """Whether this vLLM was tested; if not, one warning per process. `+cpu` and the like count."""
    version = vllm_version()
    if version.split("+")[0] in TESTED_VERSIONS:
        return True
    logger.warning(
        "vllm-dms was tested with vLLM %s, not with %s; --kv-cache-dtype dms may fail.",
        ", ".join(TESTED_VERSIONS),
        version,
    )
    return False


def resolve_hook(name: str) -> object:
    """The object "module:attribute.path"; raises MissingHookError if it is gone."""
    module, _, path = name.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ModuleNotFoundError, AttributeError) as error:
        raise MissingHookError({name: REQUIRED_HOOKS.get(name, "a patch")}) from error


def check_hooks(hooks: dict[str, str] = REQUIRED_HOOKS) -> None:
    """Raise one MissingHookError that names every hook that is gone.

    Imports the modules it looks into, so it belongs where DMS is asked for, not in `register`.
    """
    missing = {}
    for name, purpose in hooks.items():
        try:
            resolve_hook(name)
        except MissingHookError:
            missing[name] = purpose
    if missing:
        raise MissingHookError(missing)


def patch_cache_dtype(names: Iterable[str] = ("dms", "dms_fp8")) -> None:
    """Let --kv-cache-dtype and CacheConfig accept `names`.

    Symptom: `invalid choice: 'dms'` on the command line, a pydantic error in `LLM(...)`.
    Cause: the accepted values are a `Literal`, read by argparse, pydantic and the backend selector.
    Change: the values are appended to that Literal, and what was derived from it is rebuilt.
    Remove when: the oldest supported vLLM has `register_kv_cache_dtype` (0.33), used here if there.
    """
    cache = importlib.import_module("vllm.config.cache")
    if hasattr(cache, "register_kv_cache_dtype"):
        known = resolve_hook("vllm.config.cache:KV_CACHE_DTYPES")
        for name in names:
            if name not in typing.cast(list[str], known):
                cache.register_kv_cache_dtype(name)(type(name, (_ComputeDtype,), {"name": name}))
        return

    literal = typing.cast(typing.Any, resolve_hook("vllm.config.cache:CacheDType"))
    new = tuple(name for name in names if name not in typing.get_args(literal))
    if not new:
        return
    derived = typing.cast(typing.Any, resolve_hook("vllm.engine.arg_utils:_compute_kwargs"))
    from pydantic.dataclasses import rebuild_dataclass

    literal.__args__ += new
    derived.cache_clear()
    rebuild_dataclass(cache.CacheConfig, force=True)


class _ComputeDtype:
    """Handler for `register_kv_cache_dtype`; the configuration hook replaces the value by "auto"
    before anything is stored, so nothing here decides how the cache is laid out."""

    def torch_dtype(self) -> object:
        import torch

        return torch.bfloat16

    def is_quantized(self) -> bool:
        return False

    def quant_mode(self) -> object:
        return importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode.NONE

    def supports_platform(self, platform: object) -> bool:
        return True


def wrap_config_hook(configure: Callable[[typing.Any], None]) -> None:
    """Call `configure(vllm_config)` before vLLM's own per-architecture checks, for every model.

    Symptom: `dms` on a model without DMS ends in a bare `KeyError: 'dms'` in the worker.
    Cause: vLLM calls configuration hooks by architecture (MODELS_CONFIG_MAP) and only once per
        model config; a plugin can't see the other architectures.
    Change: `VllmConfig.try_verify_and_update_config` calls `configure` first, on every call that
        has a model. vLLM calls it again on copies of a config, so `configure` must be idempotent.
    Remove when: vLLM has `register_config_hook` (offered in `patches/`), used here if there.
    """
    module = typing.cast(typing.Any, importlib.import_module("vllm.config.vllm"))
    if hasattr(module, "register_config_hook"):
        module.register_config_hook(configure)
        return
    name = "vllm.config.vllm:VllmConfig.try_verify_and_update_config"
    original = typing.cast(typing.Any, resolve_hook(name))
    if getattr(original, "__wrapped_by__", None) == __name__:
        return

    @functools.wraps(original)
    def try_verify_and_update_config(self: typing.Any) -> None:
        if self.model_config is not None:
            configure(self)
        original(self)

    try_verify_and_update_config.__wrapped_by__ = __name__  # type: ignore[attr-defined]
    module.VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def wrap_model_config(prepare: Callable[[typing.Any], None]) -> None:
    """Call `prepare(engine_args)` before vLLM reads the checkpoint's config.json.

    Symptom: a student exported by Model-Optimizer is served as a pooling model, for vLLM takes a
        config without `architectures` for one; with --trust-remote-code it fails to import the
        code that `auto_map` names.
    Cause: a plugin can replace the parser of a config format for all engines
        (`register_config_parser`), or see the config when the model's kind is decided already.
    Change: `EngineArgs.create_model_config` runs on a copy of the arguments that `prepare` saw.
    Remove when: vLLM has `register_engine_args_hook` (offered in `patches/`), used here if there.
    """
    module = typing.cast(typing.Any, importlib.import_module("vllm.engine.arg_utils"))
    if hasattr(module, "register_engine_args_hook"):
        module.register_engine_args_hook(prepare)
        return
    name = "vllm.engine.arg_utils:EngineArgs.create_model_config"
    original = typing.cast(typing.Any, resolve_hook(name))
    if getattr(original, "__wrapped_by__", None) == __name__:
        return

    @functools.wraps(original)
    def create_model_config(self: typing.Any) -> typing.Any:
        args = copy.copy(self)
        prepare(args)
        return original(args)

    create_model_config.__wrapped_by__ = __name__  # type: ignore[attr-defined]
    module.EngineArgs.create_model_config = create_model_config
