"""What the Triton operations share, and those of them that write the arena (`triton_ops`)."""

import torch
import triton
from triton.language import constexpr

from vllm_dms.backend.kernels.arguments import (
    check,
    make_geometry,
    make_requests,
    make_state_args,
)
from vllm_dms.backend.kernels.common import Geometry
from vllm_dms.backend.kernels.launch import Launcher, kind_of
from vllm_dms.backend.kernels.project import project_kernel, project_token_kernel
from vllm_dms.backend.kernels.schedule import Schedule
from vllm_dms.backend.kernels.store import store_token_kernel
from vllm_dms.backend.kernels.store_chunk import (
    store_copy_kernel,
    store_plan_kernel,
    store_window_kernel,
)
from vllm_dms.backend.kernels.tuning import Tuning
from vllm_dms.backend.projection import Attended, Projection, views
from vllm_dms.backend.state import ArenaState, Batch, Scratch
from vllm_dms.config import DMSConfig

PLAN_TOKENS = 1024  # tokens that the plan kernel looks at together
QUERY_HEADS = 16  # that a program rotates


class TritonStore:
    """Everything that a launch passes on is bound once: arguments that vary come first."""

    def __init__(
        self,
        state: ArenaState,
        scratch: Scratch,
        config: DMSConfig,
        schedule: Schedule,
        tuning: Tuning,
        overlap: bool,
    ) -> None:
        layout = state.layout
        assert layout.window > 0
        self.state, self.scratch, self.schedule = state, scratch, schedule
        self.tuning = tuning
        self.device = state.live.device
        self.heads = layout.num_kv_heads
        self.head_dim = layout.head_dim
        self.group = schedule.partial_sum.shape[1]
        self.max_tokens = scratch.evict.shape[0]
        self.max_num_seqs = schedule.N // self.heads
        self._batch: Batch | None = None
        sizes = make_geometry(layout, self.max_num_seqs, tuning)
        self._geo = Geometry(*map(constexpr, sizes))
        self._bound = (make_state_args(state, sizes), make_requests(sizes, self.device))
        self._bind_stores(config, overlap)
        self._config, self._overlap = config, overlap
        self._project: tuple[Launcher, Launcher] | None = None

    def _store_options(self, overlap: bool) -> dict[str, bool]:
        # What is rounded twice stays two operations.
        return {"enable_fp_fusion": False, **({"launch_pdl": True} if overlap else {})}

    def _bind_stores(self, config: DMSConfig, overlap: bool) -> None:
        geo, block = self._geo, self.tuning.copy_block
        options = self._store_options(overlap)
        rule = (config.alpha_scale, config.alpha_offset, geo)
        switches = (triton.next_power_of_2(self.heads), config.shift, config.evict)
        survivors, evict = self.scratch.num_survivors, self.scratch.evict
        self._store_token = Launcher(
            store_token_kernel, *self._bound, *rule, *switches, overlap, **options
        )
        self._store_plan = Launcher(
            store_plan_kernel, *self._bound, survivors, evict, *rule, *switches, PLAN_TOKENS,
            overlap, **options,
        )  # fmt: skip
        self._store_copy = Launcher(
            store_copy_kernel, *self._bound, survivors, evict, geo, block, overlap, **options
        )
        self._store_window = Launcher(
            store_window_kernel, *self._bound, evict, geo, block, overlap, **options
        )

    def _bind_project(self, eps: float) -> tuple[Launcher, Launcher]:
        """Of single tokens, with their store, and of chunks; ``eps`` is the same in all layers."""
        config, geo, overlap = self._config, self._geo, self._overlap
        num_heads, pad = self.heads * self.group, triton.next_power_of_2(self.heads)
        heads = min(QUERY_HEADS, triton.next_power_of_2(num_heads))
        zero = (config.zero != "never", config.zero == "both")
        how = (self.group, heads, *zero, config.alpha_per == "layer", pad)
        rule, options = (config.alpha_scale, config.alpha_offset), self._store_options(overlap)
        self._parts = 1 + triton.cdiv(num_heads, heads)
        token = Launcher(
            project_token_kernel, *self._bound, *rule, geo, eps, *how, config.shift, config.evict,
            overlap, **options,
        )  # fmt: skip
        return token, Launcher(project_kernel, geo, eps, *how, overlap, **options)

    def _begin_stores(self, batch: Batch) -> None:
        """What is the same in all layers of a step."""
        self._batch = batch
        self._copy_grid = self._flat_grid(batch, self.tuning.copy_block)
        # Whether a chunk may push a token out of its window.
        self._pushes_out = batch.max_stored + batch.max_query_len > self.state.layout.ring_size

    def store_projection(
        self,
        batch: Batch,
        layer: int,
        projection: Projection,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        alpha: torch.Tensor | None,
        rotated: torch.Tensor,
    ) -> Attended:
        self._check_step(batch)
        if self._project is None:
            self._project = self._bind_project(projection.eps)
        if positions.shape[0] != qkv.shape[0]:
            check("positions of the projection's tokens", positions.shape[0], qkv.shape[0])
        out = views(qkv, rotated, self.heads, self.group, self.head_dim)
        cache = projection.rotary.cos_sin_cache
        strides = (0, 0) if alpha is None else alpha.stride()
        kind = source, target, _, _ = kind_of(qkv), kind_of(rotated), kind_of(cache), alpha is None
        arguments = (
            qkv, source[0], positions, alpha, *strides, projection.q_norm, projection.k_norm,
            cache, rotated, target[0],
        )  # fmt: skip
        if batch.max_query_len == 1:
            self._project[0]((batch.num_reqs, self._parts), kind, *arguments, layer)
        else:
            self._project[1]((batch.num_tokens, self._parts), kind, *arguments)
            self.store(batch, layer, out.key, out.value, out.alpha)
        return out

    def store(
        self,
        batch: Batch,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
    ) -> None:
        self._check_step(batch)
        k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
        if alpha.shape[1] != self.heads:
            check("alpha's heads", alpha.shape[1], self.heads)
        arguments = (key, value, alpha, k[0], v[0], *alpha.stride(), layer)
        if batch.max_query_len == 1:
            self._store_token((batch.num_reqs, 1), (k, v), *arguments)
            return
        self._store_plan((batch.num_reqs, self.heads), (k, v), *arguments)
        if self._pushes_out:
            self._store_copy(self._copy_grid, (k, v), key, value, k[0], v[0], batch.num_reqs, layer)

    def store_window(
        self, batch: Batch, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check_step(batch)
        k, v = self._kind("key", key, self.heads), self._kind("value", value, self.heads)
        self._store_window(self._copy_grid, (k, v), key, value, k[0], v[0], batch.num_reqs, layer)

    def _check_step(self, batch: Batch) -> None:
        assert batch is self._batch, "begin_step of this batch comes first"

    def _kind(self, name: str, x: torch.Tensor, heads: int) -> tuple[int, bool]:
        """`kind_of` x [T, heads, D], whose heads lie side by side."""
        stride, of_head, of_channel = x.stride()
        _, found, dim = x.shape
        # Quick, as it is asked hundreds of times a step. A tensor of a CPU Triton refuses itself.
        if found != heads or of_head != dim or of_channel != 1 or dim != self.head_dim:
            check(f"shape of {name}", (found, dim), (heads, self.head_dim))
            check(f"strides of {name}'s heads", (of_head, of_channel), (dim, 1))
        return stride, x.data_ptr() % 16 == 0

    def _flat_grid(self, batch: Batch, block: int) -> tuple[int, int]:
        """Blocks of tokens as `find_request` counts them, times heads."""
        return batch.num_tokens // block + batch.num_reqs, self.heads
