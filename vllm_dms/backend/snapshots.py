"""Keeping the state of a request for later, and giving it to another: copies on the device.

A kept state has as many blocks as the request needed, and block ``j`` of it is block ``j`` of the
request's row, whole: its pages, and the leaves that come with it. Page tables hold page numbers,
which change with the blocks (`translate`). What lies beside the blocks goes into a *record*, in
one or few blocks of its own, so that nothing is kept outside of the pool::

    int32 [2]                                   pages_used, leaves_used
    for each row    int32                       live
                    int32 [table_width]         page table, of the kept blocks
                    uint8 [ring_size, padded]   verdicts on the ring

Who finds a state of all its tokens stores the last of them *again*, because a step has a token to
compute, and so that nothing is different after it: the slot in the ring holds that token already,
and what was there before has left. A verdict "evicted" keeps it from leaving once more. While the
ring was not full, each token made its row longer: there the row gets shorter by the last one.

Copies take effect one after the other, in the order in which they were decided: a block may be
read for one copy and written by the next. Kernels make at once what can be (`backend.copies`).
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import Copy
from vllm_dms.backend.state import ArenaState


class Snapshots(Protocol):
    """Of a copy, ``source[j]`` may be ``target[j]``: then the block stays as it is. No other block
    of its source is one of its target."""

    def save(self, copies: Sequence[Copy]) -> None:
        """Keep states. Of a state's blocks, the source, those in use go to the target."""

    def restore(self, copies: Sequence[Copy]) -> None:
        """Make what `save` kept in source and record the state of an index, whose first blocks are
        the target. Where `Copy.again` is a position, the coming step stores that token once
        more."""


class TorchSnapshots:
    """In plain PyTorch, for a CPU, and the truth for the kernels: copy after copy."""

    def __init__(self, state: ArenaState) -> None:
        self._state, self._layout = state, state.layout
        # The block that took a block's place in the copy at hand.
        self._moved = torch.zeros(state.num_blocks, dtype=torch.int32, device=state.blocks.device)

    def save(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._save(copy.state, *self._on_device(copy))

    def restore(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._restore(copy.state, *self._on_device(copy), copy.again)

    def _on_device(self, copy: Copy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = self._state.blocks.device
        source, target, record = (torch.from_numpy(ids).to(device).long() for ids in copy.blocks)
        return source, target, record

    def _save(
        self, s: int, source: torch.Tensor, target: torch.Tensor, record: torch.Tensor
    ) -> None:
        state, layout = self._state, self._layout
        used = -(-int(state.pages_used[s]) // layout.pages_per_block)
        self._note(source, target)
        self._copy_blocks(source[:used], target[:used])
        flat = state.blocks[record].flatten()
        counters, live, table, ring = split_record(flat, layout)
        counters.copy_(torch.stack((state.pages_used[s], state.leaves_used[s])))
        live.copy_(state.live[s].flatten())
        table.copy_(self._translate_table(state.page_table[s].flatten(0, 1)))
        ring.copy_(state.evict_ring[s].flatten(0, 1))
        state.blocks[record] = flat.view(len(record), -1)

    def _restore(
        self,
        s: int,
        source: torch.Tensor,
        target: torch.Tensor,
        record: torch.Tensor,
        again: int,
    ) -> None:
        state, layout = self._state, self._layout
        kept = state.blocks[record].flatten()
        counters, live, table, ring = split_record(kept, layout)
        self._note(source, target)
        self._copy_blocks(source, target)
        state.pages_used[s], state.leaves_used[s] = counters
        state.live[s].view(-1).copy_(live)
        state.page_table[s].flatten(0, 1).copy_(self._translate_table(table))
        state.evict_ring[s].flatten(0, 1).copy_(ring)
        if again >= 0:
            state.evict_ring[s, :, :, again % layout.ring_size] = 1
            if again < layout.ring_size:
                state.live[s] = again

    def _note(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._moved.copy_(target[0])
        self._moved[source] = target.int()

    def _copy_blocks(self, source: torch.Tensor, target: torch.Tensor) -> None:
        state, layout = self._state, self._layout
        moves = source != target
        source, target = source[moves], target[moves]
        state.blocks[target] = state.blocks[source]
        if layout.leaves_per_block:
            leaves = state.leaves.view(state.num_blocks, -1)
            leaves[target] = self._translate(leaves[source], layout.pages_per_block)

    def _translate_table(self, table: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        own = self._translate(table[:, : layout.leaf_size], layout.pages_per_block)
        if not layout.leaves_per_block:
            return own
        leaves = self._translate(table[:, layout.leaf_size :], layout.leaves_per_block)
        return torch.cat((own, leaves), 1)

    def _translate(self, ids: torch.Tensor, per_block: int) -> torch.Tensor:
        """Pages or leaves, of which each block brings ``per_block``, in the blocks that took the
        place of theirs. What is listed beyond a row's end becomes one of the first block."""
        return self._moved[(ids // per_block).long()] * per_block + ids % per_block


def split_record(
    record: torch.Tensor, layout: ArenaLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a record's bytes, one after the other: counters [2], and of rows live [num_rows],
    page table [num_rows, table_width], verdicts [num_rows, ring_size]."""
    rows = record[8:][: layout.num_rows * layout.record_row_bytes].view(layout.num_rows, -1)
    end = 4 + 4 * layout.table_width
    live, table = rows[:, :4].view(torch.int32)[:, 0], rows[:, 4:end].view(torch.int32)
    return record[:8].view(torch.int32), live, table, rows[:, end : end + layout.ring_size]
