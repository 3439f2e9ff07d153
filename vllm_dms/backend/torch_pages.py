"""Slots in pages, in plain PyTorch: where they are, and how they are written, moved and read."""

import torch

from vllm_dms.backend.state import ArenaState


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    """PyTorch can't index FP8 on a CPU, and a copy of bytes rounds nothing."""
    return part.view(torch.uint8)


def find_pages(
    state: ArenaState, s: int, layer: int, head: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """The pages number ``index`` of rows, int64; ``head`` and ``index`` broadcast."""
    size, table = state.layout.leaf_size, state.page_table[s, layer].long()
    far = index >= size
    entry = torch.where(far, size - 1 + index // size, index)
    page = table[head, entry]
    if state.layout.max_leaves_per_row:
        leaf = torch.where(far, page, 0)
        page = torch.where(far, state.leaves[leaf, index % size].long(), page)
    return page


def locate_slots(
    state: ArenaState, s: int, layer: int, head: torch.Tensor, slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page, offset in page) of slots; ``head`` and ``slot`` broadcast."""
    size, slot = state.layout.page_size, slot.long()
    return find_pages(state, s, layer, head.long(), slot // size), slot % size


def copy_slots(
    state: ArenaState, s: int, layer: int, head: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> None:
    """Copy slots as stored: values move with their scales, never rounded twice."""
    source, target = (
        locate_slots(state, s, layer, head, src),
        locate_slots(state, s, layer, head, dst),
    )
    for part in map(as_bytes, state.pages):
        part[target] = part[source]


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
    pages, storage = state.pages, state.layout.storage
    encoded = (*storage.encode_key(key), *storage.encode(value))
    parts = (pages.k, pages.k_scales, pages.v, pages.v_scales)
    for part, data in zip(parts, encoded, strict=True):
        as_bytes(part)[where] = as_bytes(data)


def read_slots(
    state: ArenaState, s: int, layer: int, slots: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 K and V [H, N, D] of the slots [N] of every head; 0 where not ``valid`` [H, N],
    because what lies beyond a head's live slots may be another request's, or NaN."""
    heads = torch.arange(state.layout.num_kv_heads, device=slots.device).unsqueeze(1)
    where = locate_slots(state, s, layer, heads, slots)
    pages, storage = state.pages, state.layout.storage
    out = []
    for values, scales, decode in (
        (pages.k, pages.k_scales, storage.decode_key),
        (pages.v, pages.v_scales, storage.decode),
    ):
        x = decode(as_bytes(values)[where].view(values.dtype), scales[where])
        out.append(x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0))
    return out[0], out[1]
