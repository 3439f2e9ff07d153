"""The attention layer and backend that vLLM sees.

vLLM's own attention op has no argument for a decision, so a DMS layer has ops of its own
(`attention_ops`), which `gates.configure` adds to vLLM's splitting ops.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_layout import KVCacheLayout

import vllm_dms.backend.attention_ops  # noqa: F401 registers torch.ops.vllm_dms.attention
from vllm_dms.arena.spec import DMSCacheSpec, make_spec
from vllm_dms.backend.projection import Projection, rotated_width
from vllm_dms.backend.runtime import Runtime
from vllm_dms.backend.state import Batch
from vllm_dms.compat import check_hooks
from vllm_dms.config import DMSConfig


@dataclass(frozen=True)
class DMSMetadata(AttentionMetadata):
    batch: Batch


class DMSMetadataBuilder(AttentionMetadataBuilder[DMSMetadata]):
    """Only references: the connector writes the request state after this ran."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # abstract in the base class
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DMSMetadata:
        common = common_attn_metadata
        first_chunk, max_stored, may_decode = chunks(common)
        batch = Batch(
            num_reqs=common.num_reqs,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            block_table=common.block_table_tensor,
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            first_chunk=first_chunk,
            max_stored=max_stored,
            may_decode=may_decode,
        )
        return DMSMetadata(batch)


def chunks(common: CommonAttentionMetadata) -> tuple[int, int, bool]:
    """`first_chunk`, `max_stored` and `may_decode` of `Batch`."""
    if common.max_query_len == 1:
        return 0, 0, True
    counts = common.query_start_loc_cpu[: common.num_reqs + 1].diff()
    several = counts > 1
    max_stored, ends = Batch.max_stored, common.seq_lens_cpu_upper_bound
    if ends is not None:
        max_stored = int(((ends[: common.num_reqs] - counts) * several).max())
    return int(several.int().argmax()), max_stored, bool((counts == 1).any())


class DMSCompactAttentionImpl(AttentionImpl[DMSMetadata]):
    """What vLLM asks of an implementation; attention itself is in `attention_ops`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        unsupported = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "a logits soft cap": logits_soft_cap,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
            "attention other than a decoder's": attn_type != AttentionType.DECODER or None,
        }
        for what, value in unsupported.items():
            if value is not None:
                raise ValueError(
                    f"--kv-cache-dtype dms does not support {what}: its pages hold plain causal "
                    "keys. Serve this model with --kv-cache-dtype auto."
                )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DMSMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError("DMS attention takes a decision: see `attention_ops`")


class DMSCompactAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DMSCompactAttentionImpl]:
        return DMSCompactAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DMSMetadataBuilder]:
        return DMSMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost: a block is one byte range, whose pages any layer and head may take."""
        return (KVCacheLayout.BLHNC,)


class DMSAttention(Attention):
    """vLLM's attention layer with a decision beside query, key and value."""

    def __init__(self, *args: Any, prefix: str, **kwargs: Any) -> None:
        vllm_config = get_current_vllm_config()
        layers = vllm_config.compilation_config.static_forward_context
        first = next((layer for layer in layers.values() if isinstance(layer, DMSAttention)), None)
        super().__init__(*args, prefix=prefix, attn_backend=DMSCompactAttentionBackend, **kwargs)
        self.projection: Projection | None = None  # set where `forward_projection` is called
        self.layer_index = sum(isinstance(layer, DMSAttention) for layer in layers.values()) - 1
        if first is None:
            check_hooks()
            config = DMSConfig.from_dict(vllm_config.additional_config["dms"])
            device = torch.device(vllm_config.device_config.device_type)
            self.dms_runtime = Runtime(vllm_config, config, device, self.impl.scale)
        else:
            self.dms_runtime = first.dms_runtime
        if self.impl.scale != self.dms_runtime.scale:
            raise ValueError(
                f"{prefix} has the softmax scale {self.impl.scale} and the first layer "
                f"{self.dms_runtime.scale}, but DMS has one for all layers. Serve this model with "
                "--kv-cache-dtype auto."
            )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> DMSCacheSpec:
        return make_spec(vllm_config, self.dms_runtime.config, self.dms_runtime.layout)

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor
    ) -> torch.Tensor:
        """``query`` [T, H * G * D], ``key`` and ``value`` [T, H * D], ``alpha`` [T, H]."""
        output = torch.empty_like(query)
        torch.ops.vllm_dms.attention(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            alpha,
            output.view(-1, self.num_heads, self.head_size),
            self.layer_name,
        )
        return output

    def set_projection(self, projection: Projection) -> None:
        """The layer's norms and RoPE, once, before the first `forward_projection`."""
        first = self.dms_runtime.projection or projection
        if projection.eps != first.eps:
            raise ValueError(
                f"{self.layer_name} norms queries and keys with an epsilon of {projection.eps} and "
                f"the first layer with {first.eps}, but DMS has one for all layers. Serve this "
                "model with --kv-cache-dtype auto."
            )
        self.projection, self.dms_runtime.projection = projection, first

    def forward_projection(
        self, qkv: torch.Tensor, positions: torch.Tensor, alpha: torch.Tensor | None
    ) -> torch.Tensor:
        """``qkv`` [T, (H * G + 2 * H) * D], still to be normed and rotated; ``alpha`` None:
        borrowed from it."""
        group = self.num_heads // self.num_kv_heads
        width = rotated_width(self.num_kv_heads, group, self.head_size)
        rotated = qkv.new_empty(qkv.shape[0], width)
        output = qkv.new_empty(qkv.shape[0], self.num_heads * self.head_size)
        torch.ops.vllm_dms.attention_of_projection(
            qkv, positions, alpha, rotated, output, self.layer_name
        )
        return output


# The one free name, and one that every process can unpickle. Not before a DMS model is served: it
# may be another plugin's.
register_backend(
    AttentionBackendEnum.CUSTOM, f"{__name__}.{DMSCompactAttentionBackend.__qualname__}"
)
