"""Run-time patches of vLLM, one function each, and the check of the hooks the plugin needs.

Every patch says: symptom, cause, what changes, when to remove it. Each is idempotent, changes
nothing for a server that does not ask for DMS, and raises `MissingHookError` naming its target
if vLLM no longer has it. `patches/` holds the source diff that makes each of them unnecessary.
"""

import copy
import functools
import importlib
import inspect
import logging
import sys
import typing
from collections.abc import Callable, Iterable

from vllm_dms.hooks import REQUIRED_HOOKS

# vLLM gives handlers and a level only to the loggers below "vllm"; this package's join them.
# Without it warnings come bare, and the start-up banner not at all.
logging.getLogger("vllm_dms").parent = logging.getLogger("vllm")
logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32.0", "0.33.0")


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
        return functools.reduce(_attribute, path.split("."), importlib.import_module(module))
    except (ModuleNotFoundError, AttributeError) as error:
        raise MissingHookError({name: REQUIRED_HOOKS.get(name, "a patch")}) from error


def _attribute(owner: typing.Any, name: str) -> typing.Any:
    """getattr; of a field that a class only declares, what it is declared to be."""
    if inspect.isclass(owner) and not hasattr(owner, name):
        for cls in owner.__mro__:
            if name in (declared := inspect.get_annotations(cls)):
                return declared[name]
    return getattr(owner, name)


def check_hooks(hooks: dict[str, str] = REQUIRED_HOOKS) -> None:
    """Raise one MissingHookError that names every hook that is gone.

    Called where DMS is asked for, and again by the first worker layer: layers and models, which
    take seconds to import, are looked at only by a process that has them.
    """
    missing = {}
    for name, purpose in hooks.items():
        module = name.partition(":")[0]
        if module.startswith("vllm.model_executor.") and module not in sys.modules:
            continue
        try:
            resolve_hook(name)
        except MissingHookError:
            missing[name] = purpose
    if missing:
        raise MissingHookError(missing)


def patch_cache_dtype(names: Iterable[str] = ("dms", "dms_fp8", "dms_int4")) -> None:
    """Let --kv-cache-dtype and CacheConfig accept `names`.

    Symptom: `invalid choice: 'dms'` on the command line, a pydantic error in `LLM(...)`.
    Cause: in vLLM 0.32 the accepted values are a `Literal`, read by argparse, pydantic and the
        backend selector.
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
    """vLLM's `KVCacheDTypeHandler`; the configuration hook replaces the value by "auto"
    before anything is stored, so nothing here decides how the cache is laid out."""

    def torch_dtype(self) -> object:
        import torch

        return torch.bfloat16

    def quant_mode(self) -> object:
        return importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode.NONE


def wrap_config_hook(configure: Callable[[typing.Any], None]) -> None:
    """Call `configure(vllm_config)` before vLLM's own per-architecture checks, for every model.

    Symptom: `dms` on a model without DMS ends in a bare `KeyError: 'dms'` in the worker, since
        vLLM 0.33 in an error that says that the attention backend does not support it.
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

    def try_verify_and_update_config(original: Callable, self: typing.Any) -> None:
        if self.model_config is not None:
            configure(self)
        original(self)

    _wrap_once("vllm.config.vllm:VllmConfig", try_verify_and_update_config)


def wrap_model_config(prepare: Callable[[typing.Any], None]) -> None:
    """Call `prepare(engine_args)` before vLLM reads the checkpoint's config.json.

    Symptom: a student exported by Model-Optimizer is served as a pooling model, for vLLM takes a
        config without `architectures` for one; with --trust-remote-code it fails to import the
        code that `auto_map` names.
    Cause: a plugin can replace the parser of a config format for all engines
        (`register_config_parser`), or see the config when the model's kind is decided already.
    Change: `EngineArgs.create_model_config` runs on a copy of the arguments that `prepare` saw.
        What `prepare` left there as `dms_adapter` goes on to the model's config.
    Remove when: vLLM has `register_engine_args_hook` (offered in `patches/`), used here if there.
    """
    module = typing.cast(typing.Any, importlib.import_module("vllm.engine.arg_utils"))
    if hasattr(module, "register_engine_args_hook"):
        module.register_engine_args_hook(prepare)
        return

    def create_model_config(original: Callable, self: typing.Any) -> typing.Any:
        args = copy.copy(self)
        prepare(args)
        model_config = original(args)
        if hasattr(args, "dms_adapter"):
            model_config.dms_adapter = args.dms_adapter
        return model_config

    _wrap_once("vllm.engine.arg_utils:EngineArgs", create_model_config)


def _wrap_once(owner: str, wrapper: Callable) -> None:
    """`wrapper(original, self)` for the method of its name; ``owner``: "module:Class"."""
    name = wrapper.__name__
    original = typing.cast(typing.Any, resolve_hook(f"{owner}.{name}"))
    if getattr(original, "__wrapped_by__", None) == __name__:
        return

    @functools.wraps(original)
    def method(self: typing.Any) -> typing.Any:
        return wrapper(original, self)

    method.__wrapped_by__ = __name__  # type: ignore[attr-defined]
    setattr(resolve_hook(owner), name, method)
