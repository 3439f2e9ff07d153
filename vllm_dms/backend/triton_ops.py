"""The operations on the arena as Triton kernels: checks, grids, arguments.

Nothing is allocated or read back per call, and grids depend only on the batch's host-side numbers,
so every operation can be captured in a CUDA graph. Arguments that vary come first; all others are
bound once (`kernels.launch`).
"""

import math
from typing import Any

import torch
import triton
from triton.language import constexpr

from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.kernels.arguments import (
    check,
    make_geometry,
    make_requests,
    make_state_args,
)
from vllm_dms.backend.kernels.common import Geometry
from vllm_dms.backend.kernels.decode import decode_kernel, merge_kernel
from vllm_dms.backend.kernels.launch import Launcher, kind_of
from vllm_dms.backend.kernels.prefill import prefill_kernel
from vllm_dms.backend.kernels.report import report_launcher
from vllm_dms.backend.kernels.schedule import Schedule, schedule_kernel
from vllm_dms.backend.kernels.store import (
    store_copy_kernel,
    store_plan_kernel,
    store_token_kernel,
    store_window_kernel,
)
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.state import ArenaState, Batch, Scratch
from vllm_dms.config import DMSConfig

LOG2_E = 1.0 / math.log(2.0)
SCHEDULE_ROWS = 1024  # rows that the schedule kernel looks at together
PLAN_TOKENS = 1024  # tokens that the plan kernel looks at together
MIN_PARTS = 4  # of a row that are merged together, at least


def merge_sizes(tuning: Tuning) -> list[int]:
    """How many parts the merge kernel is made for."""
    least = min(MIN_PARTS, tuning.merge_block)
    return [n for n in (1 << i for i in range(12)) if least <= n <= tuning.merge_block]


