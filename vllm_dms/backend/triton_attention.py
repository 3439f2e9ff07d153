"""The Triton operations that read the arena (`triton_ops`): what a step plans, and attention."""

import math
from typing import Any

import torch
import triton

from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.flash import Flash
from vllm_dms.backend.kernels.arguments import check
from vllm_dms.backend.kernels.decode import decode_kernel
from vllm_dms.backend.kernels.launch import Launcher, Rows
from vllm_dms.backend.kernels.merge import merge_kernel
from vllm_dms.backend.kernels.prefill import prefill_kernel
from vllm_dms.backend.kernels.prefill_stored import prefill_stored_kernel
from vllm_dms.backend.kernels.report import report_launcher
from vllm_dms.backend.kernels.schedule import Schedule, schedule_kernel
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.state import ArenaState, Batch, Scratch
from vllm_dms.backend.triton_store import TritonStore
from vllm_dms.config import DMSConfig

LOG2_E = 1.0 / math.log(2.0)
SCHEDULE_ROWS = 1024  # rows that the schedule kernel looks at together
# Most rows and keys of a tile by an element's bytes: without tensor cores larger ones spill by the
# kilobyte.
PREFILL_TILES = {2: 1024, 4: 32}
MIN_PARTS = 4  # of a row that the merge kernel reads at once


def merge_sizes(tuning: Tuning) -> list[int]:
    """How many parts the merge kernel is made for."""
    least = min(MIN_PARTS, tuning.merge_block)
    return [n for n in (1 << i for i in range(12)) if least <= n <= tuning.merge_block]


