"""The operations on the arena as Triton kernels: checks, grids, scratch.

Nothing is allocated or read back per call, and grids depend only on the batch's host-side numbers,
so every operation can be captured in a CUDA graph.
"""

import math

import torch
import triton

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import SCALE_DTYPE
from vllm_dms.backend.kernels.common import BatchArgs, Geometry, StateArgs
from vllm_dms.backend.kernels.decode import decode_kernel, merge_kernel
from vllm_dms.backend.kernels.prefill import prefill_kernel
from vllm_dms.backend.kernels.report import launch_report
from vllm_dms.backend.kernels.schedule import allocate_schedule, schedule_kernel
from vllm_dms.backend.kernels.store import (
    store_copy_kernel,
    store_plan_kernel,
    store_token_kernel,
    store_window_kernel,
)
from vllm_dms.backend.kernels.tuning import Tuning, default_tuning
from vllm_dms.backend.state import ArenaState, Batch
from vllm_dms.config import DMSConfig

LOG2_E = 1.0 / math.log(2.0)
SCHEDULE_ROWS = 1024  # rows that the schedule kernel looks at together
PLAN_TOKENS = 1024  # tokens that the plan kernel looks at together


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found}, but the kernels expect {expected}")


class TritonOps:
    """`ops.Ops` on a GPU.

    The layers of a step run in order: `store` of layer 0 shares out all layers' work in `decode`.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        max_tokens: int,
        max_num_seqs: int,
        num_query_heads: int,
        device: torch.device | str,
        tuning: Tuning | None = None,
    ) -> None:
        device = torch.device(device)
        self.layout = layout
        self.device = device
        self.max_tokens = max_tokens
        self.max_num_seqs = max_num_seqs
        self.tuning = tuning or default_tuning(layout)
        self.group = num_query_heads // layout.num_kv_heads
        assert layout.window > 0
        _check("num_query_heads", num_query_heads, self.group * layout.num_kv_heads)
        _check("page_size, rounded up", triton.next_power_of_2(layout.page_size), layout.page_size)
        storage = layout.storage
        constants = Geometry(
            L=layout.num_layers,
            H=layout.num_kv_heads,
            D=layout.head_dim,
            # A tensor-core product sums over 16 channels at least.
            D_PAD=max(16 * storage.num_products, triton.next_power_of_2(layout.head_dim)),
            P=layout.page_size,
            R=layout.ring_size,
            MAX_PAGES=layout.max_pages_per_row,
            MAX_BLOCKS=layout.max_blocks_per_request,
            PAGES_PER_BLOCK=layout.pages_per_block,
            MAX_REQS=triton.next_power_of_2(max_num_seqs),
            STORAGE=storage.name,
            WIDTH=storage.width(layout.head_dim),
            PAGE=layout.page_bytes // storage.dtype.itemsize,
            SCALES=storage.num_scales,
            PAGE_SCALES=layout.page_bytes // SCALE_DTYPE.itemsize,
        )
        self.geometry = Geometry(*map(triton.language.constexpr, constants))
        self.head_pad = triton.next_power_of_2(layout.num_kv_heads)
        # Programmatic dependent launch: a kernel starts up while the one before it runs out.
        self.overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.launch = {"launch_pdl": True} if self.overlap else {}
        self.schedule = allocate_schedule(layout, max_num_seqs, self.group, self.tuning, device)

    def side_bytes(self) -> int:
        """Bytes of scratch beside the arena's own state."""
        tensors = (t for t in self.schedule if isinstance(t, torch.Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def _state_args(self, state: ArenaState) -> StateArgs:
        layout, pages, geo = self.layout, state.pages, self.geometry
        assert state.layout == layout
        size, width, scales = layout.page_size, geo.WIDTH.value, geo.SCALES.value
        _check("strides of the values", pages.k.stride(), (geo.PAGE.value, width, 1))
        if scales:  # what is empty has no strides to speak of
            found = pages.k_scales.stride()[:2]
            _check("strides of the scales", found, (geo.PAGE_SCALES.value, 2 * scales))
        _check("offset of V in a page", pages.v.storage_offset() - pages.k.storage_offset(),
               size * width)  # fmt: skip
        return StateArgs(
            pages=pages.k,
            scales=pages.k_scales,
            state_of_block=state.state_of_block,
            block_rows=state.block_rows,
            pages_used=state.pages_used,
            live=state.live,
            page_table=state.page_table,
            evict_ring=state.evict_ring,
        )

    def _batch_args(self, batch: Batch) -> BatchArgs:
        if batch.num_reqs > self.max_num_seqs or batch.num_tokens > self.max_tokens:
            raise ValueError(
                f"a batch of {batch.num_reqs} requests and {batch.num_tokens} tokens exceeds the "
                f"scratch's {self.max_num_seqs} and {self.max_tokens}"
            )
        return BatchArgs(
            block_table=batch.block_table,
            block_table_stride=batch.block_table.stride(0),
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
        )

    def _check_heads(self, name: str, x: torch.Tensor, heads: int) -> None:
        """[T, heads, D] whose heads lie side by side."""
        _check(f"shape of {name}", tuple(x.shape[1:]), (heads, self.layout.head_dim))
        _check(f"strides of {name}'s heads", x.stride()[1:], (self.layout.head_dim, 1))
        _check(f"device of {name}", x.device.type, self.device.type)

    def _flat_grid(self, batch: Batch, block: int) -> tuple[int, int]:
        """Blocks of tokens as `find_request` counts them, times heads."""
        return batch.num_tokens // block + batch.num_reqs, self.layout.num_kv_heads

    def store(
        self,
        state: ArenaState,
        batch: Batch,
        config: DMSConfig,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        heads = self.layout.num_kv_heads
        self._check_heads("key", key, heads)
        self._check_heads("value", value, heads)
        _check("alpha's heads", alpha.shape[1], heads)
        state_args, batch_args = self._state_args(state), self._batch_args(batch)
        geo = self.geometry
        rule = (config.alpha_scale, config.alpha_offset, geo)
        if layer == 0:
            self._share_out(state_args, batch_args, batch.num_reqs)
        switches = {"SHIFT": config.shift, "EVICT": config.evict, "enable_fp_fusion": False}
        store_token_kernel[(batch.num_reqs,)](
            key, value, alpha, key.stride(0), value.stride(0), *alpha.stride(),
            state_args, batch_args, layer, *rule, H_PAD=self.head_pad, OVERLAP=self.overlap,
            **switches, **self.launch,
        )  # fmt: skip
        if batch.max_query_len == 1:
            return
        scratch = (batch.scratch.num_survivors, batch.scratch.evict)
        store_plan_kernel[(batch.num_reqs, heads)](
            alpha, *alpha.stride(), state_args, batch_args, *scratch, layer, *rule,
            BLOCK=PLAN_TOKENS, **switches,
        )  # fmt: skip
        block = self.tuning.copy_block
        store_copy_kernel[self._flat_grid(batch, block)](
            key, value, key.stride(0), value.stride(0), state_args, batch_args, *scratch,
            batch.num_reqs, layer, geo, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip

    def prefill(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        heads, tuning = self.layout.num_kv_heads, self.tuning
        self._check_heads("query", query, heads * self.group)
        self._check_heads("output", output, heads * self.group)
        self._check_heads("key", key, heads)
        self._check_heads("value", value, heads)
        rows, block = tuning.prefill_rows, tuning.prefill_block
        if query.element_size() == 4:  # no tensor cores: larger tiles spill by the kilobyte
            rows, block = min(rows, 32), min(block, 32)
        rows = max(rows, triton.next_power_of_2(self.group))
        prefill_kernel[self._flat_grid(batch, rows // self.group)](
            query, key, value, output,
            query.stride(0), key.stride(0), value.stride(0), output.stride(0),
            self._state_args(state), self._batch_args(batch),
            batch.scratch.num_survivors, batch.scratch.evict,
            batch.num_reqs, layer, scale * LOG2_E, self.geometry,
            G=self.group, BLOCK_M=rows, BLOCK_N=block,
            num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages,
        )  # fmt: skip

    def report(self, state: ArenaState, out: torch.Tensor) -> None:
        launch_report(state, out)

    def store_window(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        block = self.tuning.copy_block
        store_window_kernel[self._flat_grid(batch, block)](
            key, value, key.stride(0), value.stride(0), self._state_args(state),
            self._batch_args(batch), batch.scratch.evict, batch.num_reqs, layer, self.geometry,
            BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip

    def decode(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        heads, tuning, geo = self.layout.num_kv_heads, self.tuning, self.geometry
        self._check_heads("query", query, heads * self.group)
        self._check_heads("output", output, heads * self.group)
        schedule = self.schedule
        pad = triton.next_power_of_2(self.group)
        # Twice the parts of a row of average length: rows of few requests are cut into many.
        parts = triton.next_power_of_2(2 * schedule.PROGRAMS // (batch.num_reqs * heads))
        parts = min(max(parts, 4), tuning.merge_block)
        common = {"G": self.group, "OVERLAP": self.overlap, **self.launch}
        decode_kernel[(schedule.PROGRAMS,)](
            query, output, query.stride(0), output.stride(0), self._state_args(state), schedule,
            layer, scale * LOG2_E, geo, **common,
            BLOCK_M=max(tuning.decode_rows, pad),
            BLOCK_N=tuning.decode_block, num_warps=tuning.decode_warps,
            num_stages=tuning.decode_stages,
        )  # fmt: skip
        merge_kernel[(schedule.PROGRAMS, self.group)](
            output, output.stride(0), schedule, layer, geo, **common,
            BLOCK=parts, num_warps=max(parts // 16, 1),
        )  # fmt: skip

    def _share_out(self, state: StateArgs, batch: BatchArgs, num_reqs: int) -> None:
        schedule_kernel[(self.layout.num_layers,)](
            state, batch, self.schedule, num_reqs, self.geometry,
            BLOCK_N=self.tuning.decode_block, BLOCK_ROWS=SCHEDULE_ROWS,
            PROGRAMS_PAD=triton.next_power_of_2(self.schedule.PROGRAMS),
            STEPS=self.schedule.N.bit_length() + 1,
        )  # fmt: skip
