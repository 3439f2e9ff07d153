"""The operations on the arena, as an interface bound to one worker's state, rule and scale.

One implementation in plain PyTorch (`torch_ops`: CPU, and the truth the kernels are tested
against) and one in Triton (`triton_ops`). A step is

    begin_step      once, before its first layer: what is planned from the batch alone

then for each layer, in order,

    store           survivors of the tokens that leave the window in this step are appended;
                    requests with one query token also write it to the ring
    prefill         requests with several query tokens attend: survivors without a mask, then
                    ring and chunk by position and verdict (or, where there is a `flash.Flash`, to
                    the chunk first; other requests' output is then anything until `decode`)
    store_window    their last W + 1 tokens go to the ring
    decode          requests with one query token attend to all their live slots, without a mask

all of which `attend_projection` does, in fewer launches, of what is still to be normed and rotated;
and after the last layer `report` counts pages for the scheduler.

Shapes: T query tokens, H KV heads of this rank, G query heads per KV head, D channels.
``query``/``output`` [T, H * G, D], ``key``/``value`` [T, H, D], ``alpha`` [T, H] in the model's
dtype: the value whose scaled and shifted sign is the decision (`reference.decide`).
"""

from typing import Protocol

import torch

from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.backend.projection import Projection
from vllm_dms.backend.state import ArenaState, Batch


class Ops(Protocol):
    """Nothing here synchronizes with the host or allocates after start-up on CUDA (FlashAttention
    does, in steps that no graph holds), so a CUDA graph can hold all of it: `begin_step` as well,
    which is why the first layer calls it and not what prepares the step outside the graph."""

    def warm_up(self, dtype: torch.dtype, projection: Projection | None) -> None:
        """Whatever the first call of an operation would wait for; ``dtype``: the model's. The null
        state alone is touched."""

    def begin_step(self, batch: Batch) -> None: ...

    def store(
        self,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None: ...

    def prefill(
        self,
        batch: Batch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None: ...

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None: ...

    def decode(
        self, batch: Batch, layer: int, query: torch.Tensor, output: torch.Tensor
    ) -> None: ...

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
        """`projection.project`, then `attend`. ``alpha`` None: borrowed; ``output``
        [T, H * G * D]. What nothing reads of the projected need not be in ``rotated``."""

    def report(self, out: torch.Tensor) -> None:
        """`report` below."""


def attend(
    ops: Ops,
    batch: Batch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alpha: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """A layer's step, after `begin_step`: store the tokens, then attend."""
    ops.store(batch, layer, key, value, alpha)
    if batch.max_query_len > 1:
        ops.prefill(batch, layer, query, key, value, output)
        ops.store_window(batch, layer, key, value)
    if batch.may_decode:
        ops.decode(batch, layer, query, output)


def report(state: ArenaState, out: torch.Tensor) -> None:
    """Pages each request holds and may need next, after a step.

    ``out`` int32 [num_states, REPORT_WIDTH], columns as in `arena.report`.
    """
    size = state.layout.page_size
    live = state.live.flatten(1)
    out[:, 0] = state.pages_used
    pages = (live + size - 1) // size
    for k in range(1, REPORT_HORIZON + 1):
        out[:, k] = ((live + k + size - 1) // size - pages).sum(1)
    out[:, -1] = live.sum(1)
