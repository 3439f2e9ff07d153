"""`snapshots.Snapshots` on a GPU: arguments and grids of `kernels.snapshots`."""

from collections.abc import Sequence

import numpy as np
import torch
import triton

from vllm_dms.arena.messages import Copy
from vllm_dms.backend import copies as packing
from vllm_dms.backend.kernels.launch import Launcher
from vllm_dms.backend.kernels.snapshots import copy_blocks_kernel, places_kernel, record_kernel
from vllm_dms.backend.state import ArenaState

BLOCK_WORDS = 4096  # int64 that a program copies
NUM_LISTED = 1024  # blocks whose places a program notes


class TritonSnapshots:
    """Three launches for a run of copies, none of which the host waits for."""

    def __init__(self, state: ArenaState) -> None:
        self._state, layout = state, state.layout
        self._bytes = state.blocks.view(-1)
        width = packing.HEADER + layout.record_blocks
        # Which block of its source each is, in the run at hand; of others, any.
        places = torch.zeros(state.num_blocks, dtype=torch.int32, device=state.blocks.device)
        words, entries = layout.block_bytes // 8, layout.leaves_per_block * layout.leaf_size
        ring_pad, table_pad = map(triton.next_power_of_2, (layout.ring_size, layout.table_width))
        self._parts = triton.cdiv(words, BLOCK_WORDS)
        self._note_places = Launcher(places_kernel, places, width, NUM_LISTED)
        self._copy_blocks, self._copy_records = {}, {}
        for saves in (False, True):
            self._copy_blocks[saves] = Launcher(
                copy_blocks_kernel, self._bytes.view(torch.int64), state.leaves, places,
                state.pages_used, width, words, entries, triton.next_power_of_2(max(entries, 1)),
                layout.pages_per_block, saves, BLOCK_WORDS, num_warps=8,
            )  # fmt: skip
            self._copy_records[saves] = Launcher(
                record_kernel, self._bytes.view(torch.int32), self._bytes, places,
                state.pages_used, state.leaves_used, state.live, state.page_table,
                state.evict_ring, width, layout.num_rows, layout.ring_size, ring_pad,
                layout.leaf_size, layout.table_width, table_pad, layout.pages_per_block,
                max(layout.leaves_per_block, 1), layout.record_row_bytes, layout.block_bytes,
                saves,
            )  # fmt: skip

    def warm_up(self) -> None:
        """Compile the kernels, on the null state: before the first request waits for it."""
        null, record = np.zeros(1, np.int32), np.zeros(self._state.layout.record_blocks, np.int32)
        copies = [Copy(0, (null, null, record))]
        self.save(copies)
        self.restore(copies)
        self._state.blocks[0].zero_()

    def save(self, copies: Sequence[Copy]) -> None:
        self._copy(copies, saves=True)

    def restore(self, copies: Sequence[Copy]) -> None:
        self._copy(copies, saves=False)

    def _copy(self, copies: Sequence[Copy], saves: bool) -> None:
        packed = packing.pack(copies, self._state.num_blocks, saves)
        lists, first = torch.from_numpy(packed.lists), packed.first
        if self._bytes.device.type == "cuda":
            lists = lists.pin_memory().to(self._bytes.device, non_blocking=True)
        total, rows = first[-1], self._state.layout.num_rows
        for start, stop in packed.runs:
            begin, end = first[start], first[stop]
            parts = triton.cdiv(end - begin, NUM_LISTED)
            self._note_places((parts, 1), None, lists, total, begin, end)
            self._copy_blocks[saves]((end - begin, self._parts), None, lists, total, begin)
            self._copy_records[saves]((rows, stop - start), None, lists, total, start)
