"""The operations on the arena as Triton kernels: checks, grids, arguments.

Nothing is read back or, but for FlashAttention's log-sum-exp, allocated per call, and grids depend
only on the batch's host-side numbers, so every operation can be captured in a CUDA graph.
"""

import itertools

import torch
import triton

from vllm_dms.backend.kernels.arguments import check
from vllm_dms.backend.kernels.launch import Launcher, Rows, rows_at
from vllm_dms.backend.kernels.project import project_kernel, project_token_kernel
from vllm_dms.backend.kernels.project_window import project_window_kernel
from vllm_dms.backend.projection import Projection, offsets, rotated_width, views
from vllm_dms.backend.state import Batch
from vllm_dms.backend.triton_attention import TritonAttention

QUERY_HEADS = 16  # that a program rotates


class TritonOps(TritonAttention):
    """`ops.Ops` on a GPU."""

    _project: dict[str, Launcher] | None = None

    def _bind_project(self, eps: float) -> dict[str, Launcher]:
        """Of single tokens, with their store; of chunks; of chunks with their store, if they fit
        into the window. ``eps`` is the same in all layers."""
        config, geo, overlap = self._config, self._geo, self._overlap
        num_heads, pad = self.heads * self.group, triton.next_power_of_2(self.heads)
        heads = min(QUERY_HEADS, triton.next_power_of_2(num_heads))
        zero = (config.zero != "never", config.zero == "both")
        how = (geo, eps, self.group, heads, *zero, config.alpha_per == "layer", pad)
        rule = (config.alpha_scale, config.alpha_offset, *how, config.shift, config.evict, overlap)
        survivors, options = self.scratch.num_survivors, self._store_options
        self._parts = 1 + triton.cdiv(num_heads, heads)
        return {
            "token": Launcher(project_token_kernel, *self._bound, *rule, **options),
            "chunk": Launcher(project_kernel, *how, overlap, **options),
            "window": Launcher(project_window_kernel, *self._bound, survivors, *rule, **options),
        }

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
        self._check_step(batch)
        source, target, sink = self._check_projection(qkv, positions, rotated, output)
        x, r, size = qkv.data_ptr(), rotated.data_ptr(), qkv.element_size()
        keys, after = offsets(self.heads, self.group, self.head_dim)
        # Where `projection.views` has them: to make these tensors costs as much as the launches.
        query, key = rows_at(rotated, r, target), rows_at(rotated, r + keys * size, target)
        value = rows_at(qkv, x + after * size, source)
        out = rows_at(output, output.data_ptr(), sink)

        if batch.max_query_len == 1:
            self._launch_project("token", batch, projection, qkv, positions, alpha, rotated, layer)
        elif self._in_window:
            how = (batch.num_reqs, layer)
            self._launch_project("window", batch, projection, qkv, positions, alpha, rotated, *how)
            self._attend_chunks(batch, layer, qkv, rotated, output, (query, key, value, out))
        else:
            self._launch_project("chunk", batch, projection, qkv, positions, alpha, rotated)
            decision = rows_at(rotated, r + after * size, target)
            self._launch_store(batch, layer, key, value, decision, of_head=1)
            self._attend_chunks(batch, layer, qkv, rotated, output, (query, key, value, out))
            self._launch_window(batch, layer, key, value)
        if batch.may_decode:
            self._launch_decode(layer, query, out)

    def _check_projection(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotated: torch.Tensor,
        output: torch.Tensor,
    ) -> tuple[int, int, int]:
        """The distances of rows of qkv, rotated and output."""
        (source, a), (target, b), (sink, c) = qkv.stride(), rotated.stride(), output.stride()
        # Quick, as it is asked hundreds of times a step.
        if (a, b, c) != (1, 1, 1):
            check("strides in a row of the projection, rotated and output", (a, b, c), (1, 1, 1))
        if positions.shape[0] != qkv.shape[0]:
            check("positions of the projection's tokens", positions.shape[0], qkv.shape[0])
        if positions.dtype != torch.int64:
            check("dtype of the positions", positions.dtype, torch.int64)
        for x in (qkv, positions, rotated, output):
            if x.device != self.device:
                check("device of a projection's tensors", x.device, self.device)
        return source, target, sink

    def _launch_project(
        self,
        name: str,
        batch: Batch,
        projection: Projection,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        alpha: torch.Tensor | None,
        rotated: torch.Tensor,
        *numbers: int,
    ) -> None:
        if self._project is None:
            self._project = self._bind_project(projection.eps)
        q_norm, k_norm, _, rotary = projection
        cos_sin = rotary.cos_sin_cache
        near = (qkv, positions, alpha, q_norm, k_norm, cos_sin, rotated)
        x, c, r = qkv.data_ptr(), cos_sin.data_ptr(), rotated.data_ptr()
        may_lack = [None if y is None else y.data_ptr() for y in (alpha, q_norm, k_norm)]
        given = (0, 0) if alpha is None else alpha.stride()
        source, target = qkv.stride(0), rotated.stride(0)
        rows = batch.num_reqs if name == "token" else batch.num_tokens
        aligned = (x % 16 == 0, c % 16 == 0, r % 16 == 0)
        lacks = tuple(y is None for y in may_lack)
        self._project[name].at(
            (rows, self._parts), (source, target, aligned, lacks, cos_sin.dtype), near,
            x, positions.data_ptr(), *may_lack, c, r, source, *given, target, *numbers,
        )  # fmt: skip

    def _attend_chunks(
        self,
        batch: Batch,
        layer: int,
        qkv: torch.Tensor,
        rotated: torch.Tensor,
        output: torch.Tensor,
        rows: tuple[Rows, Rows, Rows, Rows],
    ) -> None:
        """``rows``: of query, key, value and output in those"""
        if self._flash is None:
            self._launch_prefill(batch, layer, *rows)
            return
        q, k, v, _ = views(qkv, rotated, self.heads, self.group, self.head_dim)
        self.prefill(batch, layer, q, k, v, output.view(q.shape))

    def warm_up(self, dtype: torch.dtype, projection: Projection | None) -> None:
        """Launch each kernel, for one layer of batches of one request of the null state."""
        many = Batch.max_stored
        steps = [(2, 0), (2, many), (1, many)]  # tokens, and at most so many stored before
        if self._flash is not None:  # it has a kernel of its own for what is longer than a window
            steps.append((min(self.state.layout.ring_size + 1, self.max_tokens), many))
        int32 = {"dtype": torch.int32, "device": self.device}
        for tokens, stored in steps:
            start, length = torch.arange(2, **int32) * tokens, torch.full((1,), tokens, **int32)
            table = torch.zeros(1, 1, **int32)
            batch = Batch(1, tokens, tokens, table, start, length, max_stored=stored)
            self._warm_up_step(batch, dtype, projection)

    def _warm_up_step(
        self, batch: Batch, dtype: torch.dtype, projection: Projection | None
    ) -> None:
        tokens, kind = batch.num_tokens, {"dtype": dtype, "device": self.device}
        shape = (self.heads, self.group, self.head_dim)
        qkv = torch.zeros(tokens, self.heads * (self.group + 2) * self.head_dim, **kind)
        rotated = torch.zeros(tokens, rotated_width(*shape), **kind)
        query, key, value, alpha = views(qkv, rotated, *shape)
        output = torch.zeros(tokens, self.heads * self.group * self.head_dim, **kind)
        output_heads = output.view(query.shape)
        self.begin_step(batch)
        if projection is None:
            self.store(batch, 0, key, value, alpha)
            if tokens > 1:
                self.prefill(batch, 0, query, key, value, output_heads)
                self.store_window(batch, 0, key, value)
        else:
            given = alpha if self._config.adapter else None
            positions = torch.zeros(tokens, dtype=torch.int64, device=self.device)
            how = (projection, qkv, positions, given, rotated, output)
            self.attend_projection(batch, 0, *how)
        for merges, merge in itertools.product(self._decode, self._merge.values()):
            self._decode_merges, self._merge_of_batch = merges, merge  # whatever the batch's
            self.decode(batch, 0, query, output_heads)
