"""The DMS forward of a dense Hugging Face model, differentiable in its decisions.

It runs the model's own modules (projections, norms, rotary embedding, MLP) and replaces only the
attention between them, so a checkpoint loads and saves as transformers has it.

Shapes: B sequences, T tokens, L layers, Hq query heads, H KV heads, D head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_dms.config import DMSConfig

from .attention import attention
from .gates import Gate, keep_all
from .rotary import norm_and_rotate, rms_norm, rotate
from .sharding import call


@dataclass(frozen=True)
class Output:
    hidden: torch.Tensor  # (B, T, hidden) after the last norm
    evict: torch.Tensor  # (L, B, H, T): decisions, at the token that decides


def adapter_alpha(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x (B, T, hidden) before the layer's norm -> alpha (B, H, T)."""
    proj = attn.dms_proj_alpha
    bias = None if proj.bias is None else proj.bias.to(x.dtype)
    return F.linear(rms_norm(x, attn.dms_proj_alpha_norm), proj.weight.to(x.dtype), bias).mT


def borrowed_queries(attn: nn.Module, normed: torch.Tensor) -> torch.Tensor:
    """-> q (B, T, Hq, D) before its norm, the borrowed channel still in place."""
    q = heads(attn.q_proj(normed), attn)
    if not hasattr(attn, "dms_rows"):
        return q
    # In training the borrowed rows of q_proj live in fp32 beside it (see checkpoint.prepare).
    rows = F.linear(normed, attn.dms_rows.to(normed.dtype))
    grouped = q[..., -1].unflatten(-1, (-1, attn.num_key_value_groups))
    channel = torch.cat((rows.unsqueeze(-1), grouped[..., 1:]), -1).flatten(-2)
    return torch.cat((q[..., :-1], channel.unsqueeze(-1)), -1)


def without_borrowed(q: torch.Tensor, group: int) -> torch.Tensor:
    """q (B, T, Hq, D) with the last channel of each group's first head set to 0."""
    taken = torch.zeros(q.shape[2:], dtype=torch.bool, device=q.device)
    taken[::group, -1] = True
    return q.masked_fill(taken, 0.0)


def heads(x: torch.Tensor, attn: nn.Module) -> torch.Tensor:
    """(B, T, heads * D) -> (B, T, heads, D)"""
    return x.unflatten(-1, (-1, attn.head_dim))


def project(
    layer: nn.Module,
    index: int,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dms: DMSConfig | None,
    gate: Gate,
) -> tuple[torch.Tensor, ...]:
    """x (B, T, hidden) -> q (B, T, Hq, D), k, v (B, T, H, D), log_keep (B, H, T) by key or None,
    evict (B, H, T) by deciding token"""
    attn = layer.self_attn
    normed = rms_norm(x, layer.input_layernorm)
    k = norm_and_rotate(heads(attn.k_proj(normed), attn), getattr(attn, "k_norm", None), cos, sin)
    v = heads(attn.v_proj(normed), attn)
    q_norm = getattr(attn, "q_norm", None)
    if dms is None or dms.adapter:
        q = norm_and_rotate(heads(attn.q_proj(normed), attn), q_norm, cos, sin)
        if dms is None:
            return q, k, v, None, torch.zeros(1, device=x.device)
        alpha = adapter_alpha(attn, x)
    else:
        group = attn.num_key_value_groups
        q = borrowed_queries(attn, normed)
        q = q if q_norm is None else rms_norm(q, q_norm)
        alpha = q[:, :, ::group, -1].mT
        # RoPE would mix the channel into its partner, and the partner into it.
        q = without_borrowed(rotate(without_borrowed(q, group), cos, sin), group)
    if dms.alpha_per == "layer":
        alpha = alpha[:, :1].expand_as(alpha)
    # Two roundings, as the reference thresholds.
    log_keep, evict = gate((alpha * dms.alpha_scale).sub(dms.alpha_offset), index)
    if log_keep is not None:
        # Token j's fate is decided at j + shift; the newest tokens have no verdict yet.
        log_keep = F.pad(log_keep[..., dms.shift :], (0, dms.shift), value=0.0)
    return q, k, v, log_keep, evict


def finish(layer: nn.Module, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """x (B, T, hidden), attended (B, T, Hq, D) -> the layer's output"""
    x = x + layer.self_attn.o_proj(attended.flatten(2))
    return x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))


def decoder_layer(
    layer: nn.Module,
    index: int,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dms: DMSConfig | None,
    gate: Gate,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, T, hidden) -> the same, and evict (B, H, T). dms None: the original model.

    recompute: keep only what attention needs, and compute the rest again for the gradients."""

    def part(function, *args):
        if recompute:
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)

    q, k, v, log_keep, evict = part(project, layer, index, x, cos, sin, dms, gate)
    attended = attention(q, k, v, log_keep, dms.window if dms else 0)
    return part(finish, layer, x, attended), evict


def forward(
    model: nn.Module,
    ids: torch.Tensor,
    dms: DMSConfig | None,
    gate: Gate = keep_all,
    *,
    recompute: int = 0,
) -> Output:
    """ids (B, T) through a model of transformers, of one of `models.families`; dms None: as it was;
    recompute: how many layers, the first ones, compute again what they don't keep."""
    return Output(*call(model.model, decoder, ids, dms, gate, recompute))


def decoder(
    inner: nn.Module, ids: torch.Tensor, dms: DMSConfig | None, gate: Gate, recompute: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    cos, sin = inner.rotary_emb(x, positions)
    evicts = []
    for index, layer in enumerate(inner.layers):
        args = (index, x, cos, sin, dms, gate, index < recompute)
        x, evict = call(layer, decoder_layer, *args)
        evicts.append(evict)
    return rms_norm(x, inner.norm), torch.stack(evicts)
