"""Slots in pages, in plain PyTorch: where they are, and how they are written, moved and read."""

import torch

from vllm_dms.arena.layout import FP8_DTYPE, SCALE_DTYPE
from vllm_dms.backend.state import ArenaState


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and bfloat16 scales [...] of x [..., D]: one scale per token and head."""
    limit = torch.finfo(FP8_DTYPE).max
    scale = (x.float().abs().amax(-1) / limit).to(SCALE_DTYPE)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = x.float() / scale.float().unsqueeze(-1)
    return scaled.clamp(-limit, limit).to(FP8_DTYPE), scale


def locate_slots(
    state: ArenaState, s: int, layer: int, head: torch.Tensor, slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page, offset in page) of slots; ``head`` and ``slot`` broadcast."""
    size = state.layout.page_size
    return state.page_table[s, layer, head.long(), (slot // size).long()].long(), (
        slot % size
    ).long()


def copy_slots(
    state: ArenaState, s: int, layer: int, head: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> None:
    """Copy slots as stored: FP8 bytes move with their scales, never rounded twice."""
    source, target = (
        locate_slots(state, s, layer, head, src),
        locate_slots(state, s, layer, head, dst),
    )
    for pages in (state.k_pages, state.v_pages, state.k_scales, state.v_scales):
        if pages is not None:
            raw = pages.view(torch.uint8) if pages.dtype == FP8_DTYPE else pages
            raw[target] = raw[source]


def write_slots(
    state: ArenaState,
    s: int,
    layer: int,
    head: torch.Tensor,
    slot: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Store key and value [N, D] in the slots [N] of the heads [N]."""
    where = locate_slots(state, s, layer, head, slot)
    for x, pages, scales in (
        (key, state.k_pages, state.k_scales),
        (value, state.v_pages, state.v_scales),
    ):
        if scales is None:
            pages[where] = x.to(pages.dtype)
        else:
            raw, scale = quantize(x)
            pages.view(torch.uint8)[where] = raw.view(torch.uint8)
            scales[where] = scale


def read_slots(
    state: ArenaState, s: int, layer: int, slots: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 K and V [H, N, D] of the slots [N] of every head; 0 where not ``valid`` [H, N],
    because what lies beyond a head's live slots may be another request's, or NaN."""
    heads = torch.arange(state.layout.num_kv_heads, device=slots.device).unsqueeze(1)
    where = locate_slots(state, s, layer, heads, slots)
    out = []
    for pages, scales in ((state.k_pages, state.k_scales), (state.v_pages, state.v_scales)):
        if scales is None:
            out.append(pages[where].float())
        else:
            raw = pages.view(torch.uint8)[where].view(FP8_DTYPE)
            out.append(raw.float() * scales[where].float().unsqueeze(-1))
    if valid is not None:
        out = [x.masked_fill(~valid.unsqueeze(-1), 0.0) for x in out]
    return out[0], out[1]
