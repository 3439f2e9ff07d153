"""What vLLM must have: all that the plugin overrides, fills in or patches, by what it is for.

A newer vLLM may rename any of it without an import error in the plugin: an override would just
never be called. `compat.check_hooks` looks them up before an engine starts; `tests/test_hooks.py`
compares `OVERRIDDEN` with the plugin's classes, both ways, and the signatures of its methods with
vLLM's.
"""

from vllm_dms.models.families import FAMILIES

_NORM = "vllm.model_executor.layers.layernorm:RMSNorm"
_ATTENTION, _DECODER_LAYER, _MODEL = (
    [f"{family.module}:{family.architecture.replace('ForCausalLM', name)}" for family in FAMILIES]
    for name in ("Attention", "DecoderLayer", "ForCausalLM")
)
# Classes of the plugin that `models.graft` puts before vLLM's when a model is built, and which.
GRAFTED = {
    "vllm_dms.models.graft:DMSModel": _MODEL,
    "vllm_dms.models.attention:DMSSelfAttention": _ATTENTION,
    "vllm_dms.models.attention:StreamNorm": [_NORM],
}

# A class of vLLM that the plugin's derive from -> what for -> which of its members are replaced.
OVERRIDDEN = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": {
        "the channel from scheduler to worker": "bind_kv_cache_manager build_connector_meta "
        "start_load_kv wait_for_layer_load save_kv_layer wait_for_save",
        "reports of the pages in use": "build_connector_worker_meta update_connector_output",
        "the arena": "register_kv_caches",
        "freeing blocks at once": "requires_kv_delivery",
        "blocks that are the request's own": "get_num_new_matched_tokens update_state_after_alloc",
        "waiting for blocks that are about to return": "has_pending_block_frees",
        "streaming input": "on_new_request",
        "ending a request that can never fit": "get_block_ids_with_load_errors",
        "ending a waiting request that can never fit": "get_transfer_results",
        "forgetting the states that are kept": "reset_cache",
        "the metrics": "get_kv_connector_stats build_kv_connector_stats build_prom_metrics",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats": {
        "the metrics": "is_empty aggregate reduce",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics": {
        "the metrics": "observe",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA": {
        "the figures of a request": "request_finished_all_groups",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorWorkerMetadata": {
        "reports of several ranks": "aggregate",
    },
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": {
        "blocks that follow the survivors": "get_num_blocks_to_allocate allocate_new_blocks "
        "new_step_starts",
        "the end of a request": "pop_blocks_for_free",
        "leaving eviction to the worker": "remove_skipped_blocks",
        "keeping blocks out of the prefix cache": "cache_blocks find_longest_cache_hit",
        "states that are kept": "allocate_external_computed_blocks",
    },
    "vllm.v1.core.sched.scheduler:Scheduler": {
        "chunks that end where a state is kept": "_mamba_block_aligned_split",
    },
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": {
        "chunks that end where a state is kept": "_mamba_block_aligned_split",
    },
    "vllm.v1.kv_cache_interface:AttentionSpec": {
        "keeping blocks out of the prefix cache": "prefix_cacheable",
        "slots that the worker chooses": "uses_slot_mapping",
        "rows that are not split over ranks": "dcp_sharded",
        "the size of the KV cache": "max_memory_usage_bytes max_num_blocks_per_req "
        "copy_with_new_block_size",
    },
    "vllm.v1.attention.backend:AttentionBackend": {
        "the attention backend": "get_name get_impl_cls get_builder_cls supported_dtypes",
        "storing K and V": "forward_includes_kv_cache_update",
        "blocks of one byte range": "supported_kv_cache_layouts",
    },
    "vllm.v1.attention.backend:AttentionMetadataBuilder": {
        "the attention backend": "build",
        "CUDA graphs around attention": "_cudagraph_support",
    },
    "vllm.v1.attention.backend:AttentionImpl": {
        "the attention backend": "forward num_heads head_size scale kv_cache_dtype",
    },
    "vllm.model_executor.layers.attention:Attention": {
        "attention with a decision": "forward",
        "the KV cache spec": "get_kv_cache_spec",
    },
} | {
    owner: purposes
    for owners, purposes in (
        ((*_ATTENTION, _NORM), {"attention with a decision": "forward"}),
        (
            _MODEL,
            {
                "the adapter's weights": "load_weights",
                "no LoRA on a q_proj that decides": "packed_modules_mapping",
            },
        ),
    )
    for owner in owners
}

# What is called by name, patched, or written to: an attribute that vLLM no longer has could still
# be written, and nobody would read it.
_OTHER = {
    "checkpoints without architectures": "vllm.engine.arg_utils:EngineArgs.create_model_config",
    "checks before the engine starts": "vllm.config.vllm:VllmConfig.try_verify_and_update_config",
    "CUDA graphs around attention": "vllm.config:CompilationConfig._attention_ops "
    "vllm.config:CompilationConfig.splitting_ops",
    "what the configuration says": "vllm.config:CacheConfig.cache_dtype "
    "vllm.config:CacheConfig.enable_prefix_caching vllm.config:VllmConfig.additional_config "
    "vllm.config:VllmConfig.kv_transfer_config vllm.config:VllmConfig.use_v2_model_runner "
    "vllm.config.model_arch:ModelArchitectureConfig.architectures",
    # They pass what `input_layernorm` returns on to `self_attn`.
    "the hidden state before it was normed": " ".join(f"{d}.forward" for d in _DECODER_LAYER),
    # A class with another of these rotates otherwise than `backend.projection` (`graft.is_plain`).
    "norms and rotation in one kernel": " ".join(
        f"vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.{name}"
        for name in ("forward_native", "forward_cuda", "forward_static")
    ),
    "prefill by FlashAttention": "vllm.v1.attention.backends.fa_utils:get_flash_attn_version",
    "the models": "vllm.model_executor.models.registry:ModelRegistry.inspect_model_cls "
    "vllm.model_executor.models.registry:ModelRegistry.register_model",
    "the attention backend": "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM "
    "vllm.v1.attention.backends.registry:register_backend",
    "the KV cache spec": "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register "
    "vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs",
    "block rows before the forward pass": "vllm.v1.core.sched.output:"
    "SchedulerOutput.has_sync_kv_loads",
    "states that are kept": "vllm.v1.core.block_pool:BlockPool.unpin_blocks "
    "vllm.v1.core.block_pool:BlockPool.touch vllm.v1.core.block_pool:BlockPool.free_blocks "
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys "
    "vllm.config:SchedulerConfig.scheduler_cls",
    "ending a waiting request that can never fit": "vllm.v1.request:"
    "RequestStatus.WAITING_FOR_REMOTE_KVS",
}

# "module:attribute.path" -> what for.
REQUIRED_HOOKS = {
    f"{owner}.{name}": purpose
    for owner, purposes in OVERRIDDEN.items()
    for purpose, names in purposes.items()
    for name in names.split()
} | {name: purpose for purpose, names in _OTHER.items() for name in names.split()}
