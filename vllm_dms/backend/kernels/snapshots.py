"""Kernels that keep a state and restore it: `backend.snapshots.TorchSnapshots` on a GPU."""

import torch
import triton
import triton.language as tl

from vllm_dms.backend.kernels.launch import Launcher
from vllm_dms.backend.snapshots import allocate_moved
from vllm_dms.backend.state import ArenaState

BLOCK_WORDS = 4096  # int64 that a program copies
NUM_LISTED = 1024  # blocks whose new places a program notes


@triton.jit
def translate(moved, ids, PER_BLOCK: tl.constexpr, mask):
    """Pages or leaves in the blocks that took the place of theirs."""
    return tl.load(moved + ids // PER_BLOCK, mask=mask, other=0) * PER_BLOCK + ids % PER_BLOCK


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["source", "target"])
def moved_kernel(source, target, count, moved, BLOCK: tl.constexpr):
    """Grid (parts of BLOCK blocks): which block took whose place."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = j < count
    tl.store(moved + tl.load(source + j, mask=mask), tl.load(target + j, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["s"], do_not_specialize_on_alignment=["source", "target"])
def copy_blocks_kernel(
    source,
    target,
    s,
    words,
    leaves,
    moved,
    pages_used,
    WORDS: tl.constexpr,
    LEAF_ENTRIES: tl.constexpr,
    LEAVES_PAD: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    IN_USE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks, parts of a block). IN_USE: only the blocks that state ``s`` has pages in."""
    j, part = tl.program_id(0), tl.program_id(1)
    used = tl.load(pages_used + s)
    if IN_USE & (j * PAGES_PER_BLOCK >= used):
        return
    src = tl.load(source + j).to(tl.int64)
    dst = tl.load(target + j).to(tl.int64)
    if src == dst:
        return
    offs = part * BLOCK + tl.arange(0, BLOCK)
    data = tl.load(words + src * WORDS + offs, mask=offs < WORDS)
    tl.store(words + dst * WORDS + offs, data, mask=offs < WORDS)
    if LEAF_ENTRIES > 0:
        entry = tl.arange(0, LEAVES_PAD)
        mask = (entry < LEAF_ENTRIES) & (part == 0)
        listed = tl.load(leaves + src * LEAF_ENTRIES + entry, mask=mask, other=0)
        listed = translate(moved, listed, PAGES_PER_BLOCK, mask)
        tl.store(leaves + dst * LEAF_ENTRIES + entry, listed, mask=mask)


