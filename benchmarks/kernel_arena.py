"""A full arena for `bench_kernels`, built directly, without feeding thousands of tokens. Only this
file knows the backend's insides."""

from dataclasses import replace

import numpy as np
import torch

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import FP8Storage, Int4Storage, ModelStorage, Storage
from vllm_dms.backend.flash import Flash
from vllm_dms.backend.kernels.arguments import can_overlap
from vllm_dms.backend.kernels.schedule import allocate_schedule
from vllm_dms.backend.kernels.tuning import Tuning, default_tuning
from vllm_dms.backend.ops import Ops
from vllm_dms.backend.state import Batch, allocate_scratch, allocate_state
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.torch_pages import as_bytes, locate_slots
from vllm_dms.backend.torch_store import list_pages
from vllm_dms.backend.triton_ops import TritonOps
from vllm_dms.config import DMSConfig

HEADS, GROUP, HEAD_DIM, WINDOW, PAGE, BLOCK = 8, 4, 128, 512, 64, 16
MEAN_LIVE, CONTEXT = 1480, 8192
KEEP = (MEAN_LIVE - WINDOW - 1) / (CONTEXT - WINDOW - 1)  # of the tokens that leave the window
TAIL = 1.2  # standard deviation of log keep over heads: live lengths differ by about 10x
HEADROOM = 4  # pages per row for what timed stores append
SCALE = HEAD_DIM**-0.5
CACHE_BYTES = 300 << 20  # several times the L2 cache
MAX_LAYERS, MAX_SEQS = 36, 512
STORAGE = {"bf16": ModelStorage(torch.bfloat16), "fp8": FP8Storage(), "int4": Int4Storage()}


def keep_rates(shape: tuple[int, ...]) -> torch.Tensor:
    """Log-normal rates [L, H], none above 1, of mean KEEP in every layer."""
    rates = torch.exp(TAIL * torch.randn(shape))
    for _ in range(30):  # cutting at 1 lowers the mean
        rates = (rates * (KEEP / rates.mean(-1, keepdim=True))).clamp(max=1.0)
    return rates


