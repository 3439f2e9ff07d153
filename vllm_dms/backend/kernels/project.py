"""From a fused projection to what is attended: heads normed and rotated, decisions read, a decode
step's tokens stored, in one launch where PyTorch would take four.

What is computed is said by `backend.projection`, in plain PyTorch. It is rounded where separate
operations would round, but for the products of the rotation.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import (
    allow_next_kernel,
    load_request,
    wait_for_previous_kernel,
)
from vllm_dms.backend.kernels.store import load_rows, load_tokens, store_token


@triton.jit
def load_normed(ptr, heads, channels, mask, scale, weight_ptr, geo):
    """Channels [D_PAD] of heads [N] in float32; normed, if there is a weight, by scale [N]."""
    mask = mask[:, None] & (tl.arange(0, geo.D_PAD) < geo.D)[None, :]
    x = tl.load(ptr + heads[:, None] * geo.D + channels[None, :], mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channels, mask=channels < geo.D, other=0.0).to(tl.float32)
        x = (x * scale[:, None]).to(dtype).to(tl.float32)
        x = (x * weight[None, :]).to(dtype).to(tl.float32)
    return x


@triton.jit
def norm_scale(ptr, heads, mask, weight_ptr, eps, geo):
    """What brings heads [N] to a mean square of one."""
    x = load_normed(ptr, heads, tl.arange(0, geo.D_PAD), mask, eps, None, geo)
    if weight_ptr is not None:
        return tl.rsqrt(tl.sum(x * x, 1) / geo.D + eps)
    else:
        return tl.sum(x, 1)


@triton.jit
def rotate_heads(
    ptr, heads, mask, borrowed, weight_ptr, cos_sin_ptr, eps, geo,
    ZERO_BEFORE: tl.constexpr, ZERO_AFTER: tl.constexpr,
):  # fmt: skip
    """Heads [N] of a token [N, D_PAD]; ``borrowed`` [N]: whose last channel is zeroed around it."""
    d = tl.arange(0, geo.D_PAD)
    low = d < geo.D // 2
    other = tl.where(low, d + geo.D // 2, d - geo.D // 2)
    scale = norm_scale(ptr, heads, mask, weight_ptr, eps, geo)
    x = load_normed(ptr, heads, d, mask, scale, weight_ptr, geo)
    y = load_normed(ptr, heads, other, mask, scale, weight_ptr, geo)
    if ZERO_BEFORE:
        x = tl.where(borrowed[:, None] & (d == geo.D - 1)[None, :], 0.0, x)
        y = tl.where(borrowed[:, None] & (other == geo.D - 1)[None, :], 0.0, y)
    mask_d = d < geo.D
    cos = tl.load(cos_sin_ptr + d % (geo.D // 2), mask=mask_d, other=0.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + geo.D // 2 + d % (geo.D // 2), mask=mask_d, other=0.0)
    x = x * cos[None, :] + tl.where(low[None, :], -y, y) * sin.to(tl.float32)[None, :]
    if ZERO_AFTER:
        x = tl.where(borrowed[:, None] & (d == geo.D - 1)[None, :], 0.0, x)
    return x.to(ptr.dtype.element_ty)


@triton.jit
def read_alpha(
    qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, h, mask, weight_ptr, eps, geo,
    G: tl.constexpr, PER_LAYER: tl.constexpr,
):  # fmt: skip
    """alpha [H_PAD] of a token whose projection is at ``qkv_ptr``: given, or borrowed from it."""
    if alpha_ptr is not None:
        offs = token * stride_alpha + h * stride_alpha_head
        return tl.load(alpha_ptr + offs, mask=mask, other=0.0)
    else:
        heads = h * (0 if PER_LAYER else G)
        scale = norm_scale(qkv_ptr, heads, mask, weight_ptr, eps, geo)
        d = tl.arange(0, geo.D_PAD)
        x = load_normed(qkv_ptr, heads, d, mask, scale, weight_ptr, geo)
        last = tl.sum(tl.where((d == geo.D - 1)[None, :], x, 0.0), 1)
        return last.to(qkv_ptr.dtype.element_ty)


@triton.jit
def project_key(
    qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, q_norm_ptr, k_norm_ptr,
    cos_sin_ptr, eps, geo, G: tl.constexpr, PER_LAYER: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """Of the token whose projection is at ``qkv_ptr``: keys [H_PAD, D_PAD], normed and rotated, and
    alpha [H_PAD]."""
    h = tl.arange(0, H_PAD)
    mask = h < geo.H
    k = rotate_heads(
        qkv_ptr + geo.H * G * geo.D, h, mask, mask, k_norm_ptr, cos_sin_ptr, eps, geo, False, False
    )
    alpha = read_alpha(
        qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, h, mask, q_norm_ptr, eps, geo,
        G, PER_LAYER,
    )  # fmt: skip
    return k, alpha


@triton.jit
def write_key(rotated_ptr, k, geo, G: tl.constexpr, H_PAD: tl.constexpr):
    """k [H_PAD, D_PAD] beside the queries of its token, whose rotated row is at ``rotated_ptr``."""
    h = tl.arange(0, H_PAD)
    d = tl.arange(0, geo.D_PAD)
    ptr = rotated_ptr + geo.H * G * geo.D + h[:, None] * geo.D + d[None, :]
    tl.store(ptr, k, mask=(h < geo.H)[:, None] & (d < geo.D)[None, :])


@triton.jit
def rotate_queries(
    qkv_ptr, rotated_ptr, cos_sin_ptr, q_norm_ptr, eps, part, geo,
    G: tl.constexpr, HEADS: tl.constexpr, BORROWED: tl.constexpr,
    ZERO_BEFORE: tl.constexpr, ZERO_AFTER: tl.constexpr,
):  # fmt: skip
    """Query heads [part * HEADS, (part + 1) * HEADS) of a token."""
    heads = part * HEADS + tl.arange(0, HEADS)
    mask = heads < geo.H * G
    q = rotate_heads(
        qkv_ptr, heads, mask, heads % G == 0, q_norm_ptr, cos_sin_ptr, eps, geo,
        BORROWED and ZERO_BEFORE, BORROWED and ZERO_AFTER,
    )  # fmt: skip
    d = tl.arange(0, geo.D_PAD)
    ptr = rotated_ptr + heads[:, None] * geo.D + d[None, :]
    tl.store(ptr, q, mask=mask[:, None] & (d < geo.D)[None, :])


@triton.jit(
    do_not_specialize=[
        "positions_ptr", "alpha_ptr", "stride_alpha", "stride_alpha_head", "q_norm_ptr",
        "k_norm_ptr", "layer",
    ]
)  # fmt: skip
def project_token_kernel(
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
    layer,
    state,
    requests,
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
    """Grid (requests, 1 + parts of the query heads): each with one new token, which is stored."""
    part = tl.program_id(1)
    wait_for_previous_kernel(OVERLAP)
    allow_next_kernel(OVERLAP)
    start, m, n, s = load_request(requests, tl.program_id(0))
    if m != 1:
        return
    token = start.to(tl.int64)
    qkv_ptr += token * stride_qkv
    cos_sin_ptr += tl.load(positions_ptr + token) * geo.D
    if part > 0:
        rotate_queries(
            qkv_ptr, rotated_ptr + token * stride_rotated, cos_sin_ptr, q_norm_ptr, eps, part - 1,
            geo, G, HEADS, alpha_ptr is None, ZERO_BEFORE, ZERO_AFTER,
        )  # fmt: skip
    elif s > 0:
        h = tl.arange(0, H_PAD)
        live, verdict = load_rows(state, n, s, layer, geo, H_PAD)
        value_ptr = qkv_ptr + geo.H * (G + 1) * geo.D
        v = load_tokens(value_ptr, 0, h * 0, h, h < geo.H, geo)
        k, alpha = project_key(
            qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, q_norm_ptr, k_norm_ptr,
            cos_sin_ptr, eps, geo, G, PER_LAYER, H_PAD,
        )  # fmt: skip
        store_token(
            k, v, alpha, live, verdict, state, n, s, layer, alpha_scale, alpha_offset, geo, H_PAD,
            SHIFT, EVICT,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "positions_ptr", "alpha_ptr", "stride_alpha", "stride_alpha_head", "q_norm_ptr",
        "k_norm_ptr",
    ]
)  # fmt: skip
def project_kernel(
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
    geo,
    eps,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    ZERO_BEFORE: tl.constexpr,
    ZERO_AFTER: tl.constexpr,
    PER_LAYER: tl.constexpr,
    H_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tokens, 1 + parts of the query heads): queries, keys and alpha side by side."""
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
    k, alpha = project_key(
        qkv_ptr, alpha_ptr, stride_alpha, stride_alpha_head, token, q_norm_ptr, k_norm_ptr,
        cos_sin_ptr, eps, geo, G, PER_LAYER, H_PAD,
    )  # fmt: skip
    write_key(rotated_ptr, k, geo, G, H_PAD)
    h = tl.arange(0, H_PAD)
    tl.store(rotated_ptr + geo.H * (G + 1) * geo.D + h, alpha, mask=h < geo.H)
