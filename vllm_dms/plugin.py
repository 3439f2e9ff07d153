"""Where vLLM enters the plugin, in order: the map of the project. All it needs of vLLM: `hooks`.

`register` runs in each vLLM process (frontend, engine core, worker, model inspection), before the
config of that process is made or used. It changes nothing for engines that don't ask for DMS.
"""

import logging

from vllm_dms import compat

logger = logging.getLogger("vllm.vllm_dms")


def register() -> None:
    """Hook into vLLM, or, if this vLLM lacks a hook, say which and leave it as it was: it may be
    serving something else. `--kv-cache-dtype dms` then is an unknown value."""
    from vllm_dms.gates import configure, prepare

    try:
        # The frontend: flags and checkpoint to a configured engine, or an error. First, because a
        # flag that is accepted must be acted on.
        compat.wrap_config_hook(configure)
        compat.wrap_model_config(prepare)
        # The flag: --kv-cache-dtype dms, dms_fp8, dms_int4.
        compat.patch_cache_dtype()
    except compat.MissingHookError as error:
        logger.error("%s vLLM runs on without DMS.", error)
        return

    # The models. Named by path: imported only by an engine that serves one.
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_dms.models.families import FAMILIES

    for family in FAMILIES:
        for name in (family.dms_architecture, family.nvidia_architecture):
            ModelRegistry.register_model(name, f"vllm_dms.models:{family.dms_architecture}")

    # The worker's side: `models.graft`, which makes those models, imports `backend.attention`, and
    # that registers its backend.

    # The scheduler's side: spec and manager. vLLM's own specs first: its registry fills itself
    # only while it is empty. The connector is named in the config (`gates`) and needs no entry.
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_dms.arena.spec import DMSCacheSpec
    from vllm_dms.core.manager import DMSManager

    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(DMSCacheSpec, DMSManager)
