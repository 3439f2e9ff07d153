"""vLLM's FlashAttention 3 for what is plain in prefill: a chunk's attention to itself.

A query sees all of its window, and of its own chunk nothing older counts here: survivors are read
where they are stored (`kernels.prefill_stored`). Without eviction it sees all of the chunk.
"""

from collections.abc import Callable
from typing import Any

import torch

MAX_HEAD_DIM = 256  # of FlashAttention 3


# (query, key, value, starts, longest, window, output) -> log of sums; `FlashAttention3` says what.
Flash = Callable[..., torch.Tensor]


class FlashAttention3:
    """vLLM's own kernel."""

    def __init__(self, function: Any, scale: float) -> None:
        self._function, self._scale = function, scale

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        window: int,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Causal attention of each request to its own query tokens, up to ``window`` before each;
        -1: to all. ``starts`` int32 [requests + 1], first query tokens and the end; ``longest``
        bounds their lengths. Writes ``output``; returns the natural logarithm of each query's sum
        of weights, float32 [H * G, T]. Shapes as in `ops`."""
        # One split: more would allocate a copy of the output for each.
        _, lse = self._function(
            query, key, value, longest, starts, longest, starts, softmax_scale=self._scale,
            causal=True, window_size=(window, 0 if window >= 0 else -1), out=output,
            return_softmax_lse=True, num_splits=1, fa_version=3,
        )  # fmt: skip
        return lse


def find_flash(
    head_dim: int, dtype: torch.dtype, scale: float, device: torch.device
) -> FlashAttention3:
    """ValueError where vLLM would not use FlashAttention 3 itself. Asks vLLM's current config, so
    that `--attention-config.flash_attn_version` holds here as well."""
    fits = device.type == "cuda" and dtype.itemsize == 2
    if fits and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM:
        from vllm.v1.attention.backends import fa_utils

        if fa_utils.get_flash_attn_version(head_size=head_dim) == 3:
            return FlashAttention3(fa_utils.flash_attn_varlen_func, scale)
    raise ValueError(
        '"kernels" is "flash" in "dms" in --additional-config, but vLLM has no FlashAttention 3 '
        f"for {dtype} and a head_dim of {head_dim} here ({device.type}): it takes a Hopper "
        'GPU, fp16 or bf16, and --attention-config.flash_attn_version unset or 3. Remove "kernels".'
    )
