"""The channel between scheduler and worker, in the shape of a KV connector.

vLLM has no other official one. Nothing is transferred between engines: the scheduler's half sends
block rows down (`messages.DMSStepMeta`) and takes page counts in (`messages.DMSReport`); the
worker's half puts the first on the device and reads the second from it.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.forward_context import ForwardContext
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_dms.arena.messages import DMSReport, DMSStepMeta
from vllm_dms.backend.runtime import Runtime, bound_runtime
from vllm_dms.backend.updates import apply_message
from vllm_dms.config import DMSConfig
from vllm_dms.core.banner import banner
from vllm_dms.core.manager import DMSManager
from vllm_dms.core.metrics import Changes, DMSConnectorStats, DMSPromMetrics
from vllm_dms.core.stats import Stats

logger = init_logger(__name__)


class DMSConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
        # The scheduler's half.
        self._manager: DMSManager
        self.stats: Stats
        self._changes: Changes
        # The worker's half.
        self._runtime: Runtime

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nobody waits for this engine's blocks

    # The scheduler's half.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], DMSManager):
            raise ValueError(
                f"the KV cache has managers {[type(m).__name__ for m in managers]}, but DMS needs "
                "all attention layers in one DMS cache. Serve this model with "
                "--kv-cache-dtype auto."
            )
        self._manager = managers[0]
        if self._config.prefix_cache:
            self._manager.keep_states()
        self.stats = Stats(self._manager, self._config.evict, self._config.log_interval)
        self._changes = Changes(self.stats, self._manager)
        model_len = self._vllm_config.model_config.max_model_len
        blocks = self._manager.num_usable_blocks
        logger.info("%s", banner(self._manager.spec, self._config, blocks, model_len))

    def on_new_request(self, request: Request) -> None:
        if request.resumable:
            self._manager.sessions.open(request)
        if self._manager.prefix is not None:
            self._manager.prefix.branches.arrives(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Of a state that is kept; it is restored by the message of the step that starts it."""
        prefix = self._manager.prefix
        return (0 if prefix is None else prefix.match(request)), False

    def chunk_of(self, request: Request, start: int, num_tokens: int) -> int:
        """For `core.scheduler`: the next chunk's tokens, of at most ``num_tokens``."""
        prefix = self._manager.prefix
        return (
            num_tokens if prefix is None else prefix.branches.chunk_of(request, start, num_tokens)
        )

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> DMSStepMeta:
        # So that `start_load_kv` runs before the forward pass, not after it.
        scheduler_output.has_sync_kv_loads = True
        self.stats.preemptions += len(scheduler_output.preempted_req_ids or ())
        return self._manager.close_step(scheduler_output.num_scheduled_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.invalid_block_ids:
            self._manager.forget_failed(connector_output.invalid_block_ids)
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, DMSReport):
            step, growth = self._manager.merge(report)
            self.stats.add(step, report.usage, growth)

    def has_pending_block_frees(self) -> bool:
        return self._manager.should_wait()

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._manager.request_finishes(request)
        return False, {"dms": self.stats.of_finished(request.request_id)}

    def reset_cache(self) -> bool:
        if self._manager.prefix is not None:
            self._manager.prefix.clear()
        return True

    def get_kv_connector_stats(self) -> DMSConnectorStats | None:
        return self._changes.take() if self.role is KVConnectorRole.SCHEDULER else None

    # The front end's.

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DMSConnectorStats:
        return DMSConnectorStats()  # for vLLM's log, which has nothing to say of it

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> DMSPromMetrics:
        return DMSPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Nothing to do: `start_load_kv` finds the cache of the model that is about to run."""

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        # Not kept from the start: engines that share a process share its worker connector.
        self._runtime = bound_runtime(forward_context.no_compile_layers)
        apply_message(self._runtime.state, self._runtime.snapshots, self._meta())

    def build_connector_worker_meta(self) -> DMSReport | None:
        meta = self._meta()
        return self._runtime.reporter.report(meta) if len(meta.states) else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """How the scheduler is made to end a request that can't go on: with the load failure
        policy "fail", a failed block ends the running request that owns it with an error."""
        return set(self._meta().fail_blocks)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The same for requests that wait, as the manager made them do, for a transfer."""
        ended = self._meta().fail_requests
        return KVConnectorTransferResults(finished_recving=set(ended), failed_recving=set(ended))

    def _meta(self) -> DMSStepMeta:
        meta: KVConnectorMetadata = self._get_connector_metadata()
        assert isinstance(meta, DMSStepMeta)
        return meta

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
