"""The operations on the arena in plain PyTorch: the CPU path, and what the kernels must equal.

One request at a time and all its heads at once, with host reads of lengths: for a GPU this is a
checker, not a way to serve.
"""

import torch

from vllm_dms.backend.ops import report
from vllm_dms.backend.state import ArenaState, Batch
from vllm_dms.backend.torch_pages import read_slots
from vllm_dms.backend.torch_store import (
    Request,
    append_survivors,
    requests,
    ring_and_chunk_verdicts,
    write_ring,
)
from vllm_dms.config import DMSConfig
from vllm_dms.reference import decide

QUERY_BLOCK = 128  # queries that share one band of keys; bounds the score matrix


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
        for req in requests(state, batch):
            tokens = slice(req.start, req.end)
            decisions = decide(alpha[tokens], config.alpha_scale, config.alpha_offset)
            decisions = decisions & config.evict
            verdicts = ring_and_chunk_verdicts(state, req, layer, decisions, config.shift)
            append_survivors(state, batch, req, layer, verdicts, key[tokens], value[tokens])
            ring = state.evict_ring[req.state_index, layer]
            if config.shift and req.num_stored:
                ring[:, (req.num_stored - 1) % state.layout.ring_size] = decisions[0].byte()
            batch.scratch.evict[tokens] = verdicts[-req.query_len :].byte()
            if req.query_len == 1:
                write_ring(state, batch, req, layer, key, value)

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
        for req in requests(state, batch):
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
        for req in requests(state, batch):
            if req.query_len > 1:
                write_ring(state, batch, req, layer, key, value)

    def decode(
        self,
        state: ArenaState,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        for req in requests(state, batch):
            if req.query_len > 1:
                continue
            live = state.live[req.state_index, layer]
            slots = torch.arange(int(live.max()), device=query.device)
            valid = slots < live.unsqueeze(1)
            k, v = read_slots(state, req.state_index, layer, slots, valid)
            output[req.start : req.end] = _attend(
                query[req.start : req.end], k, v, valid.unsqueeze(1), scale
            )


def _band(
    state: ArenaState,
    batch: Batch,
    req: Request,
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
    req: Request,
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