@triton.jit
def record_at(base, record, offs, mask, SIZE: tl.constexpr):
    """Elements ``offs`` of a record spread over blocks of SIZE elements."""
    block = tl.load(record + offs // SIZE, mask=mask, other=0).to(tl.int64)
    return base + block * SIZE + offs % SIZE


@triton.jit(do_not_specialize=["s", "again"], do_not_specialize_on_alignment=["record"])
def record_kernel(
    record,
    s,
    again,
    words,
    bytes,
    moved,
    pages_used,
    leaves_used,
    live,
    page_table,
    evict_ring,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    LEAF: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_PAD: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    LEAVES_PER_BLOCK: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Grid (rows of a state): what lies beside the pages, into the record or out of it; ``again``
    as in `Snapshots.restore`."""
    i = tl.program_id(0)
    row = s.to(tl.int64) * ROWS + i
    WORDS: tl.constexpr = BLOCK_BYTES // 4
    zero = tl.arange(0, 2) * 0
    offs = zero + 2 + i * (ROW_BYTES // 4)
    one = tl.arange(0, 2) < 1
    kept_live = record_at(words, record, offs, one, WORDS)
    entry = tl.arange(0, TABLE_PAD)
    in_table = entry < TABLE
    kept_table = record_at(words, record, 3 + i * (ROW_BYTES // 4) + entry, in_table, WORDS)
    slot = tl.arange(0, R_PAD)
    in_ring = slot < R
    ring_offs = 8 + i * ROW_BYTES + 4 + 4 * TABLE + slot
    kept_ring = record_at(bytes, record, ring_offs, in_ring, BLOCK_BYTES)
    counter = tl.arange(0, 2)
    kept_counters = record_at(words, record, counter, counter < 2, WORDS)
    own_table = page_table + row * TABLE + entry
    own_ring = evict_ring + row * R + slot

    ids = tl.load(own_table if SAVE else kept_table, mask=in_table, other=0)
    listed = translate(moved, ids, PAGES_PER_BLOCK, in_table)
    if LEAVES_PER_BLOCK > 0:
        leaf = translate(moved, ids, LEAVES_PER_BLOCK, in_table)
        listed = tl.where(entry < LEAF, listed, leaf)
    verdicts = tl.load(own_ring if SAVE else kept_ring, mask=in_ring, other=0)
    if SAVE:
        tl.store(kept_table, listed, mask=in_table)
        tl.store(kept_ring, verdicts, mask=in_ring)
        tl.store(kept_live, tl.load(live + row + zero), mask=one)
        used = tl.where(counter == 0, tl.load(pages_used + s), tl.load(leaves_used + s))
        tl.store(kept_counters, used, mask=(counter < 2) & (i == 0))
    else:
        tl.store(own_table, listed, mask=in_table)
        verdicts = tl.where((again >= 0) & (slot == again % R), 1, verdicts)
        tl.store(own_ring, verdicts, mask=in_ring)
        slots = tl.load(kept_live, mask=one, other=0)
        slots = tl.where((again >= 0) & (again < R), again, slots)
        tl.store(live + row + zero, slots, mask=one)
        used = tl.load(kept_counters)
        tl.store(pages_used + s + zero, used, mask=(counter == 0) & (i == 0))
        tl.store(leaves_used + s + zero, used, mask=(counter == 1) & (i == 0))


class TritonSnapshots:
    """`snapshots.Snapshots`: three launches for a copy, none of which the host waits for."""

    def __init__(self, state: ArenaState) -> None:
        self._state, layout = state, state.layout
        self._bytes = state.blocks.view(-1)
        moved = allocate_moved(state)
        words, entries = layout.block_bytes // 8, layout.leaves_per_block * layout.leaf_size
        ring_pad, table_pad = map(triton.next_power_of_2, (layout.ring_size, layout.table_width))
        self._parts = triton.cdiv(words, BLOCK_WORDS)
        self._note_moved = Launcher(moved_kernel, moved, NUM_LISTED)
        self._copy_blocks, self._copy_record = {}, {}
        for saves in (False, True):
            self._copy_blocks[saves] = Launcher(
                copy_blocks_kernel, self._bytes.view(torch.int64), state.leaves, moved,
                state.pages_used, words, entries, triton.next_power_of_2(max(entries, 1)),
                layout.pages_per_block, saves, BLOCK_WORDS, num_warps=8,
            )  # fmt: skip
            self._copy_record[saves] = Launcher(
                record_kernel, self._bytes.view(torch.int32), self._bytes, moved,
                state.pages_used, state.leaves_used, state.live, state.page_table,
                state.evict_ring, layout.num_rows, layout.ring_size, ring_pad, layout.leaf_size,
                layout.table_width, table_pad, layout.pages_per_block, layout.leaves_per_block,
                layout.record_row_bytes, layout.block_bytes, saves,
            )  # fmt: skip

    def warm_up(self) -> None:
        """Compile the kernels, on the null state: before the first request waits for it."""
        blocks = torch.zeros(self._state.layout.record_blocks, dtype=torch.int32).to(
            self._bytes.device
        )
        self.save(0, blocks[:1], blocks[:1], blocks)
        self.restore(0, blocks[:1], blocks[:1], blocks)
        self._state.blocks[0].zero_()

    def save(
        self, s: int, source: torch.Tensor, target: torch.Tensor, record: torch.Tensor
    ) -> None:
        self._copy(s, source, target, record, -1, saves=True)

    def restore(
        self,
        s: int,
        source: torch.Tensor,
        target: torch.Tensor,
        record: torch.Tensor,
        again: int = -1,
    ) -> None:
        self._copy(s, source, target, record, again, saves=False)

    def _copy(
        self,
        s: int,
        source: torch.Tensor,
        target: torch.Tensor,
        record: torch.Tensor,
        again: int,
        saves: bool,
    ) -> None:
        count = len(source)
        self._note_moved((triton.cdiv(count, NUM_LISTED), 1), None, source, target, count)
        self._copy_blocks[saves]((count, self._parts), None, source, target, s)
        rows = self._state.layout.num_rows
        self._copy_record[saves]((rows, 1), None, record, s, again)
