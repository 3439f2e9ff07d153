"""Which pages a row has: the two levels of `arena.layout`, read and extended.

``index`` numbers a row's pages. Those from LEAF on are listed in leaves; what is loaded for that is
masked, so that shorter rows read as much as if there were one level.
"""

import triton
import triton.language as tl


@triton.jit
def leaf_of(state, geo, row, index, mask):
    """The leaf that lists page ``index``; 0 where masked or where the row itself does."""
    if geo.MAX_LEAVES == 0:
        return (row * 0 + index * 0).to(tl.int32)
    else:
        ptr = state.page_table + row * geo.TABLE + (geo.LEAF - 1) + index // geo.LEAF
        return tl.load(ptr, mask=mask & (index >= geo.LEAF), other=0)


@triton.jit
def entry_of(state, geo, row, leaf, index):
    """Where page ``index`` is listed, by its leaf if that is not the row itself."""
    own = state.page_table + row * geo.TABLE + index
    if geo.MAX_LEAVES == 0:
        return own
    else:
        listed = state.leaves + leaf.to(tl.int64) * geo.LEAF + index % geo.LEAF
        return tl.where(index < geo.LEAF, own, listed)


@triton.jit
def page_of(state, geo, row, slot, mask):
    """Page ids of slots of a row; 0 where masked."""
    index = slot // geo.P
    leaf = leaf_of(state, geo, row, index, mask)
    return tl.load(entry_of(state, geo, row, leaf, index), mask=mask, other=0)


@triton.jit
def tile_leaf(state, row, tile, geo, BLOCK_N: tl.constexpr):
    """The leaf of all slots of a tile of BLOCK_N: LEAF * P is a multiple of BLOCK_N. Any leaf that
    exists where the row holds no such slots."""
    index = tile * BLOCK_N // geo.P
    return leaf_of(state, geo, row, index, index < geo.MAX_PAGES)


@triton.jit
def tile_pages(state, row, leaf, tile, geo, BLOCK_N: tl.constexpr):
    """The page of a tile of BLOCK_N slots, or the page of each of its slots, by its leaf. Any
    number, not to be followed, where the row holds no such slots."""
    if BLOCK_N <= geo.P:
        index = tile * BLOCK_N // geo.P
    else:
        index = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) // geo.P
    ptr = entry_of(state, geo, row, leaf, index)
    return tl.load(ptr, mask=index < geo.MAX_PAGES, other=0)


@triton.jit
def share_of_block(state, geo, s, i, PER_BLOCK: tl.constexpr, mask):
    """The i-th of the things of which each block of state s brings PER_BLOCK."""
    ptr = state.block_rows + s.to(tl.int64) * geo.MAX_BLOCKS + i // PER_BLOCK
    return tl.load(ptr, mask=mask, other=0) * PER_BLOCK + i % PER_BLOCK


@triton.jit
def next_pages(state, geo, s, row, index, takes):
    """The page that each row [N] which ``takes`` one gets as its page ``index``, lowest first: in
    one program, so that no atomics are needed. Also what `list_pages` needs to know."""
    used = tl.load(state.pages_used + s)
    i = used + tl.cumsum(takes.to(tl.int32), 0) - takes.to(tl.int32)
    page = share_of_block(state, geo, s, i, geo.PAGES_PER_BLOCK, takes)
    used += tl.sum(takes.to(tl.int32), 0)
    leaf = index * 0
    opens = takes & (index < 0)
    used_leaves = used * 0
    if geo.MAX_LEAVES > 0:
        opens = takes & (index >= geo.LEAF) & (index % geo.LEAF == 0)
        used_leaves = tl.load(state.leaves_used + s)
        j = used_leaves + tl.cumsum(opens.to(tl.int32), 0) - opens.to(tl.int32)
        new_leaf = share_of_block(state, geo, s, j, geo.LEAVES_PER_BLOCK, opens)
        leaf = tl.where(opens, new_leaf, leaf_of(state, geo, row, index, takes & (opens == 0)))
        used_leaves += tl.sum(opens.to(tl.int32), 0)
    return page, (leaf, opens, used, used_leaves)


@triton.jit
def list_pages(state, geo, s, row, index, takes, page, plan):
    """Put down what `next_pages` gave, once no thread of the program has anything left to read."""
    leaf, opens, used, used_leaves = plan
    tl.store(entry_of(state, geo, row, leaf, index), page, mask=takes)
    tl.store(state.pages_used + s, used)
    if geo.MAX_LEAVES > 0:
        ptr = state.page_table + row * geo.TABLE + (geo.LEAF - 1) + index // geo.LEAF
        tl.store(ptr, leaf, mask=opens)
        tl.store(state.leaves_used + s, used_leaves)


@triton.jit
def take_pages(state, geo, s, row, first, end, BLOCK: tl.constexpr):
    """Give a row its pages [first, end), beside programs that do the same for other rows."""
    used = tl.atomic_add(state.pages_used + s, end - first)
    if geo.MAX_LEAVES > 0:
        first_leaf = tl.maximum(tl.cdiv(first, geo.LEAF), 1) - 1
        end_leaf = tl.maximum(tl.cdiv(end, geo.LEAF), 1) - 1
        if end_leaf > first_leaf:
            used_leaves = tl.atomic_add(state.leaves_used + s, end_leaf - first_leaf)
            for j in range(first_leaf, end_leaf, BLOCK):
                number = j + tl.arange(0, BLOCK)
                mask = number < end_leaf
                i = used_leaves + number - first_leaf
                leaf = share_of_block(state, geo, s, i, geo.LEAVES_PER_BLOCK, mask)
                tl.store(state.page_table + row * geo.TABLE + geo.LEAF + number, leaf, mask=mask)
            tl.debug_barrier()
    for i in range(first, end, BLOCK):
        index = i + tl.arange(0, BLOCK)
        mask = index < end
        i_page = used + index - first
        page = share_of_block(state, geo, s, i_page, geo.PAGES_PER_BLOCK, mask)
        leaf = leaf_of(state, geo, row, index, mask)
        tl.store(entry_of(state, geo, row, leaf, index), page, mask=mask)