class TritonOps:
    """`ops.Ops` on a GPU."""

    def __init__(
        self,
        state: ArenaState,
        scratch: Scratch,
        config: DMSConfig,
        scale: float,
        schedule: Schedule,
        tuning: Tuning,
        overlap: bool,
    ) -> None:
        """``scale``: of the softmax; ``tuning``: that ``schedule`` was allocated with; ``overlap``:
        whether a kernel starts up while the one before it runs out (`arguments.can_overlap`)."""
        layout = state.layout
        assert layout.window > 0
        self.state, self.scratch, self.schedule = state, scratch, schedule
        self.tuning = tuning
        self.device = state.live.device
        self.heads = layout.num_kv_heads
        self.head_dim = layout.head_dim
        self.num_layers = layout.num_layers
        self.group = schedule.partial_sum.shape[1]
        self.max_tokens = scratch.evict.shape[0]
        self.max_num_seqs = schedule.N // self.heads
        self._batch: Batch | None = None
        sizes = make_geometry(layout, self.max_num_seqs, tuning)
        self._geo = Geometry(*map(constexpr, sizes))
        self._requests = make_requests(sizes, self.device)
        self._bound = (make_state_args(state, sizes), self._requests)
        self._report = report_launcher(state)
        self._bind_stores(config, overlap)
        self._bind_attention(scale, overlap)

    def _bind_stores(self, config: DMSConfig, overlap: bool) -> None:
        geo, block = self._geo, self.tuning.copy_block
        # Where rounding must be what it says, a product and a sum stay two operations.
        options = {"enable_fp_fusion": False, **({"launch_pdl": True} if overlap else {})}
        rule = (config.alpha_scale, config.alpha_offset, geo)
        switches = (triton.next_power_of_2(self.heads), config.shift, config.evict)
        survivors, evict = self.scratch.num_survivors, self.scratch.evict
        schedule = self.schedule
        self._schedule = Launcher(
            schedule_kernel, *self._bound, schedule, geo, self.tuning.decode_block, SCHEDULE_ROWS,
            triton.next_power_of_2(schedule.PROGRAMS), schedule.N.bit_length() + 1,
        )  # fmt: skip
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

    def _bind_attention(self, scale: float, overlap: bool) -> None:
        geo, tuning, schedule, scale = self._geo, self.tuning, self.schedule, scale * LOG2_E
        options: dict[str, Any] = {"launch_pdl": True} if overlap else {}
        pad = triton.next_power_of_2(self.group)

        def prefill(rows: int, block: int) -> tuple[int, Launcher]:
            rows = max(rows, pad)
            return rows, Launcher(
                prefill_kernel, *self._bound, self.scratch.num_survivors, self.scratch.evict, scale,
                geo, self.group, rows, block, overlap,
                num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages, **options,
            )  # fmt: skip

        rows, block = tuning.prefill_rows, tuning.prefill_block
        # Without tensor cores larger tiles spill by the kilobyte.
        self._prefill = {2: prefill(rows, block), 4: prefill(min(rows, 32), min(block, 32))}
        self._decode = Launcher(
            decode_kernel, self._bound[0], schedule, scale, geo, self.group,
            max(tuning.decode_rows, pad), tuning.decode_block, overlap,
            num_warps=tuning.decode_warps, num_stages=tuning.decode_stages, **options,
        )  # fmt: skip
        self._merge = {}
        for parts in merge_sizes(tuning):
            self._merge[parts] = Launcher(
                merge_kernel, schedule, geo, self.group, parts, overlap,
                num_warps=max(parts // 16, 1), **options,
            )  # fmt: skip

    def warm_up(self, dtype: torch.dtype) -> None:
        """Launch each kernel once, for one layer of two batches of a request of the null state."""
        for tokens in (2, 1):
            int32 = {"dtype": torch.int32, "device": self.device}
            start, length = torch.arange(2, **int32) * tokens, torch.full((1,), tokens, **int32)
            batch = Batch(1, tokens, tokens, torch.zeros(1, 1, **int32), start, length)
            head = {"dtype": dtype, "device": self.device}
            query = torch.zeros(tokens, self.heads * self.group, self.head_dim, **head)
            key = torch.zeros(tokens, self.heads, self.head_dim, **head)
            self.begin_step(batch)
            self.store(batch, 0, key, key, key[..., 0])
            if tokens > 1:
                self.prefill(batch, 0, query, key, key, query)
                self.store_window(batch, 0, key, key)
            self.decode(batch, 0, query, query)
        stride, grid = query.stride(0), (self.schedule.PROGRAMS, self.group)
        for merge in self._merge.values():
            merge(grid, kind_of(query), query, stride, 0)

    def begin_step(self, batch: Batch) -> None:
        """Share out the work of `decode` in all layers."""
        if batch.num_reqs > self.max_num_seqs or batch.num_tokens > self.max_tokens:
            raise ValueError(
                f"a batch of {batch.num_reqs} requests and {batch.num_tokens} tokens exceeds the "
                f"scratch's {self.max_num_seqs} and {self.max_tokens}"
            )
        self._batch = batch
        # Twice the parts of a row of average length: rows of few requests are cut into many.
        parts = triton.next_power_of_2(2 * self.schedule.PROGRAMS // (batch.num_reqs * self.heads))
        self._merge_of_batch = self._merge[min(max(parts, MIN_PARTS), self.tuning.merge_block)]
        self._schedule(
            (self.num_layers, 1), None, batch.block_table, batch.block_table.stride(0),
            batch.query_start, batch.seq_lens, batch.num_reqs,
        )  # fmt: skip

    def store(
        self,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        self._check_step(batch)
        k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
        if alpha.shape[1] != self.heads:
            check("alpha's heads", alpha.shape[1], self.heads)
        arguments = (key, value, alpha, k[0], v[0], *alpha.stride(), layer)
        if batch.max_query_len == 1:
            self._store_token((batch.num_reqs, 1), (k, v), *arguments)
            return
        self._store_plan((batch.num_reqs, self.heads), (k, v), *arguments)
        grid = self._flat_grid(batch, self.tuning.copy_block)
        self._store_copy(grid, (k, v), key, value, k[0], v[0], batch.num_reqs, layer)

    def prefill(
        self,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        self._check_step(batch)
        num_heads = self.heads * self.group
        q, o = self._kind("query", query, num_heads), self._kind("output", output, num_heads)
        k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
        rows, launch = self._prefill[4 if query.element_size() == 4 else 2]
        launch(
            self._flat_grid(batch, rows // self.group), (q, k, v, o), query, key, value, output,
            q[0], k[0], v[0], o[0], batch.num_reqs, layer,
        )  # fmt: skip

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check_step(batch)
        k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
        grid = self._flat_grid(batch, self.tuning.copy_block)
        self._store_window(grid, (k, v), key, value, k[0], v[0], batch.num_reqs, layer)

    def decode(self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        self._check_step(batch)
        num_heads, programs = self.heads * self.group, self.schedule.PROGRAMS
        q, o = self._kind("query", query, num_heads), self._kind("output", output, num_heads)
        self._decode((programs, 1), (q, o), query, output, q[0], o[0], layer)
        self._merge_of_batch((programs, self.group), o, output, o[0], layer)

    def report(self, out: torch.Tensor) -> None:
        check("shape of the report", out.shape, (self.state.num_states, REPORT_WIDTH))
        check("strides of the report", out.stride(), (REPORT_WIDTH, 1))
        self._report((self.state.num_states, 1), kind_of(out), out)

    def _check_step(self, batch: Batch) -> None:
        assert batch is self._batch, "begin_step of this batch comes first"

    def _kind(self, name: str, x: torch.Tensor, heads: int) -> tuple[int, bool]:
        """`kind_of` x [T, heads, D], whose heads lie side by side."""
        stride, dim = x.stride(), self.head_dim
        if stride[2] != 1 or stride[1] != dim or x.shape[1:] != (heads, dim):
            check(f"shape of {name}", tuple(x.shape[1:]), (heads, dim))
            check(f"strides of {name}'s heads", stride[1:], (dim, 1))
        if x.device.type != self.device.type:
            check(f"device of {name}", x.device.type, self.device.type)
        return kind_of(x)

    def _flat_grid(self, batch: Batch, block: int) -> tuple[int, int]:
        """Blocks of tokens as `find_request` counts them, times heads."""
        return batch.num_tokens // block + batch.num_reqs, self.heads
