"""As `project`, of a step whose chunks begin their request and fit into its window: what such a
chunk stores is known without a plan, so each token is stored in the launch that projects it.

All heads then hold all of the chunk, at its own place in the ring, and have as many pages. A
request's pages are its blocks' lowest in the order of layers, heads and tokens, so that a token
knows its page before anyone listed it.
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
from vllm_dms.backend.kernels.page_table import share_of_block
from vllm_dms.backend.kernels.pages import write_slots
from vllm_dms.backend.kernels.project import project_key, rotate_queries, write_key
from vllm_dms.backend.kernels.store import load_rows, load_tokens, store_token


@triton.jit
def find_owner(requests, token, num_reqs, geo):
    """The request of a token of the batch: of those that begin no later, the last."""
    b = tl.arange(0, geo.MAX_REQS)
    start = tl.load(requests.start + b, mask=b < num_reqs, other=1 << 30)
    return tl.sum((start <= token).to(tl.int32), 0) - 1


@triton.jit
def store_first(
    k, v, alpha, state, s, t, m, layer, alpha_scale, alpha_offset, geo,
    H_PAD: tl.constexpr, SHIFT: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Token t of the first m of state s > 0, m at most R and the slots of LEAF pages: k and v
    [H_PAD, D_PAD], alpha [H_PAD]."""
    h = tl.arange(0, H_PAD)
    mask = h < geo.H
    row = row_index(s, layer, h, geo)
    of_row = tl.cdiv(m, geo.P)
    number = (layer * geo.H + h) * of_row + t // geo.P
    page = share_of_block(state, geo, s, number, geo.PAGES_PER_BLOCK, mask)
    write_slots(state, geo, page, h * 0 + t, k, v, mask)
    decision = (decide(alpha, alpha_scale, alpha_offset) & EVICT).to(tl.uint8)
    bits = state.evict_ring + row * geo.R + t
    if SHIFT:  # on the token before; on the last one nobody has decided
        tl.store(bits - 1, decision, mask=mask & (t > 0))
        tl.store(bits, (h * 0).to(tl.uint8), mask=mask & (t == m - 1))
    else:
        tl.store(bits, decision, mask=mask)
    tl.store(state.page_table + row * geo.TABLE + t // geo.P, page, mask=mask & (t % geo.P == 0))
    tl.store(state.live + row, h * 0 + m, mask=mask & (t == 0))
    if t == 0:
        tl.store(state.pages_used + s, (layer + 1) * geo.H * of_row)


@triton.jit(
    do_not_specialize=[
        "positions_ptr", "alpha_ptr", "stride_alpha", "stride_alpha_head", "q_norm_ptr",
        "k_norm_ptr", "num_reqs", "layer",
    ]
)  # fmt: skip
def project_window_kernel(
    qkv_ptr,
    positions_ptr,
    alpha_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    rotated_ptr,
    stride_qkv,
    stride_alpha,
    stride_alpha_head,
    stride_rotated,
    num_reqs,
    layer,
    state,
    requests,
    num_survivors_ptr,
    alpha_scale,
    alpha_offset,
    geo,
    eps,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    ZERO_BEFORE: tl.constexpr,
    ZERO_AFTER: tl.constexpr,
    PER_LAYER: tl.constexpr,
    H_PAD: tl.constexpr,
    SHIFT: tl.constexpr,
    EVICT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tokens, 1 + parts of the query heads): queries and keys side by side; stored."""
    part = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    qkv_ptr += token * stride_qkv
    rotated_ptr += token * stride_rotated
    cos_sin_ptr += tl.load(positions_ptr + token) * geo.D
    if part > 0:
        rotate_queries(
            qkv_ptr, rotated_ptr, cos_sin_ptr, q_norm_ptr, eps, part - 1, geo, G, HEADS,
            alpha_ptr is None, ZERO_BEFORE, ZERO_AFTER,
        )  # fmt: skip
        return
    start, m, n, s = load_request(requests, find_owner(requests, token, num_reqs, geo))
    h = tl.arange(0, H_PAD)
    mask = h < geo.H
    v = load_tokens(qkv_ptr + geo.H * (G + 1) * geo.D, 0, h * 0, h, mask, geo)
    k, alpha = project_key(
        qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, q_norm_ptr, k_norm_ptr,
        cos_sin_ptr, eps, geo, G, PER_LAYER, H_PAD,
    )  # fmt: skip
    if (m == 1) & (s > 0):
        live, verdict = load_rows(state, n, s, layer, geo, H_PAD)
        store_token(
            k, v, alpha, live, verdict, state, n, s, layer, alpha_scale, alpha_offset, geo, H_PAD,
            SHIFT, EVICT,
        )  # fmt: skip
    elif (m > 1) & (token - start < m):  # the batch may be longer than its requests
        write_key(rotated_ptr, k, geo, G, H_PAD)
        tl.store(num_survivors_ptr + token * geo.H + h, h * 0, mask=mask)
        if s > 0:
            store_first(
                k, v, alpha, state, s, (token - start).to(tl.int32), m, layer, alpha_scale,
                alpha_offset, geo, H_PAD, SHIFT, EVICT,
            )  # fmt: skip
