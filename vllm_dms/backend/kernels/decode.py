"""Decode attention: one query token per request over all live slots of its rows, without a mask.

Rows are cut into tiles of BLOCK_N slots. All tiles of a layer, row after row, are shared out evenly
to a fixed number of programs, whatever the lengths of the rows. A row that ends up with several
programs is merged by the last of them to finish.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import NO_SCORE, row_index, slot_offset, tile_pages
from vllm_dms.backend.kernels.decode_fp8 import attend_row_fp8


class Schedule(NamedTuple):
    """Decode rows of a step, in order, and what programs tell each other.

    N is the bound max_num_seqs * H on rows, PROGRAMS the number of programs. A program leaves at
    most two partial results: 2p of a row that it joins midway, 2p + 1 of one that it starts.
    """

    row_query: Any  # int32 [N]: query token * H + head
    row_state: Any  # int32 [N]: state index
    row_tile: Any  # int32 [L, N + 1]: tiles before each row; after the last: of all
    first_row: Any  # int32 [L, PROGRAMS]: row of the program's first tile
    num_rows: Any  # int32 [1]
    arrived: Any  # int32 [N]: programs done with their part of the row; 0 between launches
    partial: Any  # float32 [2 * PROGRAMS, G, D]: sum of weighted values
    partial_max: Any  # float32 [2 * PROGRAMS, G]: largest score, base 2
    partial_sum: Any  # float32 [2 * PROGRAMS, G]: sum of weights
    N: Any
    PROGRAMS: Any
    MIN_TILES: Any  # of a program


@triton.jit
def tiles_per_program(total, schedule):
    return tl.maximum(tl.cdiv(total, schedule.PROGRAMS), schedule.MIN_TILES)


@triton.jit(do_not_specialize=["num_reqs"])
def schedule_kernel(
    state,
    batch,
    schedule,
    num_reqs,
    geo,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (L): fill `Schedule` for every layer of a step. Before a layer's `store`, so that rows
    count one slot more than they hold."""
    layer = tl.program_id(0)
    row_tile = schedule.row_tile + layer * (schedule.N + 1)
    num_rows = 0
    num_tiles = 0
    for r0 in range(0, num_reqs * geo.H, BLOCK_ROWS):
        r = r0 + tl.arange(0, BLOCK_ROWS)
        b, h = r // geo.H, r % geo.H
        mask = b < num_reqs
        start = tl.load(batch.query_start + b, mask=mask, other=0)
        m = tl.load(batch.query_start + b + 1, mask=mask, other=0) - start
        mask = mask & (m == 1)
        n = tl.load(batch.seq_lens + b, mask=mask, other=1) - 1
        block_ptr = batch.block_table + b.to(tl.int64) * batch.block_table_stride
        s = tl.load(
            state.state_of_block + tl.load(block_ptr, mask=mask, other=0), mask=mask, other=0
        )
        live = tl.load(state.live + row_index(s, layer, h, geo), mask=mask, other=0)
        live = tl.where((n == 0) | (s == 0), 0, live)
        tiles = tl.where(mask, tl.cdiv(live + 1, BLOCK_N), 0)

        i = num_rows + tl.cumsum(mask.to(tl.int32), 0) - 1
        tl.store(row_tile + i, num_tiles + tl.cumsum(tiles, 0) - tiles, mask=mask)
        tl.store(schedule.row_query + i, start * geo.H + h, mask=mask & (layer == 0))
        tl.store(schedule.row_state + i, s, mask=mask & (layer == 0))
        num_rows += tl.sum(mask.to(tl.int32), 0)
        num_tiles += tl.sum(tiles, 0)
    tl.store(row_tile + num_rows, num_tiles)
    tl.store(schedule.num_rows, num_rows, mask=layer == 0)
    tl.debug_barrier()

    # Every program's first row at once: the last row that does not begin after its first tile.
    p = tl.arange(0, PROGRAMS_PAD)
    tile = p * tiles_per_program(num_tiles, schedule)
    low, high = p * 0, p * 0 + num_rows
    for _ in range(STEPS):
        middle = (low + high) // 2
        begin = tl.load(row_tile + middle, mask=low < high, other=0)
        low = tl.where((low < high) & (begin <= tile), middle + 1, low)
        high = tl.where((low < high) & (begin > tile), middle, high)
    tl.store(
        schedule.first_row + layer * schedule.PROGRAMS + p, low - 1, mask=p < schedule.PROGRAMS
    )


