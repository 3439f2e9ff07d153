"""Between a projection and attention: a norm per head, if the model has one, and the rotation.

On a GPU both are one kernel, and the gradient another; frozen norm weights only. Elsewhere, and
where the norm is trained, plain operations. They round alike but for the rotation, which a kernel
rounds once.
"""

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 16  # heads of tokens a program


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """The model's RMSNorm, rounded where it rounds; an fp32 weight is rounded to x's dtype, as it
    will be served."""
    scaled = F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)
    return norm.weight.to(x.dtype) * scaled


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, heads, D), cos and sin (1, T, D): channel c is paired with c + D / 2."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)


def norm_and_rotate(
    x: torch.Tensor, norm: nn.Module | None, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """x (B, T, heads, D), cos and sin (1, T, D)"""
    frozen = norm is None or not norm.weight.requires_grad
    if x.is_cuda and frozen and x.dtype == cos.dtype:
        return NormAndRotate.apply(
            x,
            None if norm is None else norm.weight.to(x.dtype),
            0.0 if norm is None else norm.variance_epsilon,
            cos,
            sin,
        )
    return rotate(x if norm is None else rms_norm(x, norm), cos, sin)


class NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        x = x.contiguous()
        cos, sin = (c.expand(x.shape[0], -1, -1).contiguous() for c in (cos, sin))
        out = torch.empty_like(x)
        _launch("rotate_kernel", x, x, weight, eps, cos, sin, out)
        ctx.save_for_backward(*((cos, sin) if weight is None else (cos, sin, x, weight)))
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, d_out):
        cos, sin, *rest = ctx.saved_tensors
        x, weight = rest if rest else (None, None)
        d_out = d_out.contiguous()
        dx = torch.empty_like(d_out)
        x = d_out if x is None else x
        _launch("rotate_gradient_kernel", x, d_out, weight, ctx.eps, cos, sin, dx)
        return dx, None, None, None, None


def _launch(name: str, x, second, weight, eps, cos, sin, out) -> None:
    from . import rotary_kernels  # Triton is not on every machine

    batch, tokens, heads, dim = x.shape
    if dim % 2 or cos.shape != (batch, tokens, dim):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, {tuple(x.shape)} needs {(batch, tokens, dim)} and "
            "an even head_dim."
        )
    rows = batch * tokens * heads
    getattr(rotary_kernels, name)[(-(-rows // ROWS),)](
        x,
        second,
        x if weight is None else weight,
        cos,
        sin,
        out,
        rows,
        heads,
        eps,
        HALF=dim // 2,
        HALF_PAD=max(16, 1 << (dim // 2 - 1).bit_length()),
        BLOCK=ROWS,
        NORM=weight is not None,
        num_warps=4,
    )
