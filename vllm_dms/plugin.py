"""Every hook into vLLM, in order: the map of the project.

`register` runs in each vLLM process (frontend, engine core, worker, model inspection), before the
config of that process is made or used. It changes nothing for engines that don't ask for DMS.
"""

from vllm_dms import compat


def register() -> None:
    # The flag: --kv-cache-dtype dms, dms_fp8.
    compat.patch_cache_dtype()

    # The frontend: flags and checkpoint to a configured engine, or an error.
    from vllm_dms.gates import configure

    compat.wrap_config_hook(configure)

    # The models. Named by path: imported only by an engine that serves one.
    from vllm.model_executor.models.registry import ModelRegistry

    qwen3, llama = (
        "vllm_dms.models.qwen3:DMSQwen3ForCausalLM",
        "vllm_dms.models.llama:DMSLlamaForCausalLM",
    )
    for name, target in {
        "DMSQwen3ForCausalLM": qwen3,
        "Qwen3ForCausalLMDMS": qwen3,  # Model-Optimizer's name for its adapter form
        "DMSLlamaForCausalLM": llama,
        "LlamaForCausalLMDMS": llama,
    }.items():
        ModelRegistry.register_model(name, target)

    # The worker's side. CUSTOM is the name that every process can unpickle.
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(
        AttentionBackendEnum.CUSTOM, "vllm_dms.backend.attention.DMSCompactAttentionBackend"
    )

    # The scheduler's side: spec and manager. vLLM's own specs first: its registry fills itself
    # only while it is empty. The connector is named in the config (`gates`) and needs no entry.
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_dms.core.manager import DMSManager
    from vllm_dms.core.spec import DMSCacheSpec

    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(DMSCacheSpec, DMSManager)