@triton.jit
def load_tile(ptr, offsets, mask, geo):
    """[BLOCK_N, D_PAD] of K or V."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    mask = mask[:, None] & (offs_d < geo.D)
    return tl.load(ptr + offsets[:, None] + offs_d, mask=mask, other=0.0)


@triton.jit
def attend_row(
    q, q_scale, state, row, live, first, end, geo, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Online softmax of q [BLOCK_M, D_PAD] over tiles [first, end) of a row.

    q_scale [BLOCK_M] turns a dot product into a base-2 score.
    """
    offs_n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, geo.D_PAD], tl.float32)
    page = tile_pages(state, row, live, first, geo, BLOCK_N)
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        offsets = slot_offset(page, slot, geo)
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, live, tile + 1, geo, BLOCK_N)
        k = load_tile(state.pages, offsets, mask, geo)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * q_scale[:, None]
        scores = tl.where(mask[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        v = load_tile(state.pages + geo.P * geo.D, offsets, mask, geo)
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def merge_row(
    out_ptr,
    schedule,
    row_begin,
    row_end,
    share,
    geo,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write [G, D] from the partial results of all programs that had tiles of a row."""
    offs_g = tl.arange(0, G_PAD)
    offs_d = tl.arange(0, geo.D_PAD)
    top = tl.full([G_PAD], NO_SCORE, tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, geo.D_PAD], tl.float32)
    first = row_begin // share
    last = (row_end - 1) // share
    for p0 in range(first, last + 1, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        i = (2 * p + (p == first).to(tl.int32))[:, None] * G + offs_g[None, :]
        mask = (p <= last)[:, None] & (offs_g < G)[None, :]
        # .cg: past the first-level cache, which other programs' writes do not reach
        tops = tl.load(schedule.partial_max + i, mask=mask, other=NO_SCORE, cache_modifier=".cg")
        sums = tl.load(schedule.partial_sum + i, mask=mask, other=0.0, cache_modifier=".cg")
        offs = i[:, :, None] * geo.D + offs_d[None, None, :]
        mask_d = mask[:, :, None] & (offs_d < geo.D)[None, None, :]
        values = tl.load(schedule.partial + offs, mask=mask_d, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(sums * weights, 0)
        acc = acc * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    mask = (offs_g < G)[:, None] & (offs_d < geo.D)[None, :]
    tl.store(out_ptr + offs_g[:, None] * geo.D + offs_d[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    query_ptr,
    output_ptr,
    stride_query,
    stride_output,
    state,
    schedule,
    layer,
    score_scale,
    geo,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MERGE: tl.constexpr,
):
    """Grid (PROGRAMS). score_scale: softmax scale times log2(e). BLOCK_M >= G query heads."""
    p = tl.program_id(0)
    row_tile = schedule.row_tile + layer * (schedule.N + 1)
    num_tiles = tl.load(row_tile + tl.load(schedule.num_rows))
    share = tiles_per_program(num_tiles, schedule)
    tile = p * share
    stop = tl.minimum(tile + share, num_tiles)
    i = tl.load(schedule.first_row + layer * schedule.PROGRAMS + p)
    offs_g = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, geo.D_PAD)
    mask_q = (offs_g < G)[:, None] & (offs_d < geo.D)[None, :]
    offs_q = offs_g[:, None] * geo.D + offs_d[None, :]

    while tile < stop:
        row_begin = tl.load(row_tile + i)
        row_end = tl.load(row_tile + i + 1)
        token_head = tl.load(schedule.row_query + i)
        s = tl.load(schedule.row_state + i)
        token, h = (token_head // geo.H).to(tl.int64), token_head % geo.H
        row = row_index(s, layer, h, geo)
        live = tl.where(s == 0, 0, tl.load(state.live + row))
        end = tl.minimum(row_end, stop)

        q = tl.load(
            query_ptr + token * stride_query + h * G * geo.D + offs_q, mask=mask_q, other=0.0
        )
        q_scale = tl.full([BLOCK_M], 1.0, tl.float32) * score_scale
        first = tile - row_begin
        if geo.QUANTIZED:
            # q is scaled to fit the range of float16, into which FP8 widens without loss.
            q = q.to(tl.float32)
            largest = tl.max(tl.abs(q), 1)
            largest = tl.where(largest == 0, 1.0, largest)
            q = (q / largest[:, None]).to(tl.float16)
            acc, top, total = attend_row_fp8(
                q, q_scale * largest, state, row, live, first, end - row_begin, geo,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            acc, top, total = attend_row(
                q, q_scale, state, row, live, first, end - row_begin, geo, BLOCK_M, BLOCK_N
            )

        out_ptr = output_ptr + token * stride_output + h * G * geo.D
        if (tile == row_begin) & (end == row_end):
            acc = acc / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(out_ptr + offs_q, acc, mask=mask_q)
        else:
            part = (2 * p + (tile == row_begin).to(tl.int32)) * G
            tl.store(schedule.partial_max + part + offs_g, top, mask=offs_g < G)
            tl.store(schedule.partial_sum + part + offs_g, total, mask=offs_g < G)
            tl.store(schedule.partial + part * geo.D + offs_q, acc, mask=mask_q)
            tl.debug_barrier()
            others = (row_end - 1) // share - row_begin // share
            if tl.atomic_add(schedule.arrived + i, 1, sem="acq_rel") == others:
                tl.store(schedule.arrived + i, 0)
                merge_row(out_ptr, schedule, row_begin, row_end, share, geo, G, G_PAD, BLOCK_MERGE)
        tile = end
        i += 1
