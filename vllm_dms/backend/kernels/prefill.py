"""Prefill attention: requests with several query tokens, exactly the DMS mask.

A block of query tokens sees the survivors that left the window of its first token, all of them
and without a mask, and then the band of raw tokens from that window to the block's last token. The
band's stored part is read from the ring, the rest from the chunk itself. Only the band's two ends
need the mask j <= i and (i - j <= W or kept).
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    NO_SCORE,
    allow_next_kernel,
    find_request,
    load_request,
    row_index,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.page_table import page_of, tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages import load_slots


@triton.jit
def attend_tile(q, k, v, acc, top, total, score_scale, visible, MASKED: tl.constexpr):
    """One step of the online softmax: q [M, D_PAD]; k, v [N, D_PAD]; visible [M, N] or [1, N]."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
    weights = tl.exp2(scores * score_scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attend_survivors(
    q, acc, top, total, score_scale, state, row, end, lo, hi, geo,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of slots [lo, hi), lo a multiple of BLOCK_N. MASKED: only slots in [R, end) count."""
    offs_n = tl.arange(0, BLOCK_N)
    leaf = tile_leaf(state, row, lo // BLOCK_N, geo, BLOCK_N)
    for slot0 in range(lo, hi, BLOCK_N):
        slot = slot0 + offs_n
        mask = (slot >= geo.R) & (slot < end)
        page = tile_pages(state, row, leaf, slot0 // BLOCK_N, geo, BLOCK_N)
        leaf = tile_leaf(state, row, slot0 // BLOCK_N + 1, geo, BLOCK_N)
        k, v = load_slots(state, page, slot, mask, q.dtype, geo, MASKED)
        acc, top, total = attend_tile(q, k, v, acc, top, total, score_scale, mask[None, :], MASKED)
    return acc, top, total


@triton.jit
def attend_ring(
    q, acc, top, total, score_scale, state, row, position, lo, n, geo, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Stored tokens [lo, n) of the window, position [M] of the queries."""
    for j0 in range(lo, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        mask = j < n
        slot = j % geo.R
        k, v = load_slots(
            state, page_of(state, geo, row, slot, mask), slot, mask, q.dtype, geo, True
        )
        evict = tl.load(state.evict_ring + row * geo.R + slot, mask=mask, other=1)
        in_window = position[:, None] - j[None, :] < geo.R
        visible = mask[None, :] & (in_window | (evict == 0)[None, :])
        acc, top, total = attend_tile(q, k, v, acc, top, total, score_scale, visible, True)
    return acc, top, total


@triton.jit
def attend_chunk(
    q, acc, top, total, score_scale, key_ptr, value_ptr, stride_key, stride_value, evict_ptr,
    t, lo, hi, geo, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Chunk tokens [lo, hi), whole tiles unless MASKED; t [M] are the queries' own chunk tokens."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    for c0 in range(lo, hi, BLOCK_N):
        c = c0 + tl.arange(0, BLOCK_N)
        mask = c < hi
        visible = mask[None, :]
        mask_d = offs_d < geo.D
        if MASKED:
            mask_d = mask[:, None] & mask_d
            evict = tl.load(evict_ptr + c.to(tl.int64) * geo.H, mask=mask, other=1)
            age = t[:, None] - c[None, :]
            visible = visible & (age >= 0) & ((age < geo.R) | (evict == 0)[None, :])
        c = c.to(tl.int64)[:, None]
        k = tl.load(key_ptr + c * stride_key + offs_d, mask=mask_d, other=0.0)
        v = tl.load(value_ptr + c * stride_value + offs_d, mask=mask_d, other=0.0)
        acc, top, total = attend_tile(q, k, v, acc, top, total, score_scale, visible, MASKED)
    return acc, top, total


@triton.jit(do_not_specialize=["num_reqs", "layer"])
def prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    stride_query,
    stride_key,
    stride_value,
    stride_output,
    num_reqs,
    layer,
    state,
    requests,
    num_survivors_ptr,
    evict_ptr,
    score_scale,
    geo,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (blocks of BLOCK_M // G query tokens, H), the last tokens first: they see most.
    score_scale: softmax scale times log2(e)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    h = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, t0 = find_request(requests, block, num_reqs, geo, BLOCK_Q)
    start, m, n, s = load_request(requests, b)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    if (m <= 1) | (t0 >= m):
        return
    row = row_index(s, layer, h, geo)
    start = start.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    t = t0 + offs_m // G
    head = h * G + offs_m % G
    mask_q = ((offs_m < BLOCK_Q * G) & (t < m))[:, None] & (offs_d < geo.D)
    offs_q = (start + t) * stride_query + head * geo.D
    q = tl.load(query_ptr + offs_q[:, None] + offs_d, mask=mask_q, other=0.0)

    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, geo.D_PAD], tl.float32)

    # Survivors: slots [R, end), tiles aligned to pages, masked in the first and the last one.
    count = tl.load(num_survivors_ptr + (start + t0) * geo.H + h)
    end = geo.R + tl.where(s == 0, 0, count)
    lo = geo.R // BLOCK_N * BLOCK_N
    full = tl.cdiv(geo.R, BLOCK_N) * BLOCK_N
    tail = tl.maximum(end // BLOCK_N * BLOCK_N, full)
    lo = tl.where(end > geo.R, lo, full)
    acc, top, total = attend_survivors(
        q, acc, top, total, score_scale, state, row, end, lo, full, geo, BLOCK_N, True
    )
    acc, top, total = attend_survivors(
        q, acc, top, total, score_scale, state, row, end, full, tail, geo, BLOCK_N, False
    )
    acc, top, total = attend_survivors(
        q, acc, top, total, score_scale, state, row, end, tail, end, geo, BLOCK_N, True
    )

    # The band: positions [n + t0 - W, n + last]; in chunk tokens [t0 - W, last].
    band = tl.maximum(n + t0 - (geo.R - 1), 0)
    band = tl.where(s == 0, tl.maximum(band, n), band)
    acc, top, total = attend_ring(
        q, acc, top, total, score_scale, state, row, n + t, band, n, geo, BLOCK_N
    )
    key_ptr += start * stride_key + h * geo.D
    value_ptr += start * stride_value + h * geo.D
    evict_ptr += start * geo.H + h
    last = tl.minimum(t0 + BLOCK_Q, m) - 1
    lo = tl.maximum(t0 - (geo.R - 1), 0)
    # In between, [inner, outer): in the window of the block's last query, not after its first.
    inner = lo + tl.cdiv(tl.maximum(last - (geo.R - 1) - lo, 0), BLOCK_N) * BLOCK_N
    inner = tl.minimum(inner, last + 1)
    outer = inner + tl.maximum(t0 + 1 - inner, 0) // BLOCK_N * BLOCK_N
    acc, top, total = attend_chunk(
        q, acc, top, total, score_scale, key_ptr, value_ptr, stride_key, stride_value, evict_ptr,
        t, lo, inner, geo, BLOCK_N, True,
    )  # fmt: skip
    acc, top, total = attend_chunk(
        q, acc, top, total, score_scale, key_ptr, value_ptr, stride_key, stride_value, evict_ptr,
        t, inner, outer, geo, BLOCK_N, False,
    )  # fmt: skip
    acc, top, total = attend_chunk(
        q, acc, top, total, score_scale, key_ptr, value_ptr, stride_key, stride_value, evict_ptr,
        t, outer, last + 1, geo, BLOCK_N, True,
    )  # fmt: skip

    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    offs_o = (start + t) * stride_output + head * geo.D
    tl.store(output_ptr + offs_o[:, None] + offs_d, out, mask=mask_q)
