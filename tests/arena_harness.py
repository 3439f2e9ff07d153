"""Drives the operations on a small arena without vLLM, and says what exact DMS attention gives."""

import numpy as np
import torch

from vllm_dms import reference
from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import Copy
from vllm_dms.backend.ops import attend
from vllm_dms.backend.state import Batch, allocate_scratch, allocate_state
from vllm_dms.backend.torch_pages import as_bytes, find_pages, locate_slots
from vllm_dms.config import DMSConfig


def make_config(window: int, shift: int = 1, evict: bool = True) -> DMSConfig:
    """A threshold at 0: negative alphas keep, positive ones evict."""
    return DMSConfig(
        dialect="nvidia-borrowed",
        window=window,
        alpha_scale=1.0,
        alpha_offset=0.0,
        shift=shift,
        evict=evict,
    )


def copy_of(s: int, source, target, record, again: int = -1) -> Copy:
    """Of lists of blocks."""
    return Copy(s, tuple(np.array(part, np.int32) for part in (source, target, record)), again)


class Sequence:
    """One request's random inputs at one layer, and how far it was fed."""

    def __init__(self, length, layout, group, rate, seed, dtype=torch.float32, device="cpu"):
        g = torch.Generator().manual_seed(seed)
        heads, dim = layout.num_kv_heads, layout.head_dim

        def randn(*shape):
            return torch.randn(shape, generator=g).to(device, dtype)

        self.query = randn(length, heads * group, dim)
        self.key, self.value = randn(length, heads, dim), randn(length, heads, dim)
        keep = torch.rand(length, heads, generator=g) >= torch.as_tensor(rate)
        self.alpha = torch.where(keep, -1.0, 1.0).to(device, dtype)
        self.stored = 0
        self.outputs = []

    def __len__(self):
        return len(self.query)

    def expected(self, config, scale):
        """Exact attention of the whole sequence in one go, in float32."""
        decisions = reference.decide(self.alpha, config.alpha_scale, config.alpha_offset)
        evict = reference.evicted((decisions & config.evict).T, config.shift)
        mask = reference.visible(evict, config.window)
        return reference.attention(
            *(x.float().transpose(0, 1) for x in (self.query, self.key, self.value)),
            mask,
            scale,
        ).transpose(0, 1)


class Harness:
    """An arena of which every byte is what a former owner may have left, blocks handed out at
    random, and a feed of batches."""

    def __init__(
        self,
        make_ops,
        config,
        layout: ArenaLayout,
        num_seqs=4,
        max_tokens=512,
        device="cpu",
        state=None,
    ):
        """``make_ops(state, scratch, config, scale)``, as `TorchOps`; ``state``: another arena, of
        which the last blocks are handed out."""
        self.layout, self.device = layout, device
        self.state = state or self._poisoned_state(num_seqs)
        self.scratch = allocate_scratch(layout, max_tokens, device)
        self.scale = layout.head_dim**-0.5
        self.ops = make_ops(self.state, self.scratch, config, self.scale)
        self.spread = lambda tensor: tensor  # where inputs and outputs lie
        needed = num_seqs * layout.max_blocks_per_request
        free = torch.randperm(needed, generator=torch.Generator().manual_seed(1))
        free += self.state.num_blocks - needed
        self.rows = free.view(num_seqs, -1).int().to(device)

    def _poisoned_state(self, num_seqs):
        layout = self.layout
        num_blocks = 1 + num_seqs * layout.max_blocks_per_request
        kind = {"dtype": torch.uint8, "device": self.device}
        storage = torch.zeros(num_blocks * layout.block_bytes, **kind)
        state = allocate_state(storage, layout, num_blocks, num_seqs)
        storage[layout.block_bytes :] = 0xFF  # NaN in every float format; block 0 is nobody's
        state.live[1:] = 12345
        state.page_table[1:, ..., : layout.leaf_size] = num_blocks * layout.pages_per_block - 1
        state.page_table[1:, ..., layout.leaf_size :] = len(state.leaves) - 1
        state.leaves[layout.leaves_per_block :] = num_blocks * layout.pages_per_block - 1
        state.evict_ring[1:] = 0xAA
        return state

    def start(self, index: int) -> None:
        """Give request ``index`` (0-based) its state and all blocks it could need."""
        self.state.block_rows[index + 1] = self.rows[index]
        self.state.state_of_block[self.rows[index, 0].long()] = index + 1
        self.state.pages_used[index + 1] = self.state.leaves_used[index + 1] = 0

    def step(self, work, layers=None, padding=0):
        """One step through all layers: ``work`` is a list of (request index, sequence, tokens).

        Every layer gets the same inputs; the outputs kept are the last one's. ``padding``: requests
        and tokens, of no content, that a CUDA graph adds.
        """
        parts = [slice(seq.stored, seq.stored + count) for _, seq, count in work]

        def gather(name):
            pieces = [getattr(s, name)[p] for (_, s, _), p in zip(work, parts, strict=True)]
            pieces.append(pieces[0].new_full((padding, *pieces[0].shape[1:]), float("nan")))
            return self.spread(torch.cat(pieces))

        query, key, value, alpha = (gather(n) for n in ("query", "key", "value", "alpha"))
        batch = self.make_batch(work, padding)
        self.ops.begin_step(batch)
        for layer in layers or range(self.layout.num_layers):
            self.scratch.evict.fill_(0xFF)
            self.scratch.num_survivors.fill_(-(2**30))
            output = self.spread(torch.full_like(query, float("nan")))
            attend(self.ops, batch, layer, query, key, value, alpha, output)
        offset = 0
        for _, seq, count in work:
            seq.outputs.append(output[offset : offset + count].clone())
            seq.stored += count
            offset += count

    def make_batch(self, work, padding=0):
        """Padding rows have no tokens and resolve to the null state, as in a CUDA graph."""
        tables = [int(self.rows[index, 0]) for index, _, _ in work] + [0] * padding
        ends = [seq.stored + count for _, seq, count in work] + [0] * padding
        counts = [count for _, _, count in work] + [0] * padding
        int32 = {"dtype": torch.int32, "device": self.device}
        chunks = [(i, seq.stored) for i, (_, seq, count) in enumerate(work) if count > 1]
        return Batch(
            num_reqs=len(counts),
            num_tokens=sum(counts),
            max_query_len=max(counts),
            block_table=torch.tensor(tables, **int32).unsqueeze(1),
            query_start=torch.tensor([0, *counts]).cumsum(0).to(**int32),
            seq_lens=torch.tensor(ends, **int32),
            first_chunk=min((i for i, _ in chunks), default=0),
            max_stored=max((stored for _, stored in chunks), default=0),
            may_decode=1 in counts,
        )


