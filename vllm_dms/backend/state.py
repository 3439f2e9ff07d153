"""The arena and the device state beside it: who fills which tensor, and when.

State tensors have a leading dimension of ``num_states`` = max_num_seqs + 1. Index 0 is the null
state: padding rows, warm-up and CUDA-graph capture resolve to it (as they resolve to vLLM's null
block 0), read and write page 0 only, and leave nothing behind.
"""

from dataclasses import dataclass

import torch

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import Pages


@dataclass(frozen=True)
class ArenaState:
    """Persistent tensors of one worker. Addresses never change after start-up (CUDA graphs)."""

    layout: ArenaLayout
    blocks: torch.Tensor  # uint8 [num_blocks, block_bytes]: vLLM's own KV allocation
    pages: Pages  # views of the same
    # Written by the connector before a forward pass, read by `store`.
    state_of_block: torch.Tensor  # int32 [num_blocks]: first block of a request -> state index
    block_rows: torch.Tensor  # int32 [num_states, max_blocks_per_request]: blocks in order of use
    # Written by `store`. The counters are also zeroed by the connector when a request (re)starts.
    pages_used: torch.Tensor  # int32 [num_states]: pages handed out so far, lowest first
    leaves_used: torch.Tensor  # int32 [num_states]: leaves likewise
    live: torch.Tensor  # int32 [num_states, L, H]: live slots; stale until a request's first store
    # int32 [num_states, L, H, table_width]: the first pages in order of slots, then leaves
    page_table: torch.Tensor
    leaves: torch.Tensor  # int32 [num_blocks * leaves_per_block, leaf_size]: further pages
    evict_ring: torch.Tensor  # uint8 [num_states, L, H, W + 1]: verdict on the token in a ring slot

    @property
    def num_states(self) -> int:
        return self.pages_used.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.state_of_block.shape[0]


@dataclass(frozen=True)
class Scratch:
    """Per-step hand-over from `store` to `prefill` and `store_window`; shared by all layers.

    Rows are tokens of the batch, so `max_tokens` is vLLM's max_num_batched_tokens.
    """

    # int32 [max_tokens, H]: survivor slots that exist once this token's own window has moved on,
    # that is survivors among tokens at or before position - W - 1.
    num_survivors: torch.Tensor
    evict: torch.Tensor  # uint8 [max_tokens, H]: verdict on the chunk's tokens


@dataclass(frozen=True)
class Batch:
    """One step's requests, in vLLM's batch order. Tensors are persistent; no host copies.

    A request with one query token is a decode, whether or not it still is in its prompt.
    """

    num_reqs: int  # rows below, CUDA-graph padding included (padding has no query tokens)
    num_tokens: int  # query tokens, padding excluded
    max_query_len: int  # host-side bound: 1 means that `prefill` has nothing to do
    block_table: torch.Tensor  # int32 [num_reqs, *]: only column 0 is read
    query_start: torch.Tensor  # int32 [num_reqs + 1]
    seq_lens: torch.Tensor  # int32 [num_reqs]: tokens stored before this step + query tokens
    # What the host knows of requests with several query tokens, if it does:
    first_chunk: int = 0  # none before it
    max_stored: int = 1 << 30  # bounds the tokens that one has stored before this step
    may_decode: bool = True  # whether there may be others


def allocate_scratch(layout: ArenaLayout, max_tokens: int, device: torch.device | str) -> Scratch:
    shape = (max_tokens, layout.num_kv_heads)
    return Scratch(
        num_survivors=torch.zeros(shape, dtype=torch.int32, device=device),
        evict=torch.zeros(shape, dtype=torch.uint8, device=device),
    )


@dataclass(frozen=True)
class SideState:
    """The tensors beside the arena; made with the model, so that vLLM's profiling counts them."""

    block_rows: torch.Tensor
    pages_used: torch.Tensor
    leaves_used: torch.Tensor
    live: torch.Tensor
    page_table: torch.Tensor
    evict_ring: torch.Tensor


def allocate_side_state(
    layout: ArenaLayout, max_num_seqs: int, device: torch.device | str
) -> SideState:
    """Side state of ``max_num_seqs`` requests and the null state."""
    rows = (max_num_seqs + 1, layout.num_layers, layout.num_kv_heads)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SideState(
        block_rows=zeros(rows[0], layout.max_blocks_per_request),
        pages_used=zeros(rows[0]),
        leaves_used=zeros(rows[0]),
        live=zeros(*rows),
        page_table=zeros(*rows, layout.table_width),
        evict_ring=zeros(*rows, layout.ring_size, dtype=torch.uint8),
    )


def bind_state(storage: torch.Tensor, layout: ArenaLayout, side: SideState) -> ArenaState:
    """The whole state over ``storage``: vLLM's KV allocation as flat uint8."""
    num_blocks = storage.numel() // layout.block_bytes
    if storage.dtype != torch.uint8 or num_blocks < 1:
        raise ValueError(
            f"KV storage is {storage.numel()} elements of {storage.dtype}, "
            f"but one block is {layout.block_bytes} bytes of uint8"
        )
    # Kernels look one tile ahead, at leaves that a former request may have left: they must exist.
    side.page_table.zero_()
    num_leaves = num_blocks * layout.leaves_per_block
    int32 = {"dtype": torch.int32, "device": storage.device}
    blocks = storage[: num_blocks * layout.block_bytes].view(num_blocks, -1)
    raw = blocks.view(-1, layout.page_bytes)
    return ArenaState(
        layout=layout,
        blocks=blocks,
        pages=layout.storage.view_pages(raw, layout.page_size, layout.head_dim),
        state_of_block=torch.zeros(num_blocks, **int32),
        block_rows=side.block_rows,
        pages_used=side.pages_used,
        leaves_used=side.leaves_used,
        live=side.live,
        page_table=side.page_table,
        leaves=torch.zeros(num_leaves, layout.leaf_size, **int32),
        evict_ring=side.evict_ring,
    )


def allocate_state(
    storage: torch.Tensor, layout: ArenaLayout, num_blocks: int, max_num_seqs: int
) -> ArenaState:
    """`allocate_side_state` and `bind_state` over the first ``num_blocks`` of ``storage``."""
    side = allocate_side_state(layout, max_num_seqs, storage.device)
    return bind_state(storage[: num_blocks * layout.block_bytes], layout, side)
