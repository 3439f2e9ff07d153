"""The operations on the arena in plain PyTorch: the CPU path, and what the kernels must equal.

One request at a time and all its heads at once, with host reads of lengths: for a GPU this is a
checker, not a way to serve.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_dms.backend.ops import report
from vllm_dms.backend.state import ArenaState, Batch
from vllm_dms.backend.torch_pages import copy_slots, read_slots, write_slots
from vllm_dms.config import DMSConfig
from vllm_dms.reference import decide

QUERY_BLOCK = 128  # queries that share one band of keys; bounds the score matrix


@dataclass(frozen=True)
class _Request:
    """One request of a batch: its state index and its query tokens [start, end)."""

    state_index: int
    start: int
    end: int
    num_stored: int  # tokens stored before this step

    @property
    def query_len(self) -> int:
        return self.end - self.start


def _requests(state: ArenaState, batch: Batch) -> Iterator[_Request]:
    """The batch's requests that have query tokens and a state of their own."""
    states = state.state_of_block[batch.block_table[: batch.num_reqs, 0].long()].tolist()
    bounds = batch.query_start[: batch.num_reqs + 1].tolist()
    seq_lens = batch.seq_lens[: batch.num_reqs].tolist()
    for index, start, end, seq_len in zip(states, bounds, bounds[1:], seq_lens, strict=False):
        if index and end > start:
            yield _Request(index, start, end, seq_len - (end - start))


class TorchOps:
    """`ops.Ops` in plain PyTorch."""

    def store(
        self,
        state: ArenaState,
        batch: Batch,
        config: DMSConfig,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        for req in _requests(state, batch):
            tokens = slice(req.start, req.end)
            decisions = decide(alpha[tokens], config.alpha_scale, config.alpha_offset)
            decisions = decisions & config.evict
            verdicts = _verdicts(state, req, layer, decisions, config.shift)
            _append_survivors(state, batch, req, layer, verdicts, key[tokens], value[tokens])
            ring = state.evict_ring[req.state_index, layer]
            if config.shift and req.num_stored:
                ring[:, (req.num_stored - 1) % state.layout.ring_size] = decisions[0].byte()
            batch.scratch.evict[tokens] = verdicts[-req.query_len :].byte()
            if req.query_len == 1:
                _write_ring(state, batch, req, layer, key, value)

    def prefill(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        for req in _requests(state, batch):
            if req.query_len == 1:
                continue
            k, v, evict = _band(state, batch, req, layer, key, value)
            for start in range(req.start, req.end, QUERY_BLOCK):
                queries = slice(start, min(start + QUERY_BLOCK, req.end))
                _prefill_block(
                    state, batch, req, layer, queries, (query, k, v, evict, output), scale
                )

    def report(self, state: ArenaState, out: torch.Tensor) -> None:
        report(state, out)

    def store_window(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        for req in _requests(state, batch):
            if req.query_len > 1:
                _write_ring(state, batch, req, layer, key, value)

    def decode(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        for req in _requests(state, batch):
            if req.query_len > 1:
                continue
            live = state.live[req.state_index, layer]
            slots = torch.arange(int(live.max()), device=query.device)
            valid = slots < live.unsqueeze(1)
            k, v = read_slots(state, req.state_index, layer, slots, valid)
            output[req.start : req.end] = _attend(
                query[req.start : req.end], k, v, valid.unsqueeze(1), scale
            )


def _verdicts(
    state: ArenaState, req: _Request, layer: int, decisions: torch.Tensor, shift: int
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


def _append_survivors(
    state: ArenaState,
    batch: Batch,
    req: _Request,
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
    batch.scratch.num_survivors[req.start : req.end] = counts.int()


def _allocate_pages(
    state: ArenaState, s: int, layer: int, old: torch.Tensor, new: torch.Tensor
) -> None:
    """Extend each head's page table from ``old`` to ``new`` pages [H], lowest page first."""
    per_block = state.layout.pages_per_block
    for head, (start, end) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        used = int(state.pages_used[s])
        index = torch.arange(used, used + end - start, device=old.device)
        block = state.block_rows[s, index // per_block].long()
        state.page_table[s, layer, head, start:end] = (block * per_block + index % per_block).int()
        state.pages_used[s] += end - start


def _write_ring(
    state: ArenaState,
    batch: Batch,
    req: _Request,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Put the chunk's tokens that are still in the window into their ring slots."""
    size = state.layout.ring_size
    start = max(req.start, req.end - size)
    offset = req.num_stored - req.start
    slots = torch.arange(start + offset, req.end + offset, device=key.device) % size
    evict = batch.scratch.evict[start : req.end]
    state.evict_ring[req.state_index, layer][:, slots] = evict.T
    heads = torch.arange(key.shape[1], device=key.device).repeat(len(slots))
    rows = slots.repeat_interleave(key.shape[1])
    k, v = key[start : req.end].flatten(0, 1), value[start : req.end].flatten(0, 1)
    write_slots(state, req.state_index, layer, heads, rows, k, v)


def _band(
    state: ArenaState,
    batch: Batch,
    req: _Request,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, V [H, N, D] and verdicts [H, N] of the window's tokens and the chunk's, by position."""
    size = state.layout.ring_size
    first = max(0, req.num_stored - state.layout.window)
    slots = torch.arange(first, req.num_stored, device=key.device) % size
    k, v = read_slots(state, req.state_index, layer, slots)
    tokens = slice(req.start, req.end)
    k = torch.cat([k, key[tokens].float().transpose(0, 1)], 1)
    v = torch.cat([v, value[tokens].float().transpose(0, 1)], 1)
    ring = state.evict_ring[req.state_index, layer][:, slots]
    return k, v, torch.cat([ring, batch.scratch.evict[tokens].T], 1).bool()


def _prefill_block(
    state: ArenaState,
    batch: Batch,
    req: _Request,
    layer: int,
    queries: slice,
    tensors: tuple[torch.Tensor, ...],
    scale: float,
) -> None:
    """Attention of the query tokens ``queries``: survivors, then the band W before the first."""
    query, k, v, evict, output = tensors
    first = max(0, req.num_stored - state.layout.window)  # position of k[:, 0]
    offset = req.num_stored - req.start
    positions = torch.arange(queries.start + offset, queries.stop + offset, device=query.device)
    start = max(first, queries.start + offset - state.layout.window)
    band = torch.arange(start, queries.stop + offset, device=query.device)
    age = positions.unsqueeze(1) - band
    mask = (age >= 0) & ((age <= state.layout.window) | ~evict[:, None, band - first])

    count = batch.scratch.num_survivors[queries.start, : k.shape[0]]
    slots = torch.arange(int(count.max()), device=query.device)
    valid = slots < count.unsqueeze(1)
    old_k, old_v = read_slots(state, req.state_index, layer, slots + state.layout.ring_size, valid)
    old = valid.unsqueeze(1).expand(-1, len(positions), -1)
    output[queries] = _attend(
        query[queries],
        torch.cat([old_k, k[:, band - first]], 1),
        torch.cat([old_v, v[:, band - first]], 1),
        torch.cat([old, mask], 2),
        scale,
    )


def _attend(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention in float32: query [T, H * G, D], k, v [H, N, D], mask [H, T, N]."""
    heads = k.shape[0]
    q = query.float().unflatten(1, (heads, -1))
    scores = torch.einsum("thgd,hnd->hgtn", q, k) * scale
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    out = torch.einsum("hgtn,hnd->thgd", scores.softmax(-1), v)
    return out.flatten(1, 2).to(query.dtype)
