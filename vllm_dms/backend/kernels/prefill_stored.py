"""Prefill attention over what was stored, for queries that have attended to their own chunk.

Attention over a chunk itself is plain: causal, and no key in the window is masked. Any fast kernel
computes that (`chunk_attention`), and leaves for each query an output and the logarithm of its sum
of weights. Here the same softmax goes on over the rest: the ring, by position, and the survivors
of what left the window of each query, which are the first of the row's. Verdicts are not asked.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    allow_next_kernel,
    find_request,
    load_request,
    row_index,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.page_table import page_of, tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages import load_slots
from vllm_dms.backend.kernels.prefill import attend_tile

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_slots(
    q, acc, top, total, score_scale, state, row, first, end, lo, hi, geo,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of slots [lo, hi), lo a multiple of BLOCK_N. MASKED: query i sees [first, end[i]), none
    beyond hi."""
    offs_n = tl.arange(0, BLOCK_N)
    leaf = tile_leaf(state, row, lo // BLOCK_N, geo, BLOCK_N)
    for slot0 in range(lo, hi, BLOCK_N):
        slot = slot0 + offs_n
        mask = (slot >= first) & (slot < hi)
        visible = mask[None, :] & (slot[None, :] < end[:, None])
        page = tile_pages(state, row, leaf, slot0 // BLOCK_N, geo, BLOCK_N)
        leaf = tile_leaf(state, row, slot0 // BLOCK_N + 1, geo, BLOCK_N)
        k, v = load_slots(state, page, slot, mask, q.dtype, geo, MASKED)
        acc, top, total = attend_tile(q, k, v, acc, top, total, score_scale, visible, MASKED)
    return acc, top, total


@triton.jit
def attend_window(
    q, acc, top, total, score_scale, state, row, position, lo, n, geo, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Stored tokens [lo, n), of which the queries at position [M] see those in their window."""
    for j0 in range(lo, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        mask = j < n
        slot = j % geo.R
        page = page_of(state, geo, row, slot, mask)
        k, v = load_slots(state, page, slot, mask, q.dtype, geo, True)
        visible = mask[None, :] & (position[:, None] - j[None, :] < geo.R)
        acc, top, total = attend_tile(q, k, v, acc, top, total, score_scale, visible, True)
    return acc, top, total


@triton.jit(do_not_specialize=["stride_lse", "num_reqs", "layer"])
def prefill_stored_kernel(
    query_ptr,
    output_ptr,
    lse_ptr,
    stride_query,
    stride_output,
    stride_lse,
    num_reqs,
    layer,
    state,
    requests,
    num_survivors_ptr,
    score_scale,
    geo,
    G: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (blocks of BLOCK_M // G query tokens, H), the last tokens first. lse [H * G, T]: natural
    logarithms; score_scale: softmax scale times log2(e). EVICT: the chunk's part had a window."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    h = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, t0 = find_request(requests, block, num_reqs, geo, BLOCK_Q)
    start, m, n, s = load_request(requests, b)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    if (m <= 1) | (t0 >= m) | (s == 0):
        return
    row = row_index(s, layer, h, geo)
    start = start.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    t = t0 + offs_m // G
    mask_m = (offs_m < BLOCK_Q * G) & (t < m)

    # Slots [first, end) of the row were left behind by the tokens before each query's window;
    # without eviction by all that were there before the chunk.
    if EVICT:
        first = geo.R + n * 0
        ptr = num_survivors_ptr + (start + t) * geo.H + h
        end = first + tl.load(ptr, mask=mask_m, other=0)
        band = tl.minimum(tl.maximum(n + t0 - (geo.R - 1), 0), n)
    else:
        first = n * 0
        end = n + t * 0
        band = n
    most = tl.max(tl.where(mask_m, end, 0), 0)
    if (most <= first) & (band >= n):
        return
    least = tl.min(tl.where(mask_m, end, most), 0)

    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    head = h * G + offs_m % G
    mask_q = mask_m[:, None] & (offs_d < geo.D)
    offs_q = (start + t) * stride_query + head * geo.D
    offs_o = (start + t) * stride_output + head * geo.D
    q = tl.load(query_ptr + offs_q[:, None] + offs_d, mask=mask_q, other=0.0)
    acc = tl.load(output_ptr + offs_o[:, None] + offs_d, mask=mask_q, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + head.to(tl.int64) * stride_lse + start + t, mask=mask_m, other=0.0)
    top = lse / LN_2
    total = tl.full([BLOCK_M], 1.0, tl.float32)

    # Tiles are aligned to pages, so that the ring may end within one: it is masked as the last are.
    full = tl.cdiv(first, BLOCK_N) * BLOCK_N
    tail = tl.maximum(least // BLOCK_N * BLOCK_N, full)
    if EVICT:  # a loop over nothing else, of which ptxas may crash
        lo = tl.where(most > first, first // BLOCK_N * BLOCK_N, full)
        acc, top, total = attend_slots(
            q, acc, top, total, score_scale, state, row, first, end, lo, tl.minimum(full, most),
            geo, BLOCK_N, True,
        )  # fmt: skip
    acc, top, total = attend_slots(
        q, acc, top, total, score_scale, state, row, first, end, full, tail, geo, BLOCK_N, False
    )
    acc, top, total = attend_slots(
        q, acc, top, total, score_scale, state, row, first, end, tail, most, geo, BLOCK_N, True
    )
    if EVICT:
        acc, top, total = attend_window(
            q, acc, top, total, score_scale, state, row, n + t, band, n, geo, BLOCK_N
        )
    out = acc / total[:, None]
    tl.store(output_ptr + offs_o[:, None] + offs_d, out, mask=mask_q)
