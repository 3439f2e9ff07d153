"""From a layer's fused projection to what attention takes: norms, rotation, the decision.

The same steps as a model's own modules take (`models.attention`), put together so that a decode
step's tokens can be stored in the same launch. Here in plain PyTorch, which defines them; the
kernels are in `kernels.project`.
"""

from typing import Any, NamedTuple

import torch

from vllm_dms.config import DMSConfig

ALIGNMENT = 16  # elements: kernels read whole vectors


class Projection(NamedTuple):
    """Of one layer, its weights as they are loaded."""

    q_norm: torch.Tensor | None  # [D]; None: neither queries nor keys are normed
    k_norm: torch.Tensor | None
    eps: float
    rotary: Any  # vLLM's module: `cos_sin_cache` [positions, D] has half a row of each


class AttentionInputs(NamedTuple):
    """Views of a fused projection and of the buffer for what is rotated, [T, `rotated_width`]."""

    query: torch.Tensor  # [T, H * G, D]
    key: torch.Tensor  # [T, H, D]
    value: torch.Tensor  # [T, H, D], as projected
    alpha: torch.Tensor  # [T, H]


def offsets(heads: int, group: int, dim: int) -> tuple[int, int]:
    """Elements of a row before its keys, and before what comes after them: V where it is projected,
    alpha where it is rotated."""
    return heads * group * dim, heads * (group + 1) * dim


def rotated_width(heads: int, group: int, dim: int) -> int:
    """Elements of a row of queries, keys, and alpha, padded to `ALIGNMENT`."""
    return offsets(heads, group, dim)[1] + -(-heads // ALIGNMENT) * ALIGNMENT


def views(
    qkv: torch.Tensor, rotated: torch.Tensor, heads: int, group: int, dim: int
) -> AttentionInputs:
    tokens, width = rotated.shape
    keys, after = offsets(heads, group, dim)
    # One call each, and hundreds of them in a step that no graph holds.
    return AttentionInputs(
        rotated.as_strided((tokens, heads * group, dim), (width, dim, 1)),
        rotated.as_strided((tokens, heads, dim), (width, dim, 1), keys),
        qkv.as_strided((tokens, heads, dim), (qkv.stride(0), dim, 1), after),
        rotated.as_strided((tokens, heads), (width, 1), after),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] by angles [T, D]: the first half of the channels with the second."""
    cos, sin = cos_sin.float().unsqueeze(1).chunk(2, -1)
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


def project(
    projection: Projection,
    config: DMSConfig,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    alpha: torch.Tensor | None,
    out: AttentionInputs,
) -> None:
    """``qkv`` [T, (H * G + 2 * H) * D]; ``alpha`` [T, H], None: borrowed from the queries."""
    heads, dim = out.key.shape[1:]
    group = out.query.shape[1] // heads
    heads_of = qkv.unflatten(1, (-1, dim))
    query, key, _ = heads_of.split([heads * group, heads, heads], dim=1)
    if projection.q_norm is not None and projection.k_norm is not None:
        query = rms_norm(query, projection.q_norm, projection.eps)
        key = rms_norm(key, projection.k_norm, projection.eps)
    cos_sin = projection.rotary.cos_sin_cache.to(qkv.dtype)[positions]
    out.key.copy_(rotate(key, cos_sin))
    if alpha is not None:
        out.query.copy_(rotate(query, cos_sin))
        out.alpha.copy_(alpha)
        return
    borrowed = query[:, ::group, -1]
    out.alpha.copy_(borrowed[:, :1] if config.alpha_per == "layer" else borrowed)
    mask = torch.zeros(query.shape[1:], dtype=torch.bool, device=qkv.device)
    mask[::group, -1] = True
    if config.zero != "never":
        query = query.masked_fill(mask, 0.0)
    query = rotate(query, cos_sin)
    out.query.copy_(query.masked_fill(mask, 0.0) if config.zero == "both" else query)
