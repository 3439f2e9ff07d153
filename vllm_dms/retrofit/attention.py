"""Attention for training: causal, with an additive gate for each key that has left the window.

Three ways to the same numbers: without gates, torch's own causal attention; on a GPU, kernels that
never hold a mask; elsewhere, plain operations, a block of queries at a time.

Shapes: B sequences, T tokens, Hq query heads, H KV heads, D head_dim; time before heads, as
projections leave them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOG2E = 1.4426950408889634
# Queries whose mask exists at a time in the plain version: (B, H, QUERY_BLOCK, T).
QUERY_BLOCK = 1024


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys a block, warps, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict:
        return {
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


HOPPER = Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
SMALL = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))


def choose_tiles(q: torch.Tensor) -> Tiles:
    """By what fits: fp32 and older GPUs have less room for a block's rows."""
    wide = q.element_size() > 2 or q.shape[-1] > 128
    modern = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    return HOPPER if modern and not wide else SMALL


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor | None, window: int
) -> torch.Tensor:
    """q (B, T, Hq, D); k, v (B, T, H, D); log_keep (B, H, T) by key, None: causal only
    -> (B, T, Hq, D)"""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if log_keep is None:
        return causal(q, k, v)
    if q.is_cuda:
        return GatedAttention.apply(q, k, v, log_keep, window)
    return plain(q, k, v, log_keep, window)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:  # where no kernel knows groups, their scores would be held at once
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def visibility(log_keep: torch.Tensor, window: int, start: int, stop: int) -> torch.Tensor:
    """log_keep (B, H, T) by key -> scores' additive mask (B, H, stop - start, stop) for queries
    [start, stop)."""
    queries = torch.arange(start, stop, device=log_keep.device)[:, None]
    distance = queries - torch.arange(stop, device=log_keep.device)
    mask = torch.where(distance > window, log_keep[:, :, None, :stop], 0.0)
    return mask.masked_fill(distance < 0, -torch.inf)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor, window: int
) -> torch.Tensor:
    """What the kernels are tested against. A block's mask is built again for its gradients."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    log_keep = log_keep.to(q.dtype)

    def block(q, k, v, log_keep, start, stop):
        mask = visibility(log_keep, window, start, stop).repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    out = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[2])
        args = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], log_keep, start, stop
        out.append(checkpoint(block, *args, use_reentrant=False))
    return torch.cat(out, 2).transpose(1, 2)


class GatedAttention(torch.autograd.Function):
    """The kernels. Gradients are computed for what needs them; the pass over keys always runs,
    for the gates."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep, window):
        q, k, v = (x.contiguous() for x in (q, k, v))
        gate = (log_keep.float() * LOG2E).contiguous()
        check_shapes(q, k, v, gate, window)
        out, lse = launch_forward(q, k, v, gate, window, choose_tiles(q))
        ctx.save_for_backward(q, k, v, gate, out, lse)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, gate, out, lse = ctx.saved_tensors
        do = do.contiguous()
        # (B, Hq, T): what softmax takes away from each score's gradient
        delta = (do.float() * out).sum(-1).transpose(1, 2).contiguous()
        args = (q, k, v, gate, do, lse, delta, ctx.window, choose_tiles(q))
        dq = launch_query_gradient(*args) if ctx.needs_input_grad[0] else None
        dk, dv, d_gate = launch_key_gradient(*args)
        return dq, dk, dv, d_gate, None


def check_shapes(q, k, v, gate, window) -> None:
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads or k.shape != (batch, tokens, kv_heads, dim) or v.shape != k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, T, heads, "
            "D) with a whole number of query heads for each KV head."
        )
    if gate.shape != (batch, kv_heads, tokens):
        raise ValueError(
            f"log_keep has shape {tuple(gate.shape)}, the keys need {(batch, kv_heads, tokens)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device == gate.device:
        raise ValueError(
            f"q, k and v must share a dtype and with log_keep a device: {q.dtype}, {k.dtype}, "
            f"{v.dtype} on {q.device}, {k.device}, {v.device}, {gate.device}."
        )
    if window < 1:
        raise ValueError(f"window is {window}, but it must be at least 1 token.")


def _common(q, k, tile: Tile) -> dict:
    tokens, dim = q.shape[1], q.shape[3]
    padded = max(16, 1 << (dim - 1).bit_length())
    whole = padded == dim and tokens % tile.queries == 0 and tokens % tile.keys == 0
    return {
        "tokens": tokens,
        "kv_heads": k.shape[2],
        "group": q.shape[2] // k.shape[2],
        "scale": dim**-0.5 * LOG2E,
        "D": dim,
        "D_PAD": padded,
        "WHOLE": whole,
        # In fp32 a gradient is held to the plain version's, which tensor cores would miss.
        "EXACT": "ieee" if q.dtype == torch.float32 else "tf32",
        **tile.options(),
    }


def launch_forward(q, k, v, gate, window, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (B, T, Hq, D), lse (B, Hq, T)"""
    from .kernels import forward_kernel

    batch, tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    grid = (-(-tokens // tiles.forward.queries), heads, batch)
    common = _common(q, k, tiles.forward)
    forward_kernel[grid](q, k, v, gate, out, lse, window=window, **common)
    return out, lse


def launch_query_gradient(q, k, v, gate, do, lse, delta, window, tiles: Tiles) -> torch.Tensor:
    from .kernels import query_gradient_kernel

    batch, tokens, heads, _ = q.shape
    dq = torch.empty_like(q)
    grid = (-(-tokens // tiles.query_gradient.queries), heads, batch)
    common = _common(q, k, tiles.query_gradient)
    query_gradient_kernel[grid](q, k, v, gate, do, lse, delta, dq, window=window, **common)
    return dq


def launch_key_gradient(q, k, v, gate, do, lse, delta, window, tiles: Tiles):
    """-> dk, dv (B, T, H, D), d log_keep (B, H, T)"""
    from .kernels import key_gradient_kernel

    dk, dv, d_gate = torch.empty_like(k), torch.empty_like(v), torch.empty_like(gate)
    grid = (-(-k.shape[1] // tiles.key_gradient.keys), k.shape[2], k.shape[0])
    common = _common(q, k, tiles.key_gradient)
    key_gradient_kernel[grid](
        q, k, v, gate, do, lse, delta, dk, dv, d_gate, window=window, **common
    )
    return dk, dv, d_gate
