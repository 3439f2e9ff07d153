"""Kernels that write the arena for chunks of several tokens: survivors of those that leave, and the
window ring (`store` says when a token leaves).
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    allow_next_kernel,
    decide,
    find_request,
    load_request,
    row_index,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.page_table import page_of, take_pages
from vllm_dms.backend.kernels.pages import copy_slots, write_slots
from vllm_dms.backend.kernels.store import load_rows, load_token, load_tokens, store_token


@triton.jit
def chunk_verdict(alpha_ptr, stride, t, m, scale, offset, SHIFT: tl.constexpr, EVICT: tl.constexpr):
    """e of the chunk's tokens t [N]; False below 0 and where there is no verdict yet."""
    mask = (t >= 0) & (t + SHIFT < m)
    alpha = tl.load(alpha_ptr + (t + SHIFT).to(tl.int64) * stride, mask=mask, other=0.0)
    return decide(alpha, scale, offset) & mask & EVICT


@triton.jit
def plan_chunk(
    alpha_ptr, stride_alpha, stride_alpha_head, state, num_survivors_ptr, evict_ptr,
    start, m, n, s, layer, h, alpha_scale, alpha_offset, geo,
    SHIFT: tl.constexpr, EVICT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Verdicts, survivor counts and pages of one head of a chunk of several tokens.

    Fills num_survivors and evict [T, H] of `Scratch`, the row's page table, live and pages_used.
    """
    row = row_index(s, layer, h, geo)
    alpha_ptr += start.to(tl.int64) * stride_alpha + h * stride_alpha_head
    live = tl.where((n == 0) | (s == 0), 0, tl.load(state.live + row))
    survivors = tl.where((n == 0) | (s == 0), 0, live - tl.minimum(n, geo.R))

    bits = state.evict_ring + row * geo.R
    if SHIFT:  # the chunk's first token decides on the last one stored
        decision = decide(tl.load(alpha_ptr), alpha_scale, alpha_offset) & EVICT
        last = (n + geo.R - 1) % geo.R
        tl.store(bits + last, decision.to(tl.uint8), mask=(n > 0) & (s > 0))
        tl.debug_barrier()

    for t0 in range(0, m, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        mask = t < m
        out = (start + t).to(tl.int64) * geo.H + h
        verdict = chunk_verdict(
            alpha_ptr, stride_alpha, t, m, alpha_scale, alpha_offset, SHIFT, EVICT
        )
        tl.store(evict_ptr + out, verdict.to(tl.uint8), mask=mask)

        left = t - geo.R  # chunk token that leaves as t arrives; below 0: n + left is in the ring
        leaving = mask & (n + left >= 0) & (s > 0)
        verdict = chunk_verdict(
            alpha_ptr, stride_alpha, left, m, alpha_scale, alpha_offset, SHIFT, EVICT
        )
        bit = tl.load(bits + (n + t) % geo.R, mask=leaving & (left < 0), other=0)
        kept = (leaving & (verdict == 0) & (bit == 0)).to(tl.int32)
        tl.store(num_survivors_ptr + out, survivors + tl.cumsum(kept, 0), mask=mask)
        survivors += tl.sum(kept, 0)

    if s > 0:
        new_live = survivors + tl.minimum(n + m, geo.R)
        first, end = tl.cdiv(live, geo.P), tl.cdiv(new_live, geo.P)
        take_pages(state, geo, s, row, first, end, BLOCK)
        tl.store(state.live + row, new_live)


@triton.jit(do_not_specialize=["alpha_ptr", "stride_alpha", "stride_alpha_head", "layer"])
def store_plan_kernel(
    key_ptr,
    value_ptr,
    alpha_ptr,
    stride_key,
    stride_value,
    stride_alpha,
    stride_alpha_head,
    layer,
    state,
    requests,
    num_survivors_ptr,
    evict_ptr,
    alpha_scale,
    alpha_offset,
    geo,
    H_PAD: tl.constexpr,
    SHIFT: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (requests, H): a chunk of several tokens is planned head by head, a single token
    stored."""
    h = tl.program_id(1)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    start, m, n, s = load_request(requests, tl.program_id(0))
    if m > 1:
        plan_chunk(
            alpha_ptr, stride_alpha, stride_alpha_head, state, num_survivors_ptr, evict_ptr,
            start, m, n, s, layer, h, alpha_scale, alpha_offset, geo, SHIFT, EVICT, BLOCK,
        )  # fmt: skip
    elif (m == 1) & (s > 0) & (h == 0):
        live, verdict = load_rows(state, n, s, layer, geo, H_PAD)
        k, v, alpha = load_token(
            key_ptr, value_ptr, alpha_ptr, stride_key, stride_value, stride_alpha,
            stride_alpha_head, start, geo, H_PAD,
        )  # fmt: skip
        store_token(
            k, v, alpha, live, verdict, state, n, s, layer, alpha_scale, alpha_offset, geo, H_PAD,
            SHIFT, EVICT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "num_reqs"])