class TritonAttention(TritonStore):
    """`prefill` and `decode` of `ops.Ops`, and what is done once in a step."""

    def __init__(
        self,
        state: ArenaState,
        scratch: Scratch,
        config: DMSConfig,
        scale: float,
        schedule: Schedule,
        tuning: Tuning,
        overlap: bool,
        flash: Flash | None,
    ) -> None:
        """``scale``: of the softmax; ``tuning``: that ``schedule`` was allocated with; ``overlap``:
        whether a kernel starts up while the one before it runs out (`arguments.can_overlap`);
        ``flash``: what computes a chunk's attention to itself, if not `prefill_kernel`."""
        super().__init__(state, scratch, config, schedule, tuning, overlap)
        self._flash = flash
        self._flash_window = state.layout.window if config.evict else -1
        self._report = report_launcher(state)
        self._schedule = Launcher(
            schedule_kernel, *self._bound, schedule, self._geo, tuning.decode_block, SCHEDULE_ROWS,
            triton.next_power_of_2(schedule.PROGRAMS), schedule.N.bit_length() + 1,
        )  # fmt: skip
        self._bind_attention(scale * LOG2_E, overlap)

    def _bind_attention(self, score_scale: float, overlap: bool) -> None:
        geo, tuning, schedule, scratch = self._geo, self.tuning, self.schedule, self.scratch
        options: dict[str, Any] = {"launch_pdl": True} if overlap else {}
        pad = triton.next_power_of_2(self.group)
        held = 32 * tuning.decode_warps * tuning.merge_registers // (pad * geo.D_PAD.value)
        parts = min(max(held, 1), tuning.merge_block)

        def prefill(kernel: Any, most: int, *arguments: Any) -> tuple[int, Launcher]:
            rows = max(min(tuning.prefill_rows, most), pad)
            return rows, Launcher(
                kernel, *self._bound, scratch.num_survivors, *arguments, rows,
                min(tuning.prefill_block, most), overlap,
                num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages, **options,
            )  # fmt: skip

        common = (score_scale, geo, self.group)
        self._prefill, self._prefill_stored = {}, {}
        for itemsize, most in PREFILL_TILES.items():
            self._prefill[itemsize] = prefill(prefill_kernel, most, scratch.evict, *common)
            self._prefill_stored[itemsize] = prefill(
                prefill_stored_kernel, most, *common, self._config.evict
            )
        self._decode, self._merge = {}, {}
        for merges in (False, True):
            self._decode[merges] = Launcher(
                decode_kernel, self._bound[0], schedule, score_scale, geo, self.group, pad,
                max(tuning.decode_rows, pad), tuning.decode_block, parts, merges, overlap,
                num_warps=tuning.decode_warps, num_stages=tuning.decode_stages,
                maxnreg=tuning.decode_registers, **options,
            )  # fmt: skip
        for most in merge_sizes(tuning):
            self._merge[most] = Launcher(
                merge_kernel, schedule, geo, self.group, most, overlap,
                num_warps=max(most // 16, 1), **options,
            )  # fmt: skip

    def begin_step(self, batch: Batch) -> None:
        """Share out the work of `decode` in all layers."""
        if batch.num_reqs > self.max_num_seqs or batch.num_tokens > self.max_tokens:
            raise ValueError(
                f"a batch of {batch.num_reqs} requests and {batch.num_tokens} tokens exceeds the "
                f"scratch's {self.max_num_seqs} and {self.max_tokens}"
            )
        self._begin_stores(batch)
        if self._flash is not None and batch.max_query_len > 1:
            self._chunk_starts = batch.query_start[batch.first_chunk : batch.num_reqs + 1]
            self._reads_stored = batch.max_stored > 0 or (self._config.evict and self._pushes_out)
        programs, rows = self.schedule.PROGRAMS, batch.num_reqs * self.heads
        self._decode_merges = programs <= self.tuning.merge_cuts * rows
        # Twice the parts of a row of average length: rows of few requests are cut into many.
        parts = min(triton.next_power_of_2(2 * programs // rows), self.tuning.merge_block)
        self._merge_of_batch = self._merge[max(parts, min(self._merge))]
        self._schedule(
            (self.state.layout.num_layers, 1), None, batch.block_table,
            batch.block_table.stride(0), batch.query_start, batch.seq_lens, batch.num_reqs,
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
        if self._flash is None:
            k, v = self._rows("key", key, self.heads), self._rows("value", value, self.heads)
            q, out = self._query_and_output(query, output)
            self._launch_prefill(batch, layer, q, k, v, out)
            return
        # A graph's padding holds anything: of what lies in a tile a weight of 0 makes NaN of NaN.
        if key.shape[0] > batch.num_tokens:
            key, value = key[: batch.num_tokens], value[: batch.num_tokens]
        lse = self._flash(
            query, key, value, self._chunk_starts, batch.max_query_len, self._flash_window, output
        )
        if self._reads_stored:
            q, o = self._query_and_output(query, output)
            rows, launch = self._prefill_stored[query.element_size()]
            launch.at(
                self._flat_grid(batch, rows // self.group), (q.kind, o.kind), (query, output, lse),
                q.address, o.address, lse.data_ptr(), q.stride, o.stride, lse.stride(0),
                batch.num_reqs, layer,
            )  # fmt: skip

    def _launch_prefill(
        self, batch: Batch, layer: int, query: Rows, key: Rows, value: Rows, output: Rows
    ) -> None:
        rows, launch = self._prefill[query.near.element_size()]
        near, *numbers, kind = zip(query, key, value, output, strict=True)
        addresses, strides = numbers
        launch.at(
            self._flat_grid(batch, rows // self.group), kind, near, *addresses, *strides,
            batch.num_reqs, layer,
        )  # fmt: skip

    def decode(self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        self._check_step(batch)
        self._launch_decode(layer, *self._query_and_output(query, output))

    def _launch_decode(self, layer: int, query: Rows, output: Rows) -> None:
        programs, merges = self.schedule.PROGRAMS, self._decode_merges
        self._decode[merges].at(
            (programs, 1), (query.kind, output.kind), (query.near, output.near), query.address,
            output.address, query.stride, output.stride, layer,
        )  # fmt: skip
        if not merges:
            self._merge_of_batch.at(
                (programs, self.group), output.kind, (output.near,), output.address, output.stride,
                layer,
            )  # fmt: skip

    def _query_and_output(self, query: torch.Tensor, output: torch.Tensor) -> tuple[Rows, Rows]:
        num_heads = self.heads * self.group
        return self._rows("query", query, num_heads), self._rows("output", output, num_heads)

    def report(self, out: torch.Tensor) -> None:
        if out.shape != (self.state.num_states, REPORT_WIDTH) or not out.is_contiguous():
            check("shape of the report", out.shape, (self.state.num_states, REPORT_WIDTH))
            check("strides of the report", out.stride(), (REPORT_WIDTH, 1))
        self._report((self.state.num_states, 1), out.data_ptr() % 16 == 0, out)
