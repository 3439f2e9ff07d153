"""Kernels that keep states and restore them (`backend.triton_snapshots`).

All copies of a run are made by the same launches, which find them in ``lists``
(`backend.copies.PackedCopies`), of ``total`` blocks. WIDTH: columns of a copy, its record's blocks
included.
"""

import triton
import triton.language as tl

from vllm_dms.backend import copies

HEADER = tl.constexpr(copies.HEADER)


@triton.jit
def find_copy(lists, total, copy, WIDTH: tl.constexpr):
    """Where its source, its target and its record are listed, how many blocks it has, its state
    index, and ``again``."""
    columns = lists + 3 * total + copy * WIDTH
    source = lists + tl.load(columns)
    count, s, again = tl.load(columns + 1), tl.load(columns + 2), tl.load(columns + 3)
    return source, source + total, columns + HEADER, count, s, again


@triton.jit
def translate(ids, per_block, source, target, count, places, mask):
    """Pages or leaves in the blocks that took the place of theirs; in the first block, if theirs is
    not of the copy."""
    block = ids // per_block
    place = tl.load(places + block, mask=mask, other=0)
    mask_place = mask & (place < count)
    found = tl.load(source + place, mask=mask_place, other=-1) == block
    place = tl.where(found, place, 0)
    return tl.load(target + place, mask=mask, other=0) * per_block + ids % per_block


@triton.jit(do_not_specialize=["total", "begin", "end"], do_not_specialize_on_alignment=["lists"])
def places_kernel(lists, total, begin, end, places, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (parts of BLOCK blocks of ``begin`` to ``end``): which block of its source each is."""
    t = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < end
    copy = tl.load(lists + 2 * total + t, mask=mask, other=0)
    first = tl.load(lists + 3 * total + copy * WIDTH, mask=mask, other=0)
    tl.store(places + tl.load(lists + t, mask=mask, other=0), t - first, mask=mask)


@triton.jit(do_not_specialize=["total", "begin"], do_not_specialize_on_alignment=["lists"])
def copy_blocks_kernel(
    lists,
    total,
    begin,
    words,
    leaves,
    places,
    pages_used,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    LEAF_ENTRIES: tl.constexpr,
    LEAVES_PAD: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    IN_USE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks from ``begin`` on, parts of a block). IN_USE: only the blocks that the state has
    pages in."""
    t, part = begin + tl.program_id(0), tl.program_id(1)
    src = tl.load(lists + t).to(tl.int64)
    dst = tl.load(lists + total + t).to(tl.int64)
    if src == dst:
        return
    copy = tl.load(lists + 2 * total + t)
    source, target, _, count, s, _ = find_copy(lists, total, copy, WIDTH)
    place = t - tl.load(lists + 3 * total + copy * WIDTH)
    if IN_USE & (place * PAGES_PER_BLOCK >= tl.load(pages_used + s)):
        return
    offs = part * BLOCK + tl.arange(0, BLOCK)
    data = tl.load(words + src * WORDS + offs, mask=offs < WORDS)
    tl.store(words + dst * WORDS + offs, data, mask=offs < WORDS)
    if LEAF_ENTRIES > 0:
        entry = tl.arange(0, LEAVES_PAD)
        mask = (entry < LEAF_ENTRIES) & (part == 0)
        listed = tl.load(leaves + src * LEAF_ENTRIES + entry, mask=mask, other=0)
        listed = translate(listed, PAGES_PER_BLOCK, source, target, count, places, mask)
        tl.store(leaves + dst * LEAF_ENTRIES + entry, listed, mask=mask)


@triton.jit
def record_at(base, record, offs, mask, SIZE: tl.constexpr):
    """Elements ``offs`` of a record spread over blocks of SIZE elements."""
    block = tl.load(record + offs // SIZE, mask=mask, other=0).to(tl.int64)
    return base + block * SIZE + offs % SIZE


@triton.jit(do_not_specialize=["total", "begin"], do_not_specialize_on_alignment=["lists"])
def record_kernel(
    lists,
    total,
    begin,
    words,
    byte_ptr,
    places,
    pages_used,
    leaves_used,
    live,
    page_table,
    evict_ring,
    WIDTH: tl.constexpr,
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
    """Grid (rows of a state, copies from ``begin`` on): what lies beside the pages, into the record
    or out of it."""
    i, copy = tl.program_id(0), begin + tl.program_id(1)
    source, target, record, count, s, again = find_copy(lists, total, copy, WIDTH)
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
    kept_ring = record_at(byte_ptr, record, ring_offs, in_ring, BLOCK_BYTES)
    counter = tl.arange(0, 2)
    kept_counters = record_at(words, record, counter, counter < 2, WORDS)
    own_table = page_table + row * TABLE + entry
    own_ring = evict_ring + row * R + slot

    ids = tl.load(own_table if SAVE else kept_table, mask=in_table, other=0)
    per_block = tl.where(entry < LEAF, PAGES_PER_BLOCK, LEAVES_PER_BLOCK)
    listed = translate(ids, per_block, source, target, count, places, in_table)
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
