"""The decision adapter of a few tokens in one launch: RMSNorm and a projection to a few heads.

A decode step has too little of both to fill a card, so as two library calls they cost two launches
and a split reduction in every layer. Batches of many tokens are better off with the library.
"""

import torch
import triton
import triton.language as tl

MAX_TOKENS = 128  # beyond, the weight would be read too often
BLOCK_K = 1024


@triton.jit
def alpha_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    K,
    eps,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T): alpha [T, H] of x [T, K], weight [H, K]. Rounds where the two steps would."""
    t = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, H_PAD)
    mask_h = offs_h < H
    squares = tl.zeros([BLOCK], tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + t * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    acc = tl.zeros([H_PAD], tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + t * stride_x + k, mask=k < K, other=0.0)
        dtype = x.dtype
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
        x = (x.to(tl.float32) * scale).to(dtype).to(tl.float32)
        x = (x * norm.to(tl.float32)).to(dtype).to(tl.float32)
        offs = offs_h[:, None] * K + k[None, :]
        weight = tl.load(weight_ptr + offs, mask=mask_h[:, None] & (k < K)[None, :], other=0.0)
        acc += tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * H + offs_h, acc, mask=mask_h)


def launch_alpha(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """alpha [T, H] of x [T, K] with norm [K], weight [H, K], bias [H]; all of one dtype."""
    num_heads, size = weight.shape
    assert x.shape[1] == size and x.stride(1) == 1, (x.shape, x.stride(), size)
    assert weight.is_contiguous() and norm.is_contiguous()
    out = x.new_empty(x.shape[0], num_heads)
    alpha_kernel[(x.shape[0],)](
        x,
        norm,
        weight,
        bias,
        out,
        x.stride(0),
        size,
        eps,
        H=num_heads,
        H_PAD=triton.next_power_of_2(num_heads),
        BLOCK=min(BLOCK_K, triton.next_power_of_2(size)),
        num_warps=4,
    )
    return out
