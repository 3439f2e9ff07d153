"""The operations on the arena in plain PyTorch: the CPU path, and what the kernels must equal.

One request at a time and all its heads at once, with host reads of lengths: for a GPU this is a
checker, not a way to serve.
"""

import torch

from vllm_dms.backend.ops import attend, report
from vllm_dms.backend.projection import Projection, project, views
from vllm_dms.backend.state import ArenaState, Batch, Scratch
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

    def __init__(
        self, state: ArenaState, scratch: Scratch, config: DMSConfig, scale: float
    ) -> None:
        """``scale``: of the softmax"""
        self.state, self.scratch = state, scratch
        self.config, self.scale = config, scale

    def warm_up(self, dtype: torch.dtype, projection: Projection | None) -> None:
        """Nothing is compiled."""

    def begin_step(self, batch: Batch) -> None:
        """Nothing to plan: requests take their turns."""

    def store(
        self,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        state, scratch, config = self.state, self.scratch, self.config
        for req in requests(state, batch):
            tokens = slice(req.start, req.end)
            decisions = decide(alpha[tokens], config.alpha_scale, config.alpha_offset)
            decisions = decisions & config.evict
            verdicts = ring_and_chunk_verdicts(state, req, layer, decisions, config.shift)
            append_survivors(state, scratch, req, layer, verdicts, key[tokens], value[tokens])
            ring = state.evict_ring[req.state_index, layer]
            if config.shift and req.num_stored:
                ring[:, (req.num_stored - 1) % state.layout.ring_size] = decisions[0].byte()
            scratch.evict[tokens] = verdicts[-req.query_len :].byte()
            if req.query_len == 1:
                write_ring(state, scratch, req, layer, key, value)

    def prefill(
        self,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        for req in requests(self.state, batch):
            if req.query_len == 1:
                continue
            band = self._band(req, layer, key, value)
            for start in range(req.start, req.end, QUERY_BLOCK):
                queries = slice(start, min(start + QUERY_BLOCK, req.end))
                output[queries] = self._prefill_block(req, layer, queries, query[queries], *band)

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        for req in requests(self.state, batch):
            if req.query_len > 1:
                write_ring(self.state, self.scratch, req, layer, key, value)

    def decode(self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        state = self.state
        for req in requests(state, batch):
            if req.query_len > 1:
                continue
            live = state.live[req.state_index, layer]
            slots = torch.arange(int(live.max()), device=query.device)
            valid = slots < live.unsqueeze(1)
            k, v = read_slots(state, req.state_index, layer, slots, valid)
            tokens = slice(req.start, req.end)
            output[tokens] = _attend(query[tokens], k, v, valid.unsqueeze(1), self.scale)

    def attend_projection(
        self,
        batch: Batch,
        layer: int,
        projection: Projection,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        alpha: torch.Tensor | None,
        rotated: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        heads, dim = self.state.layout.num_kv_heads, self.state.layout.head_dim
        out = views(qkv, rotated, heads, qkv.shape[1] // (heads * dim) - 2, dim)
        project(projection, self.config, qkv, positions, alpha, out)
        attend(self, batch, layer, *out, output.view(out.query.shape))

    def report(self, out: torch.Tensor) -> None:
        report(self.state, out)

    def _band(
        self, req: Request, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K, V [H, N, D] and verdicts [H, N] of the window's tokens, then the chunk's."""
        state = self.state
        first = max(0, req.num_stored - state.layout.window)
        slots = torch.arange(first, req.num_stored, device=key.device) % state.layout.ring_size
        k, v = read_slots(state, req.state_index, layer, slots)
        tokens = slice(req.start, req.end)
        k = torch.cat([k, key[tokens].float().transpose(0, 1)], 1)
        v = torch.cat([v, value[tokens].float().transpose(0, 1)], 1)
        ring = state.evict_ring[req.state_index, layer][:, slots]
        return k, v, torch.cat([ring, self.scratch.evict[tokens].T], 1).bool()

    def _prefill_block(
        self,
        req: Request,
        layer: int,
        queries: slice,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        evict: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of the query tokens ``queries``: survivors, then of the band (k, v, evict) what
        is up to W before the first."""
        state, window = self.state, self.state.layout.window
        first = max(0, req.num_stored - window)  # position of k[:, 0]
        offset = req.num_stored - req.start
        positions = torch.arange(queries.start + offset, queries.stop + offset, device=query.device)
        start = max(first, queries.start + offset - window)
        band = torch.arange(start, queries.stop + offset, device=query.device)
        age = positions.unsqueeze(1) - band
        mask = (age >= 0) & ((age <= window) | ~evict[:, None, band - first])

        count = self.scratch.num_survivors[queries.start, : k.shape[0]]
        slots = torch.arange(int(count.max()), device=query.device)
        valid = slots < count.unsqueeze(1)
        old_slots = slots + state.layout.ring_size
        old_k, old_v = read_slots(state, req.state_index, layer, old_slots, valid)
        old = valid.unsqueeze(1).expand(-1, len(positions), -1)
        return _attend(
            query,
            torch.cat([old_k, k[:, band - first]], 1),
            torch.cat([old_v, v[:, band - first]], 1),
            torch.cat([old, mask], 2),
            self.scale,
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
