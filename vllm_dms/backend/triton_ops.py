"""The operations on the arena as Triton kernels: checks, grids, arguments.

Nothing is allocated or read back per call, and grids depend only on the batch's host-side numbers,
so every operation can be captured in a CUDA graph.
"""

import math
from typing import Any

import torch
import triton

from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.flash import Flash
from vllm_dms.backend.kernels.arguments import check
from vllm_dms.backend.kernels.decode import decode_kernel
from vllm_dms.backend.kernels.launch import Launcher, kind_of
from vllm_dms.backend.kernels.merge import merge_kernel
from vllm_dms.backend.kernels.prefill import prefill_kernel
from vllm_dms.backend.kernels.prefill_stored import prefill_stored_kernel
from vllm_dms.backend.kernels.report import report_launcher
from vllm_dms.backend.kernels.schedule import Schedule, schedule_kernel
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.projection import Projection, rotated_width, views
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


class TritonOps(TritonStore):
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
        for parts in merge_sizes(tuning):
            self._merge[parts] = Launcher(
                merge_kernel, schedule, geo, self.group, parts, overlap,
                num_warps=max(parts // 16, 1), **options,
            )  # fmt: skip

    def warm_up(self, dtype: torch.dtype, projection: Projection | None) -> None:
        """Launch each kernel, for one layer of batches of one request of the null state."""
        lengths = [2, 1]
        if self._flash is not None:  # it has a kernel of its own for what is longer than a window
            lengths.insert(0, min(self.state.layout.ring_size + 1, self.max_tokens))
        for tokens in lengths:
            int32 = {"dtype": torch.int32, "device": self.device}
            start, length = torch.arange(2, **int32) * tokens, torch.full((1,), tokens, **int32)
            batch = Batch(1, tokens, tokens, torch.zeros(1, 1, **int32), start, length)
            kind = {"dtype": dtype, "device": self.device}
            shape = (self.heads, self.group, self.head_dim)
            qkv = torch.zeros(tokens, self.heads * (self.group + 2) * self.head_dim, **kind)
            rotated = torch.zeros(tokens, rotated_width(*shape), **kind)
            query, key, value, alpha = views(qkv, rotated, *shape)
            output = torch.zeros_like(query)
            self.begin_step(batch)
            if projection is None:
                self.store(batch, 0, key, value, alpha)
            else:
                given = alpha if self._config.adapter else None
                positions = torch.zeros(tokens, dtype=torch.int64, device=self.device)
                self.store_projection(batch, 0, projection, qkv, positions, given, rotated)
            if tokens > 1:
                self.prefill(batch, 0, query, key, value, output)
                self.store_window(batch, 0, key, value)
            self.decode(batch, 0, query, output)
        q, o, head = kind_of(query), kind_of(output), (query, output, query.stride(0))
        for decode in self._decode.values():
            decode((self.schedule.PROGRAMS, 1), (q, o), *head, output.stride(0), 0)
        for merge in self._merge.values():
            merge((self.schedule.PROGRAMS, self.group), o, output, output.stride(0), 0)

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
            q, o = self._attended_kinds(query, output)
            k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
            rows, launch = self._prefill[query.element_size()]
            launch(
                self._flat_grid(batch, rows // self.group), (q, k, v, o), query, key, value, output,
                q[0], k[0], v[0], o[0], batch.num_reqs, layer,
            )  # fmt: skip
            return
        # A graph's padding holds anything: of what lies in a tile a weight of 0 makes NaN of NaN.
        if key.shape[0] > batch.num_tokens:
            key, value = key[: batch.num_tokens], value[: batch.num_tokens]
        lse = self._flash(
            query, key, value, self._chunk_starts, batch.max_query_len, self._flash_window, output
        )
        if self._reads_stored:
            q, o = self._attended_kinds(query, output)
            rows, launch = self._prefill_stored[query.element_size()]
            launch(
                self._flat_grid(batch, rows // self.group), (q, o), query, output, lse,
                q[0], o[0], lse.stride(0), batch.num_reqs, layer,
            )  # fmt: skip

    def decode(self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        self._check_step(batch)
        q, o = self._attended_kinds(query, output)
        programs = self.schedule.PROGRAMS
        merges = self._decode_merges
        self._decode[merges]((programs, 1), (q, o), query, output, q[0], o[0], layer)
        if not merges:
            self._merge_of_batch((programs, self.group), o, output, o[0], layer)

    def _attended_kinds(
        self, query: torch.Tensor, output: torch.Tensor
    ) -> tuple[tuple[int, bool], tuple[int, bool]]:
        num_heads = self.heads * self.group
        return self._kind("query", query, num_heads), self._kind("output", output, num_heads)

    def report(self, out: torch.Tensor) -> None:
        if out.shape != (self.state.num_states, REPORT_WIDTH) or not out.is_contiguous():
            check("shape of the report", out.shape, (self.state.num_states, REPORT_WIDTH))
            check("strides of the report", out.stride(), (REPORT_WIDTH, 1))
        self._report((self.state.num_states, 1), kind_of(out), out)
