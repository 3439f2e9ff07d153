"""The operations on the arena as Triton kernels: checks, grids, arguments.

Nothing is allocated or read back per call, and grids depend only on the batch's host-side numbers,
so every operation can be captured in a CUDA graph.
"""

import math

import torch
import triton

from vllm_dms.backend.kernels.arguments import check, make_geometry, make_state_args
from vllm_dms.backend.kernels.common import BatchArgs, Geometry
from vllm_dms.backend.kernels.decode import decode_kernel, merge_kernel
from vllm_dms.backend.kernels.prefill import prefill_kernel
from vllm_dms.backend.kernels.report import launch_report
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
        self._bind(config, scale, overlap)

    def _bind(self, config: DMSConfig, scale: float, overlap: bool) -> None:
        """What every launch passes on, made once."""
        sizes = make_geometry(self.state.layout, self.max_num_seqs, self.tuning)
        self._state_args = make_state_args(self.state, sizes)
        self._geo = Geometry(*map(triton.language.constexpr, sizes))
        self._rule = (config.alpha_scale, config.alpha_offset, self._geo)
        self._score_scale = scale * LOG2_E
        self._switches = {
            "SHIFT": config.shift, "EVICT": config.evict, "enable_fp_fusion": False,
        }  # fmt: skip
        self._scratch_args = (self.scratch.num_survivors, self.scratch.evict)
        self._overlapping = {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}
        self._batch: Batch | None = None
        self._batch_args: BatchArgs

    def begin_step(self, batch: Batch) -> None:
        """Share out the work of `decode` in all layers."""
        if batch.num_reqs > self.max_num_seqs or batch.num_tokens > self.max_tokens:
            raise ValueError(
                f"a batch of {batch.num_reqs} requests and {batch.num_tokens} tokens exceeds the "
                f"scratch's {self.max_num_seqs} and {self.max_tokens}"
            )
        self._batch = batch
        self._batch_args = BatchArgs(
            block_table=batch.block_table,
            block_table_stride=batch.block_table.stride(0),
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
        )
        schedule_kernel[(self.num_layers,)](
            self._state_args, self._batch_args, self.schedule, batch.num_reqs, self._geo,
            BLOCK_N=self.tuning.decode_block, BLOCK_ROWS=SCHEDULE_ROWS,
            PROGRAMS_PAD=triton.next_power_of_2(self.schedule.PROGRAMS),
            STEPS=self.schedule.N.bit_length() + 1,
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
        self._check_heads("key", key, self.heads)
        self._check_heads("value", value, self.heads)
        check("alpha's heads", alpha.shape[1], self.heads)
        state, batch_args, scratch = self._state_args, self._batch_args, self._scratch_args
        store_token_kernel[(batch.num_reqs,)](
            key, value, alpha, key.stride(0), value.stride(0), *alpha.stride(),
            state, batch_args, layer, *self._rule, H_PAD=triton.next_power_of_2(self.heads),
            **self._switches, **self._overlapping,
        )  # fmt: skip
        if batch.max_query_len == 1:
            return
        store_plan_kernel[(batch.num_reqs, self.heads)](
            alpha, *alpha.stride(), state, batch_args, *scratch, layer, *self._rule,
            BLOCK=PLAN_TOKENS, **self._switches,
        )  # fmt: skip
        block = self.tuning.copy_block
        store_copy_kernel[self._flat_grid(batch, block)](
            key, value, key.stride(0), value.stride(0), state, batch_args, *scratch,
            batch.num_reqs, layer, self._geo, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip

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
        self._check_heads("query", query, self.heads * self.group)
        self._check_heads("output", output, self.heads * self.group)
        self._check_heads("key", key, self.heads)
        self._check_heads("value", value, self.heads)
        tuning = self.tuning
        rows, block = tuning.prefill_rows, tuning.prefill_block
        if query.element_size() == 4:  # no tensor cores: larger tiles spill by the kilobyte
            rows, block = min(rows, 32), min(block, 32)
        rows = max(rows, triton.next_power_of_2(self.group))
        prefill_kernel[self._flat_grid(batch, rows // self.group)](
            query, key, value, output,
            query.stride(0), key.stride(0), value.stride(0), output.stride(0),
            self._state_args, self._batch_args, *self._scratch_args,
            batch.num_reqs, layer, self._score_scale, self._geo,
            G=self.group, BLOCK_M=rows, BLOCK_N=block,
            num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages,
        )  # fmt: skip

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check_step(batch)
        block = self.tuning.copy_block
        store_window_kernel[self._flat_grid(batch, block)](
            key, value, key.stride(0), value.stride(0), self._state_args, self._batch_args,
            self.scratch.evict, batch.num_reqs, layer, self._geo,
            BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip

    def decode(self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        self._check_step(batch)
        self._check_heads("query", query, self.heads * self.group)
        self._check_heads("output", output, self.heads * self.group)
        tuning, schedule = self.tuning, self.schedule
        pad = triton.next_power_of_2(self.group)
        # Twice the parts of a row of average length: rows of few requests are cut into many.
        parts = triton.next_power_of_2(2 * schedule.PROGRAMS // (batch.num_reqs * self.heads))
        parts = min(max(parts, 4), tuning.merge_block)
        decode_kernel[(schedule.PROGRAMS,)](
            query, output, query.stride(0), output.stride(0), self._state_args, schedule,
            layer, self._score_scale, self._geo, G=self.group,
            BLOCK_M=max(tuning.decode_rows, pad), BLOCK_N=tuning.decode_block,
            num_warps=tuning.decode_warps, num_stages=tuning.decode_stages, **self._overlapping,
        )  # fmt: skip
        merge_kernel[(schedule.PROGRAMS, self.group)](
            output, output.stride(0), schedule, layer, self._geo, G=self.group,
            BLOCK=parts, num_warps=max(parts // 16, 1), **self._overlapping,
        )  # fmt: skip

    def report(self, out: torch.Tensor) -> None:
        launch_report(self.state, out)

    def _check_step(self, batch: Batch) -> None:
        assert batch is self._batch, "begin_step of this batch comes first"

    def _check_heads(self, name: str, x: torch.Tensor, heads: int) -> None:
        """[T, heads, D] whose heads lie side by side."""
        check(f"shape of {name}", tuple(x.shape[1:]), (heads, self.head_dim))
        check(f"strides of {name}'s heads", x.stride()[1:], (self.head_dim, 1))
        check(f"device of {name}", x.device.type, self.device.type)

    def _flat_grid(self, batch: Batch, block: int) -> tuple[int, int]:
        """Blocks of tokens as `find_request` counts them, times heads."""
        return batch.num_tokens // block + batch.num_reqs, self.heads
