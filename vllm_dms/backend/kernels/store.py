"""Kernels that write the arena: survivors of the leaving tokens, and the window ring.

A token leaves the window when the token W + 1 after it arrives. With n tokens stored and m new
ones, chunk token t pushes out position n + t - R, read from the ring where that is below n and
from the chunk otherwise. The null state (s = 0) is never written.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    allow_next_kernel,
    decide,
    load_request,
    row_index,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.page_table import list_pages, next_pages, page_of
from vllm_dms.backend.kernels.pages import copy_slots, write_slots


@triton.jit
def load_tokens(ptr, stride, token, heads, mask, geo):
    """[N, D_PAD] of key or value [T, H, D] at tokens and heads that broadcast to [N]."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    offs = token.to(tl.int64) * stride + heads * geo.D
    return tl.load(ptr + offs[:, None] + offs_d, mask=mask[:, None] & (offs_d < geo.D), other=0.0)


@triton.jit
def load_rows(state, n, s, layer, geo, H_PAD: tl.constexpr):
    """Of the rows [H_PAD] of a state's layer: live slots, and verdicts on the tokens that leave as
    token n arrives. Early, so that they are there when a new token is."""
    h = tl.arange(0, H_PAD)
    row = row_index(s, layer, h, geo)
    verdict = tl.load(state.evict_ring + row * geo.R + n % geo.R, mask=h < geo.H, other=1)
    live = tl.load(state.live + row, mask=h < geo.H, other=0)
    return tl.where(n == 0, 0, live), verdict != 0


@triton.jit
def store_token(
    k, v, alpha, live, verdict, state, n, s, layer, alpha_scale, alpha_offset, geo,
    H_PAD: tl.constexpr, SHIFT: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """One new token of state s > 0: k and v [H_PAD, D_PAD], alpha [H_PAD]; `load_rows`. The token
    that leaves, unless evicted, is copied to a slot of its own; the new one takes its place in the
    ring. All heads at once, so that pages are handed out without atomics."""
    h = tl.arange(0, H_PAD)
    mask_h = h < geo.H
    row = row_index(s, layer, h, geo)
    ring = h * 0 + n % geo.R
    full = n >= geo.R
    decision = decide(alpha, alpha_scale, alpha_offset) & EVICT

    # The ring grows to its size; then a kept token takes slot `live`, the next of the survivors.
    kept = mask_h & full & (verdict == 0)
    grows = mask_h & ((n < geo.R) | kept)
    fresh = grows & (live % geo.P == 0)
    index = live // geo.P
    new_page, plan = next_pages(state, geo, s, row, index, fresh)
    page = tl.where(fresh, new_page, page_of(state, geo, row, live, grows & (fresh == 0)))
    ring_page = tl.where(full, page_of(state, geo, row, ring, mask_h & full), page)

    copy_slots(state, geo, ring_page, ring, page, live, kept)
    # Below, other threads of this program overwrite what was read above.
    tl.debug_barrier()
    write_slots(state, geo, ring_page, ring, k, v, mask_h)

    bits = state.evict_ring + row * geo.R
    if SHIFT:
        last = (n + geo.R - 1) % geo.R
        tl.store(bits + last, decision.to(tl.uint8), mask=mask_h & (n > 0))
        tl.store(bits + ring, (h * 0).to(tl.uint8), mask=mask_h)
    else:
        tl.store(bits + ring, decision.to(tl.uint8), mask=mask_h)
    list_pages(state, geo, s, row, index, fresh, new_page, plan)
    tl.store(state.live + row, live + grows.to(tl.int32), mask=mask_h)


@triton.jit
def load_token(
    key_ptr, value_ptr, alpha_ptr, stride_key, stride_value, stride_alpha, stride_alpha_head,
    start, geo, H_PAD: tl.constexpr,
):  # fmt: skip
    """What `store_token` stores of token ``start`` of the batch."""
    h = tl.arange(0, H_PAD)
    k = load_tokens(key_ptr, stride_key, h * 0 + start, h, h < geo.H, geo)
    v = load_tokens(value_ptr, stride_value, h * 0 + start, h, h < geo.H, geo)
    alpha_offs = start.to(tl.int64) * stride_alpha + h * stride_alpha_head
    return k, v, tl.load(alpha_ptr + alpha_offs, mask=h < geo.H, other=0.0)


@triton.jit(do_not_specialize=["alpha_ptr", "stride_alpha", "stride_alpha_head", "layer"])
def store_token_kernel(
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
    alpha_scale,
    alpha_offset,
    geo,
    H_PAD: tl.constexpr,
    SHIFT: tl.constexpr,
    EVICT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (requests), each with one new token."""
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    start, m, n, s = load_request(requests, tl.program_id(0))
    if (m == 1) & (s > 0):
        live, verdict = load_rows(state, n, s, layer, geo, H_PAD)
        k, v, alpha = load_token(
            key_ptr, value_ptr, alpha_ptr, stride_key, stride_value, stride_alpha,
            stride_alpha_head, start, geo, H_PAD,
        )  # fmt: skip
        store_token(
            k, v, alpha, live, verdict, state, n, s, layer, alpha_scale, alpha_offset, geo, H_PAD,
            SHIFT, EVICT,
        )  # fmt: skip
