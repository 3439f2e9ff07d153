"""How the plain PyTorch operations write the arena: survivors, their pages, the window ring.

For a CPU, like `torch_ops`: lengths are read on the host. `triton_ops` has none of this.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_dms.backend.state import ArenaState, Batch, Scratch
from vllm_dms.backend.torch_pages import copy_slots, write_slots


@dataclass(frozen=True)
class Request:
    """One request of a batch: its state index and its query tokens [start, end)."""

    state_index: int
    start: int
    end: int
    num_stored: int  # tokens stored before this step

    @property
    def query_len(self) -> int:
        return self.end - self.start


def requests(state: ArenaState, batch: Batch) -> Iterator[Request]:
    """The batch's requests that have query tokens and a state of their own."""
    states = state.state_of_block[batch.block_table[: batch.num_reqs, 0].long()].tolist()
    bounds = batch.query_start[: batch.num_reqs + 1].tolist()
    seq_lens = batch.seq_lens[: batch.num_reqs].tolist()
    for index, start, end, seq_len in zip(states, bounds, bounds[1:], seq_lens, strict=False):
        if index and end > start:
            yield Request(index, start, end, seq_len - (end - start))


def ring_and_chunk_verdicts(
    state: ArenaState, req: Request, layer: int, decisions: torch.Tensor, shift: int
) -> torch.Tensor:
    """e of the ring's tokens and the chunk's, bool [ring tokens + m, H], by position.

    With a shift the last token has no verdict yet; it reads False, and is inside every window.
    """
    size = state.layout.ring_size
    first = max(0, req.num_stored - size)
    slots = torch.arange(first, req.num_stored, device=decisions.device) % size
    ring = state.evict_ring[req.state_index, layer][:, slots].bool().T
    verdicts = torch.cat([ring, torch.zeros_like(decisions)])
    count = verdicts.shape[0]
    if shift == 0:
        verdicts[count - req.query_len :] = decisions
    elif req.num_stored:
        verdicts[count - req.query_len - 1 : count - 1] = decisions
    else:
        verdicts[: count - 1] = decisions[1:]
    return verdicts


def append_survivors(
    state: ArenaState,
    scratch: Scratch,
    req: Request,
    layer: int,
    verdicts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Give the tokens that leave the window and are not evicted their slots; grow `live`."""
    size, page = state.layout.ring_size, state.layout.page_size
    n, m, s = req.num_stored, req.query_len, req.state_index
    first = max(0, n - size)  # position of verdicts[0]
    num_leaving = max(0, n + m - size - first)
    kept = ~verdicts[:num_leaving]  # [leaving, H]
    rank = kept.cumsum(0)

    old_live = state.live[s, layer] if n else torch.zeros_like(state.live[s, layer])
    survivors = old_live - min(n, size)
    new_live = survivors + kept.sum(0) + min(n + m, size)
    _allocate_pages(state, s, layer, (old_live + page - 1) // page, (new_live + page - 1) // page)
    state.live[s, layer] = new_live.int()

    head, token = kept.T.nonzero(as_tuple=True)
    slot = size + survivors[head] + rank[token, head] - 1
    from_ring = token < n - first
    h, t, dst = head[from_ring], token[from_ring], slot[from_ring]
    copy_slots(state, s, layer, h, (first + t) % size, dst)
    h, t, dst = head[~from_ring], token[~from_ring] - (n - first), slot[~from_ring]
    write_slots(state, s, layer, h, dst, key[t, h], value[t, h])

    # A token at position p has survivors among the tokens up to p - size.
    done = torch.arange(n, n + m, device=key.device) - size - first + 1
    total = torch.cat([torch.zeros_like(rank[:1]), rank]) if num_leaving else rank.new_zeros(1, 1)
    counts = survivors + total[done.clamp(0, num_leaving)]
    scratch.num_survivors[req.start : req.end] = counts.int()


def _allocate_pages(
    state: ArenaState, s: int, layer: int, old: torch.Tensor, new: torch.Tensor
) -> None:
    """Extend each head's row from ``old`` to ``new`` pages [H], lowest page first."""
    per_block = state.layout.pages_per_block
    for head, (start, end) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        used = int(state.pages_used[s])
        index = torch.arange(used, used + end - start, device=old.device)
        block = state.block_rows[s, index // per_block].long()
        list_pages(state, s, layer, head, start, block * per_block + index % per_block)
        state.pages_used[s] += end - start


def list_pages(
    state: ArenaState, s: int, layer: int, head: int, start: int, pages: torch.Tensor
) -> None:
    """Make ``pages`` the row's pages from number ``start`` on; take the leaves that it needs."""
    size, table = state.layout.leaf_size, state.page_table[s, layer, head]
    own = pages[: max(size - start, 0)]
    table[start : start + len(own)] = own.int()
    for index in range(start + len(own), start + len(pages)):
        if index % size == 0:
            taken = int(state.leaves_used[s])
            per_block = state.layout.leaves_per_block
            block = state.block_rows[s, taken // per_block]
            table[size - 1 + index // size] = block * per_block + taken % per_block
            state.leaves_used[s] += 1
        state.leaves[table[size - 1 + index // size].long(), index % size] = pages[index - start]


def write_ring(
    state: ArenaState,
    scratch: Scratch,
    req: Request,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Put the chunk's tokens that are still in the window into their ring slots."""
    size = state.layout.ring_size
    start = max(req.start, req.end - size)
    offset = req.num_stored - req.start
    slots = torch.arange(start + offset, req.end + offset, device=key.device) % size
    evict = scratch.evict[start : req.end]
    state.evict_ring[req.state_index, layer][:, slots] = evict.T
    heads = torch.arange(key.shape[1], device=key.device).repeat(len(slots))
    rows = slots.repeat_interleave(key.shape[1])
    k, v = key[start : req.end].flatten(0, 1), value[start : req.end].flatten(0, 1)
    write_slots(state, req.state_index, layer, heads, rows, k, v)
