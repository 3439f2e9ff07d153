"""A step of many layers for `bench_launches`: its batch, its inputs, and vLLM's view of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from kernel_arena import BLOCK, GROUP, HEAD_DIM, HEADS, PAGE, SCALE, STORAGE, WINDOW
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.backend.attention import DMSAttention, DMSMetadata
from vllm_dms.backend.kernels.arguments import can_overlap
from vllm_dms.backend.kernels.schedule import allocate_schedule
from vllm_dms.backend.kernels.tuning import default_tuning
from vllm_dms.backend.projection import Projection
from vllm_dms.backend.runtime import Runtime
from vllm_dms.backend.state import Batch, allocate_scratch, allocate_state
from vllm_dms.backend.triton_ops import TritonOps
from vllm_dms.config import DMSConfig

MAX_LENGTH, MAX_SEQS, MAX_TOKENS = 4096, 64, 4096
# Of `attend_projection`, by their methods.
PARTS = {
    "begin_step": "begin_step",
    "_launch_project": "project",
    "_launch_store": "store",
    "_attend_chunks": "prefill",
    "_launch_window": "window",
    "_launch_decode": "decode",
}


class Request(NamedTuple):
    """Of a step."""

    stored: int  # tokens before it
    tokens: int  # new ones


class LaunchStep:
    """``requests`` in an arena of ``num_layers``, what they have stored included."""

    def __init__(
        self, requests: list[Request], num_layers: int, storage: str, device: torch.device
    ) -> None:
        self.num_layers, self.device = num_layers, device
        self.config = DMSConfig("nvidia-borrowed", WINDOW, 1.0, 0.0, shift=1)
        self.layout = ArenaLayout(
            num_layers=num_layers,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            window=WINDOW,
            page_size=PAGE,
            block_size=BLOCK,
            storage=STORAGE[storage],
            max_model_len=MAX_LENGTH,
        )
        self._allocate(requests)
        weight = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device=device)
        angles = torch.rand(MAX_LENGTH, HEAD_DIM // 2, device=device)
        cache = torch.cat((angles.cos(), angles.sin()), -1).to(weight.dtype)
        self.projection = Projection(weight, weight, 1e-6, SimpleNamespace(cos_sin_cache=cache))
        self._bind_layers()
        self.ops.warm_up(torch.bfloat16, self.projection)
        for row, request in enumerate(requests):
            if request.stored:
                self.prepare([Request(0, request.stored)], row)
                self.run()
        self.prepare(requests)
        self._saved = [tensor.clone() for tensor in self._appended]

    def _allocate(self, requests: list[Request]) -> None:
        layout, device = self.layout, self.device
        # As if all were kept, so that no row runs out of pages.
        pages = [layout.num_rows * -(-sum(request) // PAGE) for request in requests]
        blocks = [-(-num // layout.pages_per_block) for num in pages]
        total = 1 + sum(blocks)
        raw = torch.empty(total * layout.block_bytes, dtype=torch.uint8, device=device)
        self.state = state = allocate_state(raw, layout, total, MAX_SEQS)
        self.first_blocks, free = [], 1
        for index, num in enumerate(blocks, start=1):
            own = torch.arange(free, free + num, dtype=torch.int32, device=device)
            state.block_rows[index, :num] = own
            state.state_of_block[free] = index
            self.first_blocks.append(free)
            free += num
        self._appended = (state.live, state.pages_used, state.leaves_used)
        self.raw, scratch = raw, allocate_scratch(layout, MAX_TOKENS, device)
        tuning = default_tuning(layout)
        schedule = allocate_schedule(layout, MAX_SEQS, HEADS * GROUP, tuning, device)
        how = (self.config, SCALE, schedule, tuning, can_overlap(device), None)
        self.ops = TritonOps(state, scratch, *how)

    def _bind_layers(self) -> None:
        """What of vLLM's layers the op reads."""
        kv_cache = self.raw.view(-1, self.layout.block_bytes)
        runtime = SimpleNamespace(_storage_ptr=self.raw.data_ptr(), ops=self.ops)
        runtime.bind = partial(Runtime.bind, runtime)
        self.layers = {
            f"model.layers.{index}.self_attn.attn": SimpleNamespace(
                layer_index=index,
                layer_name=f"model.layers.{index}.self_attn.attn",
                dms_runtime=runtime,
                kv_cache=kv_cache,
                projection=self.projection,
                num_heads=HEADS * GROUP,
                num_kv_heads=HEADS,
                head_size=HEAD_DIM,
            )
            for index in range(self.num_layers)
        }

    def prepare(self, requests: list[Request], first: int = 0) -> None:
        """The step of ``requests``, which are those from number ``first`` on."""
        counts = torch.tensor([request.tokens for request in requests])
        ends = torch.tensor([sum(request) for request in requests])
        tables = torch.tensor(self.first_blocks[first : first + len(requests)])
        chunks = [(i, r.stored) for i, r in enumerate(requests) if r.tokens > 1]
        int32 = {"dtype": torch.int32, "device": self.device}
        self.batch = Batch(
            num_reqs=len(requests),
            num_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            block_table=tables.unsqueeze(1).to(**int32),
            query_start=torch.cat((counts[:1] * 0, counts.cumsum(0))).to(**int32),
            seq_lens=ends.to(**int32),
            first_chunk=min((i for i, _ in chunks), default=0),
            max_stored=max((stored for _, stored in chunks), default=0),
            may_decode=bool((counts == 1).any()),
        )
        positions = torch.cat([torch.arange(r.stored, sum(r)) for r in requests])
        self.positions = positions.to(self.device)
        width = HEADS * (GROUP + 2) * HEAD_DIM
        kind = {"dtype": torch.bfloat16, "device": self.device}
        self.qkv = torch.randn(self.batch.num_tokens, width, **kind)

    def restore(self) -> None:
        """Take back what the step appended."""
        for tensor, before in zip(self._appended, self._saved, strict=True):
            tensor.copy_(before)

    @contextmanager
    def served(self) -> Iterator[Callable[[], None]]:
        """What runs all layers of the step, each by its op."""
        names = dict.fromkeys(self.layers, DMSMetadata(self.batch))
        context = ForwardContext(self.layers, names, {})
        with override_forward_context(context):
            yield self._run_layers

    def _run_layers(self) -> None:
        for layer in self.layers.values():
            DMSAttention.forward_projection(layer, self.qkv, self.positions, None)

    def run(self) -> None:
        with self.served() as run_layers:
            run_layers()

    @contextmanager
    def watched(self, timed: Callable[[str, Callable[[], None]], None]) -> Iterator[None]:
        """``timed(part, work)`` is called for each part of a layer, in place of the work."""
        ops, saved = self.ops, {}
        for name, part in PARTS.items():
            saved[name] = work = getattr(ops, name)

            def run(
                *args: Any, part: str = part, work: Callable[..., None] = work, **named: Any
            ) -> None:
                timed(part, lambda: work(*args, **named))

            setattr(ops, name, run)
        try:
            yield
        finally:
            for name in saved:
                delattr(ops, name)
