"""The decision adapter of a few tokens in one launch: RMSNorm and a projection to a few heads.

A decode step has too little of both to fill a card, so as two library calls they cost two launches
and a split reduction in every layer. Batches of many tokens are better off with the library.
"""

import torch
import triton
import triton.language as tl

MAX_TOKENS = 128  # beyond, tokens and weights would be read too often


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
    BLOCK: tl.constexpr,
):
    """Grid (T, H): alpha [T, H] of x [T, K], weight [H, K]. Rounds where the two steps would.

    Every program norms the token for itself: all its loads are in flight at once.
    """
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + t * stride_x + k, mask=k < K, other=0.0)
    norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h * K + k, mask=k < K, other=0.0).to(tl.float32)
    dtype = x.dtype
    x = x.to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)).to(dtype).to(tl.float32)
    x = (x * norm).to(dtype).to(tl.float32)
    alpha = tl.sum(x * weight, 0)
    if bias_ptr is not None:
        alpha += tl.load(bias_ptr + h).to(tl.float32)
    tl.store(out_ptr + t * tl.num_programs(1) + h, alpha)


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
    alpha_kernel[(x.shape[0], num_heads)](
        x,
        norm,
        weight,
        bias,
        out,
        x.stride(0),
        size,
        eps,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )
    return out
