"""One worker's DMS cache, shared by all layers: layout, device state, scratch, operations."""

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_dms.arena.layout import ArenaLayout, choose_page_size
from vllm_dms.arena.storage import STORAGES
from vllm_dms.backend.flash import find_flash
from vllm_dms.backend.ops import Ops
from vllm_dms.backend.projection import Projection
from vllm_dms.backend.snapshots import Snapshots, TorchSnapshots
from vllm_dms.backend.state import (
    ArenaState,
    allocate_scratch,
    allocate_side_state,
    bind_state,
)
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.updates import NULL_STEP, Reporter, apply_updates
from vllm_dms.config import DMSConfig

logger = init_logger(__name__)

GIB = 1 << 30
MIB = 1 << 20


def make_layout(vllm_config: VllmConfig, config: DMSConfig) -> ArenaLayout:
    """This rank's arena: the same on every rank, because vLLM gives each the same head count."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers, num_kv_heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
    slots_per_block = num_layers * num_kv_heads * vllm_config.cache_config.block_size
    return ArenaLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=model.get_head_size(),
        window=config.window,
        page_size=config.page_size or choose_page_size(config.window, slots_per_block),
        block_size=vllm_config.cache_config.block_size,
        storage=STORAGES[config.storage].for_model(model.dtype),
        max_model_len=model.max_model_len,
    )


def choose_ops(config: DMSConfig, device: torch.device) -> str:
    """ "triton" or "torch", from the setting `kernels` and the device; "flash" is "triton", too."""
    if config.kernels == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return "triton" if config.kernels == "flash" else config.kernels


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def require_memory(
    layout: ArenaLayout, max_num_seqs: int, max_tokens: int, device: torch.device
) -> None:
    """One error instead of an out-of-memory error of PyTorch that names no setting."""
    needed, free = layout.side_bytes(max_num_seqs, max_tokens), free_memory(device)
    if needed > free:
        raise ValueError(
            f"--max-num-seqs {max_num_seqs} and --max-model-len {layout.max_model_len} need "
            f"{needed / GIB:.2f} GiB for page tables and windows beside the KV cache, but only "
            f"{free / GIB:.2f} GiB are free ({device.type}). Lower --max-num-seqs or "
            "--max-model-len."
        )


class Runtime:
    """Made by the first attention layer of a model, found by the others and by the connector.

    The side state exists from then on, so that vLLM's memory profiling sees it; the arena is bound
    when vLLM hands over its KV allocation, and bound again if vLLM replaces it (profiling does).
    """

    def __init__(
        self, vllm_config: VllmConfig, config: DMSConfig, device: torch.device, scale: float
    ) -> None:
        """``scale``: of the softmax, the same in all layers"""
        scheduler = vllm_config.scheduler_config
        self.config, self.scale = config, scale
        self._dtype = vllm_config.model_config.dtype
        self.projection: Projection | None = (
            None  # of the first layer, if `attend_projection` is used
        )
        self.layout = make_layout(vllm_config, config)
        max_num_seqs, max_tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        require_memory(self.layout, max_num_seqs, max_tokens, device)
        self.side = allocate_side_state(self.layout, max_num_seqs, device)
        self.scratch = allocate_scratch(self.layout, max_tokens, device)
        self._make_ops = self._plan_ops(vllm_config, device)
        logger.info_once(
            "DMS attention: %s, in place of the attention backend that vLLM names; "
            "%.1f MiB beside the KV cache for %d requests",
            self._kernels,
            self.layout.side_bytes(max_num_seqs, max_tokens) / MIB,
            max_num_seqs,
        )
        self.ops: Ops
        self.reporter: Reporter
        self.snapshots: Snapshots | None = None  # with `DMSConfig.prefix_cache`
        self._state: ArenaState | None = None
        self._storage_ptr = 0

    def _plan_ops(
        self, vllm_config: VllmConfig, device: torch.device
    ) -> Callable[[ArenaState], Ops]:
        """What makes the operations once there is an arena; their own tensors are made now."""
        common = (self.scratch, self.config, self.scale)
        self._kernels = f"{choose_ops(self.config, device)} kernels"  # for the log
        if choose_ops(self.config, device) == "torch":
            return lambda state: TorchOps(state, *common)
        # Imported here: Triton is absent from CPU installations of vLLM.
        from vllm_dms.backend.kernels.arguments import can_overlap
        from vllm_dms.backend.kernels.schedule import allocate_schedule
        from vllm_dms.backend.kernels.tuning import default_tuning
        from vllm_dms.backend.triton_ops import TritonOps

        tuning = default_tuning(self.layout)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        schedule = allocate_schedule(self.layout, max_num_seqs, heads, tuning, device)
        flash = None
        if self.config.kernels == "flash":
            flash = find_flash(self.layout.head_dim, self._dtype, self.scale, device)
            self._kernels += " and FlashAttention 3"
        overlap = can_overlap(device)
        return lambda state: TritonOps(state, *common, schedule, tuning, overlap, flash)

    @property
    def state(self) -> ArenaState:
        assert self._state is not None, "the KV cache is not bound yet"
        return self._state

    def bind(self, kv_cache: torch.Tensor) -> None:
        """Use the allocation behind ``kv_cache``, any layer's view [num_blocks, ...]. No-op when
        already bound."""
        storage = kv_cache.untyped_storage()
        if storage.data_ptr() == self._storage_ptr:
            return
        flat = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(storage)
        state = bind_state(flat, self.layout, self.side)
        if state.num_blocks < len(kv_cache):
            raise RuntimeError(
                f"vLLM hands out {len(kv_cache)} blocks, but in its allocation of {flat.numel()} "
                f"bytes are {state.num_blocks} of {self.layout.block_bytes} bytes for all layers: "
                "pages would lie outside of it. This vLLM allocates its KV cache in a way that DMS "
                "does not know; use a tested version."
            )
        self._state = state
        self.ops = self._make_ops(self._state)
        self.reporter = Reporter(self._state, self.ops)
        if self.config.prefix_cache:
            self.snapshots = make_snapshots(self._state, choose_ops(self.config, kv_cache.device))
        self._storage_ptr = storage.data_ptr()
        self._warm_up()

    def _warm_up(self) -> None:
        """vLLM hands its cache over when it warms up itself: afterwards no step waits for what its
        first use compiles, loads or allocates."""
        self.ops.warm_up(self._dtype, self.projection)
        self.reporter.warm_up()
        apply_updates(self.state, NULL_STEP)


def make_snapshots(state: ArenaState, ops: str) -> Snapshots:
    if ops == "torch":
        return TorchSnapshots(state)
    from vllm_dms.backend.triton_snapshots import TritonSnapshots

    snapshots = TritonSnapshots(state)
    snapshots.warm_up()
    return snapshots


def find_layer(layers: Mapping[str, Any]) -> Any:
    """The first DMS attention layer among vLLM's layers by name; it knows the runtime of all."""
    for layer in layers.values():
        if hasattr(layer, "dms_runtime"):
            return layer
    raise RuntimeError("this model has no DMS attention layer")


def get_runtime(vllm_config: VllmConfig) -> Runtime:
    """The runtime of the model that was built under ``vllm_config`` in this process."""
    return find_layer(vllm_config.compilation_config.static_forward_context).dms_runtime


def bound_runtime(layers: Mapping[str, Any]) -> Runtime:
    """The runtime of a forward context's ``no_compile_layers``, with the arena bound."""
    layer = find_layer(layers)
    layer.dms_runtime.bind(layer.kv_cache)
    return layer.dms_runtime