class Arena:
    """``batch`` requests with ``stored`` tokens each, about to get ``chunk`` more."""

    def __init__(
        self,
        storage: Storage,
        batch: int,
        chunk: int,
        stored: int,
        num_layers: int | None = None,
        device: str = "cuda",
        evict: bool = True,
        tuning: Tuning | None = None,
        flash: Flash | None = None,
    ) -> None:
        per_layer = batch * HEADS * MEAN_LIVE * storage.slot_bytes(HEAD_DIM)
        many = 1 if chunk > 1 else min(MAX_LAYERS, 2 + CACHE_BYTES // per_layer)
        self.num_layers = num_layers or many
        headroom = HEADROOM * PAGE + (0 if chunk == 1 else chunk)
        self.layout = ArenaLayout(
            num_layers=self.num_layers,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            window=WINDOW,
            page_size=PAGE,
            block_size=BLOCK,
            storage=storage,
            max_model_len=stored + headroom,
        )
        self.stored, self.chunk, self.device = stored, chunk, device
        # Unshifted, so that timing one step again and again finds the same verdicts.
        self.config = DMSConfig("nvidia-borrowed", WINDOW, 1.0, 0.0, shift=0, evict=evict)
        self._fill(batch, headroom)
        self._make_inputs(batch)
        tuning = tuning or default_tuning(self.layout)
        schedule = allocate_schedule(
            self.layout, MAX_SEQS, HEADS * GROUP, tuning, torch.device(device)
        )
        own = (schedule, tuning, can_overlap(torch.device(device)), flash)
        self.ops = TritonOps(self.state, self.scratch, self.config, SCALE, *own)
        self.plain = TorchOps(self.state, self.scratch, self.config, SCALE)
        self.ops.begin_step(self.batch)

    def _fill(self, batch: int, headroom: int) -> None:
        """Random K and V; a request's pages in random order, as its rows grew side by side."""
        layout, device = self.layout, self.device
        rates = keep_rates((self.num_layers, HEADS)) * (0.8 + 0.4 * torch.rand(batch, 1, 1))
        left = max(0, self.stored - layout.ring_size)
        live = (rates.clamp(max=1.0) * left).long() + min(self.stored, layout.ring_size)
        if not self.config.evict:
            live = torch.full_like(live, self.stored)
        pages = -(-live // PAGE)  # [batch, L, H]
        most = (pages + -(-headroom // PAGE)).clamp(max=layout.max_pages_per_row)
        num_blocks = -(-most.flatten(1).sum(1) // layout.pages_per_block)
        total = 1 + int(num_blocks.sum())
        self.raw = torch.empty(total * layout.block_bytes, dtype=torch.uint8, device=device)
        self.state = state = allocate_state(self.raw, layout, total, batch)
        storage, p = layout.storage, state.pages
        for first in range(0, len(p.k), 1 << 12):
            some = slice(first, first + (1 << 12))
            shape = (*p.k[some].shape[:2], HEAD_DIM)
            k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
            for part, data in zip((p.k, p.k_scales), storage.encode_key(k), strict=True):
                as_bytes(part[some]).copy_(as_bytes(data))
            for part, data in zip((p.v, p.v_scales), storage.encode(v), strict=True):
                as_bytes(part[some]).copy_(as_bytes(data))

        free = torch.randperm(total - 1) + 1
        self.first_blocks = []
        for b in range(batch):
            blocks, free = free[: num_blocks[b]], free[num_blocks[b] :]
            self.first_blocks.append(int(blocks[0]))
            state.block_rows[b + 1, : len(blocks)] = blocks.int()
            state.state_of_block[blocks[0]] = b + 1
            used = int(pages[b].sum())
            index = torch.randperm(used)
            ids = blocks[index // layout.pages_per_block] * layout.pages_per_block
            ids = (ids + index % layout.pages_per_block).to(device)
            rows = ids.split(pages[b].flatten().tolist())
            for row, (layer, head) in zip(rows, np.ndindex(self.num_layers, HEADS), strict=True):
                list_pages(state, b + 1, layer, head, 0, row)
            state.pages_used[b + 1] = used
        state.live[1:] = live.int()
        bits = torch.rand_like(state.evict_ring, dtype=torch.float32) >= KEEP
        state.evict_ring.copy_(bits)
        self.appended = (state.live, state.pages_used, state.leaves_used)
        self.saved = [tensor.clone() for tensor in self.appended]
        self.saved_live = self.saved[0]

    def _make_inputs(self, batch: int) -> None:
        tokens, device = batch * self.chunk, self.device
        kind = {"dtype": torch.bfloat16, "device": device}
        self.query = torch.randn(tokens, HEADS * GROUP, HEAD_DIM, **kind)
        self.key = torch.randn(tokens, HEADS, HEAD_DIM, **kind)
        self.value = torch.randn(tokens, HEADS, HEAD_DIM, **kind)
        keep = torch.rand(tokens, HEADS, device=device) < KEEP
        self.alpha = torch.where(keep, -1.0, 1.0).to(torch.bfloat16)
        self.output = torch.full_like(self.query, float("nan"))
        int32 = {"dtype": torch.int32, "device": device}
        self.batch = Batch(
            num_reqs=batch,
            num_tokens=tokens,
            max_query_len=self.chunk,
            block_table=torch.tensor(self.first_blocks, **int32).unsqueeze(1),
            query_start=torch.arange(batch + 1, **int32) * self.chunk,
            seq_lens=torch.full((batch,), self.stored + self.chunk, **int32),
            max_stored=self.stored,
        )
        self.scratch = allocate_scratch(self.layout, tokens, device)

    def restore(self) -> None:
        """Take back what stores appended."""
        for tensor, before in zip(self.appended, self.saved, strict=True):
            tensor.copy_(before)

    def store(self, layer: int) -> None:
        self.ops.store(self.batch, layer, self.key, self.value, self.alpha)

    def decode(self, layer: int) -> None:
        self.ops.decode(self.batch, layer, self.query, self.output)

    def prefill(self, layer: int) -> None:
        self.ops.prefill(self.batch, layer, self.query, self.key, self.value, self.output)

    def store_window(self, layer: int) -> None:
        self.ops.store_window(self.batch, layer, self.key, self.value)

    def attended_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(kernel's, plain operations') output of some requests, after `decode` or `prefill`."""
        some = self._first_requests()
        exact = torch.full(self.output.shape, float("nan"), device=self.device)
        if self.chunk == 1:
            self.plain.decode(some, layer, self.query.float(), exact)
        else:
            inputs = (x.float() for x in (self.query, self.key, self.value))
            self.plain.prefill(some, layer, *inputs, exact)
        return self.output[: some.num_tokens], exact[: some.num_tokens]

    def _first_requests(self) -> Batch:
        num_reqs = min(8, self.batch.num_reqs)
        return replace(self.batch, num_reqs=num_reqs, num_tokens=num_reqs * self.chunk)

    def stored_rows(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All slots and decisions of some requests, as kernels and as plain operations would leave
        them: the state stays as it is."""
        both = (self._after_store(ops, layer) for ops in (self.ops, self.plain))
        return list(zip(*both, strict=True))

    def _after_store(self, ops: Ops, layer: int) -> list[torch.Tensor]:
        state, some = self.state, self._first_requests()
        changed = (self.raw, *self.appended, state.page_table, state.leaves, state.evict_ring)
        saved = [tensor.clone() for tensor in changed]
        ops.begin_step(some)
        ops.store(some, layer, self.key, self.value, self.alpha)
        if self.chunk > 1:
            ops.store_window(some, layer, self.key, self.value)
        rows = [state.evict_ring[1 : some.num_reqs + 1, layer].clone()]
        for index in range(1, some.num_reqs + 1):
            for head in range(HEADS):
                slot = torch.arange(int(state.live[index, layer, head]), device=self.device)
                where = locate_slots(state, index, layer, torch.full_like(slot, head), slot)
                rows += [as_bytes(part)[where] for part in state.pages]
        for tensor, before in zip(changed, saved, strict=True):
            tensor.copy_(before)
        ops.begin_step(self.batch)
        return rows
