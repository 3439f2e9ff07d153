"""What the launchers pass to every kernel, checked when it is made."""

import torch
import triton

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import SCALE_DTYPE
from vllm_dms.backend.kernels.common import Geometry, Requests, StateArgs
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.state import ArenaState


def check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found}, but the kernels expect {expected}")


def can_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def make_geometry(layout: ArenaLayout, max_num_seqs: int, tuning: Tuning) -> Geometry:
    storage, dim = layout.storage, layout.head_dim
    check("page_size, rounded up", triton.next_power_of_2(layout.page_size), layout.page_size)
    if layout.max_leaves_per_row:  # a tile of slots is listed in one place
        leaf_slots = layout.leaf_size * layout.page_size
        tile = max(tuning.decode_block, tuning.prefill_block)
        check("slots of a leaf, over whole tiles,", leaf_slots % tile, 0)
    return Geometry(
        L=layout.num_layers,
        H=layout.num_kv_heads,
        D=dim,
        # A tensor-core product sums over 16 channels at least.
        D_PAD=max(16 * storage.num_products, triton.next_power_of_2(dim)),
        P=layout.page_size,
        R=layout.ring_size,
        MAX_PAGES=layout.max_pages_per_row,
        LEAF=layout.leaf_size,
        MAX_LEAVES=layout.max_leaves_per_row,
        TABLE=layout.table_width,
        LEAVES_PER_BLOCK=layout.leaves_per_block,
        MAX_BLOCKS=layout.max_blocks_per_request,
        PAGES_PER_BLOCK=layout.pages_per_block,
        MAX_REQS=triton.next_power_of_2(max_num_seqs),
        STORAGE=storage.name,
        WIDTH=storage.width(dim),
        PAGE=layout.page_bytes // storage.dtype.itemsize,
        SCALES=storage.num_scales,
        SCALES_PAD=triton.next_power_of_2(storage.num_scales),
        PAGE_SCALES=layout.page_bytes // SCALE_DTYPE.itemsize,
    )


def make_requests(geo: Geometry, device: torch.device) -> Requests:
    return Requests(
        *torch.zeros(len(Requests._fields), geo.MAX_REQS, dtype=torch.int32, device=device)
    )


def make_state_args(state: ArenaState, geo: Geometry) -> StateArgs:
    pages = state.pages
    check("strides of the values", pages.k.stride(), (geo.PAGE, geo.WIDTH, 1))
    if geo.SCALES:  # what is empty has no strides to speak of
        found = pages.k_scales.stride()[:2]
        check("strides of the scales", found, (geo.PAGE_SCALES, geo.SCALES))
    distance = pages.v.storage_offset() - pages.k.storage_offset()
    check("offset of V in a page", distance, geo.P * geo.WIDTH)
    return StateArgs(
        pages=pages.k,
        scales=pages.k_scales,
        state_of_block=state.state_of_block,
        block_rows=state.block_rows,
        pages_used=state.pages_used,
        leaves_used=state.leaves_used,
        live=state.live,
        page_table=state.page_table,
        leaves=state.leaves,
        evict_ring=state.evict_ring,
    )
