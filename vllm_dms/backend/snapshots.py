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

Copies are enqueued one after the other, in the order in which they were decided: a block may be
read for one copy and written by the next.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import Copy
from vllm_dms.backend.state import ArenaState


class Snapshots(Protocol):
    """Blocks are int32 tensors on the arena's device; ``source[j]`` may be ``target[j]``."""

    def save(
        self, s: int, source: torch.Tensor, target: torch.Tensor, record: torch.Tensor
    ) -> None:
        """Keep the state of index ``s``. Of its blocks ``source``, those in use go to
        ``target``."""

    def restore(
        self,
        s: int,
        source: torch.Tensor,
        target: torch.Tensor,
        record: torch.Tensor,
        again: int = -1,
    ) -> None:
        """Make what `save` kept in ``source`` and ``record`` the state of index ``s``, whose first
        blocks are ``target``. ``again``: position of the last token, if the coming step stores it
        once more."""


class TorchSnapshots:
    """In plain PyTorch, for a CPU, and the truth for the kernels."""

    def __init__(self, state: ArenaState) -> None:
        self._state, self._layout = state, state.layout
        self._moved = allocate_moved(state)

    def save(
        self, s: int, source: torch.Tensor, target: torch.Tensor, record: torch.Tensor
    ) -> None:
        state, layout = self._state, self._layout
        used = -(-int(state.pages_used[s]) // layout.pages_per_block)
        self._copy_blocks(source[:used], target[:used])
        rows = state.blocks.new_zeros(layout.num_rows, layout.record_row_bytes)
        live, table, ring = split_rows(rows, layout)
        live.copy_(state.live[s].flatten())
        table.copy_(self._translate_table(state.page_table[s].flatten(0, 1)))
        ring.copy_(state.evict_ring[s].flatten(0, 1))
        counters = torch.stack((state.pages_used[s], state.leaves_used[s]))
        data = torch.cat((counters.view(torch.uint8), rows.flatten()))
        flat = data.new_zeros(len(record) * layout.block_bytes)
        flat[: len(data)] = data
        state.blocks[record.long()] = flat.view(len(record), -1)

    def restore(
        self,
        s: int,
        source: torch.Tensor,
        target: torch.Tensor,
        record: torch.Tensor,
        again: int = -1,
    ) -> None:
        state, layout = self._state, self._layout
        flat = state.blocks[record.long()].flatten()
        rows = flat[8:][: layout.num_rows * layout.record_row_bytes].view(layout.num_rows, -1)
        self._copy_blocks(source, target)
        live, table, ring = split_rows(rows, layout)
        state.pages_used[s], state.leaves_used[s] = flat[:8].view(torch.int32)
        state.live[s].view(-1).copy_(live)
        state.page_table[s].flatten(0, 1).copy_(self._translate_table(table))
        state.evict_ring[s].flatten(0, 1).copy_(ring)
        if again >= 0:
            state.evict_ring[s, :, :, again % layout.ring_size] = 1
            if again < layout.ring_size:
                state.live[s] = again

    def _copy_blocks(self, source: torch.Tensor, target: torch.Tensor) -> None:
        state, layout = self._state, self._layout
        self._moved[source.long()] = target
        moves = source != target
        source, target = source[moves].long(), target[moves].long()
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
        place of theirs. What is listed beyond a row's end becomes some that exist."""
        return self._moved[(ids // per_block).long()] * per_block + ids % per_block


def allocate_moved(state: ArenaState) -> torch.Tensor:
    """int32 [num_blocks]: the block that took a block's place in the copy at hand; of others, some
    block."""
    return torch.zeros(state.num_blocks, dtype=torch.int32, device=state.blocks.device)


def split_rows(
    rows: torch.Tensor, layout: ArenaLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a record's rows: live [num_rows], page table [num_rows, table_width], verdicts
    [num_rows, ring_size]."""
    end = 4 + 4 * layout.table_width
    ring = rows[:, end : end + layout.ring_size]
    return rows[:, :4].view(torch.int32)[:, 0], rows[:, 4:end].view(torch.int32), ring


def on_device(
    copies: Sequence[Copy], device: torch.device
) -> list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What `save` and `restore` take, for each copy; one transfer, which nobody waits for."""
    if not copies:
        return []
    sizes = [len(blocks) for copy in copies for blocks in copy.blocks]
    packed = torch.from_numpy(np.concatenate([b for copy in copies for b in copy.blocks]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = iter(packed.split(sizes))
    return [(copy.state, next(parts), next(parts), next(parts)) for copy in copies]
