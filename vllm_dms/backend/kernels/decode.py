"""Decode attention: one query token per request over all live slots of its rows, without a mask.

Programs share the tiles of a layer as `Schedule` says. A row that ends up with several programs is
put together from their partial results (`merge`).
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    NO_SCORE,
    allow_next_kernel,
    row_index,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.decode_fp8 import attend_row_fp8
from vllm_dms.backend.kernels.decode_int4 import attend_row_int4
from vllm_dms.backend.kernels.merge import finish_row, head_offset, store_partial
from vllm_dms.backend.kernels.page_table import tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages import slot_offset
from vllm_dms.backend.kernels.schedule import BEGIN_FIELDS


@triton.jit
def attend_row(
    q, score_scale, state, row, live, page, leaf, first, end, geo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax of q [BLOCK_M, D_PAD] over tiles [first, end) of a row: ``page`` of the first,
    ``leaf`` of the next.

    score_scale turns a dot product into a base-2 score. Returns the sum of weighted values
    [BLOCK_M, D_PAD], the largest score and the sum of weights [BLOCK_M].

    Slots are the rows and query heads the columns of the products: tensor cores want 16 rows, but
    are content with 8 columns, of which a group fills more.
    """
    q = tl.trans(q)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # added up at the end: warps would wait
    acc = tl.zeros([geo.D_PAD, BLOCK_M], tl.float32)
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        mask_d = mask[:, None] & (offs_d < geo.D)
        ptr = state.pages + slot_offset(page, slot, geo)[:, None] + offs_d
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, leaf, tile + 1, geo, BLOCK_N)
        leaf = tile_leaf(state, row, tile + 2, geo, BLOCK_N)
        k = tl.load(ptr, mask=mask_d, other=0.0)
        scores = tl.dot(k, q, input_precision="ieee")
        scores = tl.where(mask[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0) * score_scale)
        weights = tl.exp2(scores * score_scale - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay[None, :] + weights
        # Loaded as a transpose: transposed later, it would not be prefetched.
        v = tl.load(tl.trans(ptr + geo.P * geo.WIDTH), mask=tl.trans(mask_d), other=0.0)
        acc = tl.dot(v, weights.to(q.dtype), acc * decay[None, :], input_precision="ieee")
        top = new_top
    return tl.trans(acc), top, tl.sum(total, 0)


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    query_ptr,
    output_ptr,
    stride_query,
    stride_output,
    layer,
    state,
    schedule,
    score_scale,
    geo,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    MERGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (PROGRAMS). score_scale: softmax scale times log2(e). BLOCK_M >= G query heads.

    ``OVERLAP``: launched before `store` of this layer is done, whose results it waits for: the
    query may be one of them.
    """
    p = tl.program_id(0)
    begin = schedule.begin + (layer * schedule.PROGRAMS + p) * BEGIN_FIELDS
    start = tl.load(begin)
    stop = tl.load(begin + 1)
    i = tl.load(begin + 2)
    row_begin = tl.load(begin + 3)
    row_end = tl.load(begin + 4)
    token_head = tl.load(begin + 5)
    s = tl.load(begin + 6)
    offs_g = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, geo.D_PAD)
    mask_q = (offs_g < G)[:, None] & (offs_d < geo.D)[None, :]
    offs_q = offs_g[:, None] * geo.D + offs_d[None, :]
    q_ptr = query_ptr + head_offset(token_head, stride_query, geo, G)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    q = tl.load(q_ptr + offs_q, mask=mask_q & (start < stop), other=0.0)

    tile = start
    row_tile = schedule.row_tile + layer * (schedule.N + 1)
    row = row_index(s, layer, token_head % geo.H, geo)
    live = tl.load(state.live + row)
    leaf = tile_leaf(state, row, tile - row_begin, geo, BLOCK_N)
    page = tile_pages(state, row, leaf, tile - row_begin, geo, BLOCK_N)
    leaf = tile_leaf(state, row, tile - row_begin + 1, geo, BLOCK_N)
    while tile < stop:
        # Of the next row: loaded here and below, so that it is there when its turn comes.
        more = row_end < stop
        next_end = tl.load(row_tile + i + 2, mask=more, other=0)
        next_head = tl.load(schedule.row_query + i + 1, mask=more, other=0)
        next_s = tl.load(schedule.row_state + i + 1, mask=more, other=0)

        end = tl.minimum(row_end, stop)
        first = tile - row_begin
        last = tl.minimum(end - row_begin, tl.cdiv(live, BLOCK_N))
        if geo.STORAGE == "fp8":
            acc, top, total = attend_row_fp8(
                q, score_scale, state, row, live, page, leaf, first, last, geo,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        elif geo.STORAGE == "int4":
            acc, top, total = attend_row_int4(
                q, score_scale, state, row, live, page, leaf, first, last, geo,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            tl.static_assert(geo.STORAGE == "model")
            acc, top, total = attend_row(
                q, score_scale, state, row, live, page, leaf, first, last, geo,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip

        row = row_index(next_s, layer, next_head % geo.H, geo)
        live = tl.load(state.live + row, mask=more, other=0)
        page = tile_pages(state, row, leaf * 0, 0, geo, BLOCK_N)
        leaf = tile_leaf(state, row, 1, geo, BLOCK_N)
        q_ptr = query_ptr + head_offset(next_head, stride_query, geo, G)
        q = tl.load(q_ptr + offs_q, mask=mask_q & more, other=0.0)

        begins = row_begin >= start
        out_ptr = output_ptr + head_offset(token_head, stride_output, geo, G)
        if begins & (row_end <= stop):
            acc = acc / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(out_ptr + offs_q, acc, mask=mask_q)
        else:
            store_partial(schedule, p, begins, acc, top, total, geo, G, BLOCK_M)
            if MERGES:
                num_tiles = tl.load(schedule.num_tiles + layer)
                finish_row(schedule, num_tiles, row_begin, row_end, out_ptr, geo, G, G_PAD, PARTS)
        tile = end
        row_begin, row_end, token_head = row_end, next_end, next_head
        i += 1