def store_copy_kernel(
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    num_reqs,
    layer,
    state,
    requests,
    num_survivors_ptr,
    evict_ptr,
    geo,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (blocks of tokens, H): copy what leaves the window and is kept, as planned."""
    h = tl.program_id(1)
    b, t0 = find_request(requests, tl.program_id(0), num_reqs, geo, BLOCK)
    start, m, n, s = load_request(requests, b)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    if (m <= 1) | (s == 0) | (t0 >= m) | (n + t0 + BLOCK <= geo.R):
        return
    row = row_index(s, layer, h, geo)
    t = t0 + tl.arange(0, BLOCK)
    left = t - geo.R
    leaving = (t < m) & (n + left >= 0)
    count = tl.load(num_survivors_ptr + (start + t).to(tl.int64) * geo.H + h, mask=t < m, other=1)
    slot = geo.R - 1 + count

    if t0 < geo.R:
        ring = (n + t) % geo.R
        mask = leaving & (left < 0)
        bit = tl.load(state.evict_ring + row * geo.R + ring, mask=mask, other=1)
        kept = mask & (bit == 0)
        src_page = page_of(state, geo, row, ring, kept)
        copy_slots(state, geo, src_page, ring, page_of(state, geo, row, slot, kept), slot, kept)
    if t0 + BLOCK > geo.R:
        mask = leaving & (left >= 0)
        evict = tl.load(evict_ptr + (start + left).to(tl.int64) * geo.H + h, mask=mask, other=1)
        kept = mask & (evict == 0)
        k = load_tokens(key_ptr, stride_key, start + left, h, kept, geo)
        v = load_tokens(value_ptr, stride_value, start + left, h, kept, geo)
        write_slots(state, geo, page_of(state, geo, row, slot, kept), slot, k, v, kept)


@triton.jit(do_not_specialize=["layer", "num_reqs"])
def store_window_kernel(
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    num_reqs,
    layer,
    state,
    requests,
    evict_ptr,
    geo,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (blocks of tokens, H): the chunk's last R tokens to the ring, with their verdicts."""
    h = tl.program_id(1)
    b, t0 = find_request(requests, tl.program_id(0), num_reqs, geo, BLOCK)
    start, m, n, s = load_request(requests, b)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    if (m <= 1) | (s == 0) | (t0 >= m) | (t0 + BLOCK + geo.R <= m):
        return
    row = row_index(s, layer, h, geo)
    t = t0 + tl.arange(0, BLOCK)
    mask = (t < m) & (t + geo.R >= m)
    ring = (n + t) % geo.R
    k = load_tokens(key_ptr, stride_key, start + t, h, mask, geo)
    v = load_tokens(value_ptr, stride_value, start + t, h, mask, geo)
    write_slots(state, geo, page_of(state, geo, row, ring, mask), ring, k, v, mask)
    evict = tl.load(evict_ptr + (start + t).to(tl.int64) * geo.H + h, mask=mask, other=0)
    tl.store(state.evict_ring + row * geo.R + ring, evict, mask=mask)
