"""What the Triton operations share, and those of them that write the arena (`triton_ops`)."""

import torch
import triton
from triton.language import constexpr

from vllm_dms.backend.kernels.arguments import (
    check,
    make_geometry,
    make_requests,
    make_state_args,
)
from vllm_dms.backend.kernels.common import Geometry
from vllm_dms.backend.kernels.launch import Launcher, Rows, rows_at
from vllm_dms.backend.kernels.schedule import Schedule
from vllm_dms.backend.kernels.store import store_token_kernel
from vllm_dms.backend.kernels.store_chunk import (
    store_copy_kernel,
    store_plan_kernel,
    store_window_kernel,
)
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.state import ArenaState, Batch, Scratch
from vllm_dms.config import DMSConfig

PLAN_TOKENS = 1024  # tokens that the plan kernel looks at together


class TritonStore:
    """Everything that a launch passes on is bound once: arguments that vary come first."""

    def __init__(
        self,
        state: ArenaState,
        scratch: Scratch,
        config: DMSConfig,
        schedule: Schedule,
        tuning: Tuning,
        overlap: bool,
    ) -> None:
        layout = state.layout
        assert layout.window > 0
        self.state, self.scratch, self.schedule = state, scratch, schedule
        self.tuning = tuning
        self.device = state.live.device
        self.heads = layout.num_kv_heads
        self.head_dim = layout.head_dim
        self.group = schedule.partial_sum.shape[1]
        self.max_tokens = scratch.evict.shape[0]
        self.max_num_seqs = schedule.N // self.heads
        self._window_slots = min(layout.ring_size, layout.leaf_size * layout.page_size)
        self._batch: Batch | None = None
        sizes = make_geometry(layout, self.max_num_seqs, tuning)
        self._geo = Geometry(*map(constexpr, sizes))
        self._bound = (make_state_args(state, sizes), make_requests(sizes, self.device))
        self._config, self._overlap = config, overlap
        # What is rounded twice stays two operations.
        self._store_options = {"enable_fp_fusion": False}
        self._store_options |= {"launch_pdl": True} if overlap else {}
        self._bind_stores()

    def _bind_stores(self) -> None:
        geo, block = self._geo, self.tuning.copy_block
        config, overlap, options = self._config, self._overlap, self._store_options
        rule = (config.alpha_scale, config.alpha_offset, geo)
        switches = (triton.next_power_of_2(self.heads), config.shift, config.evict)
        survivors, evict = self.scratch.num_survivors, self.scratch.evict
        self._store_token = Launcher(
            store_token_kernel, *self._bound, *rule, *switches, overlap, **options
        )
        self._store_plan = Launcher(
            store_plan_kernel, *self._bound, survivors, evict, *rule, *switches, PLAN_TOKENS,
            overlap, **options,
        )  # fmt: skip
        self._store_copy = Launcher(
            store_copy_kernel, *self._bound, survivors, evict, geo, block, overlap, **options
        )
        self._store_window = Launcher(
            store_window_kernel, *self._bound, evict, geo, block, overlap, **options
        )

    def _begin_stores(self, batch: Batch) -> None:
        """What is the same in all layers of a step."""
        self._batch = batch
        self._copy_grid = self._flat_grid(batch, self.tuning.copy_block)
        # Whether a chunk may push a token out of its window.
        self._pushes_out = batch.max_stored + batch.max_query_len > self.state.layout.ring_size
        # Whether chunks begin their request, and end in their window and their rows' own pages.
        self._in_window = batch.max_stored == 0 and batch.max_query_len <= self._window_slots

    def store(
        self,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        self._check_step(batch)
        k, v = self._rows("key", key, self.heads), self._rows("value", value, self.heads)
        if alpha.shape[1] != self.heads or alpha.device != self.device:
            found = alpha.shape[1], alpha.device
            check("number of alpha's heads, and its device", found, (self.heads, self.device))
        stride, of_head = alpha.stride()
        self._launch_store(batch, layer, k, v, rows_at(alpha, alpha.data_ptr(), stride), of_head)

    def _launch_store(
        self, batch: Batch, layer: int, key: Rows, value: Rows, alpha: Rows, of_head: int
    ) -> None:
        """``of_head``: elements from a head's alpha to the next"""
        kind, near = (key.kind, value.kind), (key.near, value.near, alpha.near)
        addresses, strides = (key.address, value.address), (key.stride, value.stride)
        arguments = (*addresses, alpha.address, *strides, alpha.stride, of_head, layer)
        if batch.max_query_len == 1:
            self._store_token.at((batch.num_reqs, 1), kind, near, *arguments)
            return
        self._store_plan.at((batch.num_reqs, self.heads), kind, near, *arguments)
        if self._pushes_out:
            numbers = (*addresses, *strides, batch.num_reqs, layer)
            self._store_copy.at(self._copy_grid, kind, near[:2], *numbers)

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check_step(batch)
        k, v = self._rows("key", key, self.heads), self._rows("value", value, self.heads)
        self._launch_window(batch, layer, k, v)

    def _launch_window(self, batch: Batch, layer: int, key: Rows, value: Rows) -> None:
        self._store_window.at(
            self._copy_grid, (key.kind, value.kind), (key.near, value.near), key.address,
            value.address, key.stride, value.stride, batch.num_reqs, layer,
        )  # fmt: skip

    def _check_step(self, batch: Batch) -> None:
        assert batch is self._batch, "begin_step of this batch comes first"

    def _rows(self, name: str, x: torch.Tensor, heads: int) -> Rows:
        """Of x [T, heads, D], whose heads lie side by side."""
        stride, of_head, of_channel = x.stride()
        _, found, dim = x.shape
        # Quick, as it is asked hundreds of times a step.
        if found != heads or of_head != dim or of_channel != 1 or dim != self.head_dim:
            check(f"shape of {name}", (found, dim), (heads, self.head_dim))
            check(f"strides of {name}'s heads", (of_head, of_channel), (dim, 1))
        if x.device != self.device:
            check(f"device of {name}", x.device, self.device)
        return rows_at(x, x.data_ptr(), stride)

    def _flat_grid(self, batch: Batch, block: int) -> tuple[int, int]:
        """Blocks of tokens as `find_request` counts them, times heads."""
        return batch.num_tokens // block + batch.num_reqs, self.heads
