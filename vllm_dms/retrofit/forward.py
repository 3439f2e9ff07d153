"""The DMS forward of a Hugging Face Qwen3 or Llama model, differentiable in its decisions.

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

from .gates import Gate, keep_all

# Queries per masked attention call: bounds the mask to (B, H, QUERY_CHUNK, T), its gradient to
# (B, Hq, QUERY_CHUNK, T).
QUERY_CHUNK = 1024


@dataclass(frozen=True)
class Output:
    hidden: torch.Tensor  # (B, T, hidden) after the last norm
    evict: torch.Tensor  # (L, B, H, T): decisions, at the token that decides


def visibility(log_keep: torch.Tensor, window: int, start: int, stop: int) -> torch.Tensor:
    """log_keep (B, H, T) by key -> scores' additive mask (B, H, stop - start, stop) for queries
    [start, stop)."""
    queries = torch.arange(start, stop, device=log_keep.device)[:, None]
    distance = queries - torch.arange(stop, device=log_keep.device)
    mask = torch.where(distance > window, log_keep[:, :, None, :stop], 0.0)
    return mask.masked_fill(distance < 0, -torch.inf)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor | None, window: int
) -> torch.Tensor:
    """q (B, Hq, T, D); k, v (B, H, T, D); log_keep (B, H, T) by key, None: causal only
    -> (B, Hq, T, D)."""
    batch, kv_heads, tokens, _ = k.shape
    group = q.shape[1] // kv_heads
    # A KV head of a sequence is a sequence of its own whose heads are the group: they share a mask
    # without its being repeated, and in one call, so that all query heads keep a GPU busy.
    q = q.unflatten(1, (kv_heads, group)).flatten(0, 1)
    k, v = (x.flatten(0, 1).unsqueeze(1).repeat(1, group, 1, 1) for x in (k, v))
    if log_keep is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.unflatten(0, (batch, kv_heads)).flatten(1, 2)
    log_keep = log_keep.to(q.dtype)
    if log_keep.requires_grad and not q.requires_grad:
        # CUDA kernels keep what the mask's gradient needs only if queries want one, too.
        q = q.detach().requires_grad_()
    chunks = []
    for start in range(0, tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, tokens)
        mask = visibility(log_keep, window, start, stop).flatten(0, 1).unsqueeze(1)
        chunks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], attn_mask=mask
            )
        )
    return torch.cat(chunks, 2).unflatten(0, (batch, kv_heads)).flatten(1, 2)


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Like the model's RMSNorm, with an fp32 weight rounded to x's dtype: as it will be served."""
    scaled = x.float() * torch.rsqrt(
        x.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
    )
    return norm.weight.to(x.dtype) * scaled.to(x.dtype)


def adapter_alpha(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x (B, T, hidden) before the layer's norm -> alpha (B, H, T)."""
    proj = attn.dms_proj_alpha
    bias = None if proj.bias is None else proj.bias.to(x.dtype)
    return F.linear(rms_norm(x, attn.dms_proj_alpha_norm), proj.weight.to(x.dtype), bias).transpose(
        1, 2
    )


def queries_and_alpha(
    attn: nn.Module, x: torch.Tensor, normed: torch.Tensor, dms: DMSConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> q (B, Hq, T, D) before RoPE, with a borrowed channel still in place; alpha (B, H, T)."""
    q = attn.q_proj(normed).unflatten(-1, (-1, attn.head_dim))
    group = attn.num_key_value_groups
    if not dms.adapter and hasattr(attn, "dms_rows"):
        # In training the borrowed rows of q_proj live in fp32 beside it (see checkpoint.prepare).
        rows = F.linear(normed, attn.dms_rows.to(normed.dtype))
        q = torch.cat((q[..., :-1], _spread(rows, q[..., -1], group).unsqueeze(-1)), -1)
    if hasattr(attn, "q_norm"):
        q = attn.q_norm(q)
    q = q.transpose(1, 2)
    alpha = adapter_alpha(attn, x) if dms.adapter else q[:, ::group, :, -1]
    if dms.alpha_per == "layer":
        alpha = alpha[:, :1].expand_as(alpha)
    return q, alpha


def _spread(rows: torch.Tensor, channel: torch.Tensor, group: int) -> torch.Tensor:
    """rows (B, T, H) into the first of each group of channel (B, T, Hq)."""
    grouped = channel.unflatten(-1, (-1, group))
    return torch.cat((rows.unsqueeze(-1), grouped[..., 1:]), -1).flatten(-2)


def without_borrowed(q: torch.Tensor, group: int) -> torch.Tensor:
    """q (B, Hq, T, D) with the last channel of each group's first head set to 0."""
    taken = torch.zeros(q.shape[1], 1, q.shape[3], dtype=torch.bool, device=q.device)
    taken[::group, :, -1] = True
    return q.masked_fill(taken, 0.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, heads, T, D), cos and sin (1, T, D): channel c is paired with c + D / 2."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def decoder_layer(
    layer: nn.Module,
    index: int,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dms: DMSConfig | None,
    gate: Gate,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, T, hidden) -> the same, and evict (B, H, T). dms None: the original model."""
    attn = layer.self_attn
    normed = layer.input_layernorm(x)
    k = attn.k_proj(normed).unflatten(-1, (-1, attn.head_dim))
    k = (attn.k_norm(k) if hasattr(attn, "k_norm") else k).transpose(1, 2)
    v = attn.v_proj(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
    if dms is None:
        q = attn.q_proj(normed).unflatten(-1, (-1, attn.head_dim))
        q = (attn.q_norm(q) if hasattr(attn, "q_norm") else q).transpose(1, 2)
        log_keep, evict = None, torch.zeros(k.shape[:3], device=x.device)
    else:
        q, alpha = queries_and_alpha(attn, x, normed, dms)
        # Two roundings, as the reference thresholds.
        log_keep, evict = gate((alpha * dms.alpha_scale).sub(dms.alpha_offset), index)
    borrowed = dms is not None and not dms.adapter
    q = without_borrowed(q, attn.num_key_value_groups) if borrowed else q
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q = without_borrowed(q, attn.num_key_value_groups) if borrowed else q
    if dms is not None and log_keep is not None:
        # Token j's fate is decided at j + shift; the newest tokens have no verdict yet.
        log_keep = F.pad(log_keep[..., dms.shift :], (0, dms.shift), value=0.0)
    out = attention(q, k, v, log_keep, dms.window if dms else 0)
    x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x)), evict


def forward(
    model: nn.Module,
    ids: torch.Tensor,
    dms: DMSConfig | None,
    gate: Gate = keep_all,
    *,
    checkpointing: bool = False,
) -> Output:
    """ids (B, T) through a Qwen3ForCausalLM or LlamaForCausalLM; dms None: the dense model."""
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    cos, sin = model.model.rotary_emb(x, positions)
    evicts = []
    for index, layer in enumerate(model.model.layers):
        args = (layer, index, x, cos, sin, dms, gate)
        x, evict = (
            checkpoint(decoder_layer, *args, use_reentrant=False)
            if checkpointing
            else decoder_layer(*args)
        )
        evicts.append(evict)
    return Output(model.model.norm(x), torch.stack(evicts))