def feed(harness, sequences, chunks):
    """Feed sequences side by side until all are stored: step i gives sequence k the chunk length
    ``chunks[(i + k) % len(chunks)]``; some batches are padded."""
    for index in range(len(sequences)):
        harness.start(index)
    step = 0
    while any(s.stored < len(s) for s in sequences):
        work = []
        for index, seq in enumerate(sequences):
            count = min(chunks[(step + index) % len(chunks)], len(seq) - seq.stored)
            if count:
                work.append((index, seq, count))
        harness.step(work, padding=step % 3)
        step += 1


def gather_row(state, index, layer, head):
    """The live slots of a row as stored, wherever their pages are: K, V and their scales; as bytes,
    if they are not numbers of a float format."""
    slots = torch.arange(int(state.live[index, layer, head]), device=state.live.device)
    pages, offsets = locate_slots(state, index, layer, torch.full_like(slots, head), slots)
    parts = [part for part in state.pages if part.numel()]
    rows = [as_bytes(part)[pages, offsets] for part in parts]
    if state.pages.k.dtype == torch.uint8:
        return rows
    return [row.view(part.dtype).float() for row, part in zip(rows, parts, strict=True)]


def assert_taken_from_own_blocks(harness, num_seqs):
    """Every page of the first requests has one owner and lies in a block of its owner; so does
    every leaf, and in a block whose pages are in use."""
    state, layout = harness.state, harness.layout
    pages_taken, leaves_taken = [], []
    for index in range(1, num_seqs + 1):
        blocks = harness.rows[index - 1].tolist()
        pages, leaves = [], []
        for layer in range(layout.num_layers):
            for head in range(layout.num_kv_heads):
                count = -(-int(state.live[index, layer, head]) // layout.page_size)
                number = torch.arange(count, device=state.live.device)
                heads = torch.full_like(number, head)
                pages += find_pages(state, index, layer, heads, number).tolist()
                listed = state.page_table[index, layer, head, layout.leaf_size :]
                leaves += listed[: max(-(-count // layout.leaf_size) - 1, 0)].tolist()
        assert {p // layout.pages_per_block for p in pages} <= set(blocks)
        in_use = blocks[: -(-len(pages) // layout.pages_per_block)]
        assert {leaf // layout.leaves_per_block for leaf in leaves} <= set(in_use)
        assert int(state.pages_used[index]) == len(pages)
        assert int(state.leaves_used[index]) == len(leaves) <= len(pages) // layout.leaf_size
        pages_taken += pages
        leaves_taken += leaves
    assert len(pages_taken) == len(set(pages_taken))
    assert len(leaves_taken) == len(set(leaves_taken))
