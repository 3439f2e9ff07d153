"""How vLLM sizes the cache: one spec for all layers, in true bytes."""

from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.config import DMSConfig

logger = init_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DMSCacheSpec(AttentionSpec):
    """One layer's share of a block. Equal for all layers, so that they form one KV cache group.

    ``page_size_bytes`` (vLLM's word; nothing to do with our pages) follows from the base class:
    block_size tokens x KV heads x ``state_content_bytes``, the bytes of one slot. Times the
    number of layers it is `ArenaLayout.block_bytes`, and every page of a block may go to any layer
    and head of the request that owns the block.
    """

    dcp_sharded: bool = False
    layout: ArenaLayout
    max_num_seqs: int  # requests that can hold blocks at once: state indices 1..max_num_seqs
    max_chunk_tokens: int  # most tokens of one request in one step
    num_ranks: int = 1  # tensor-parallel ranks, each with an arena of this layout
    reserve_compression: float = 1.0  # compression that the max_model_len check may count on

    @property
    def prefix_cacheable(self) -> bool:
        return False  # blocks hold what one request kept, not a range of positions

    @property
    def uses_slot_mapping(self) -> bool:
        return False  # a token's slot is found on the device

    def dense_pages(self, num_tokens: int) -> int:
        """Pages of a request of which nothing is evicted."""
        return self.layout.num_rows * cdiv(num_tokens, self.layout.page_size)

    def dense_blocks(self, num_tokens: int) -> int:
        return cdiv(self.dense_pages(num_tokens), self.layout.pages_per_block)

    def max_blocks(self, max_model_len: int) -> int:
        """Blocks that the pool must have so that one request of ``max_model_len`` can run alone.

        Counting on compression still needs a whole chunk beside the survivors, because a chunk's
        survivors are known only after it ran.
        """
        dense = self.dense_blocks(max_model_len)
        chunk = self.dense_blocks(min(self.max_chunk_tokens, max_model_len))
        return min(dense, int(-(-dense // self.reserve_compression)) + chunk)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        model = vllm_config.model_config
        max_model_len = model.max_model_len
        if max_model_len < self.layout.max_model_len and model.original_max_model_len != -1:
            # vLLM looks for a length that fits, to name it in the error that comes next.
            logger.error_once("%s", self._explain_need())
        return self.max_blocks(max_model_len) * self.page_size_bytes

    def _explain_need(self) -> str:
        max_model_len = self.layout.max_model_len
        dense = self.dense_blocks(max_model_len)
        chunk = self.dense_blocks(min(self.max_chunk_tokens, max_model_len))
        return (
            f"The KV cache is too small for one request of --max-model-len {max_model_len}: with "
            f"DMS it may need {self.max_blocks(max_model_len)} blocks of {self.layout.block_bytes} "
            f"bytes and a null block. That counts on reserve_compression "
            f"{self.reserve_compression:g}: {dense} blocks if nothing is evicted, at least {chunk} "
            "for a chunk. Lower --max-model-len or --max-num-batched-tokens, raise "
            "--gpu-memory-utilization or --kv-cache-memory-bytes, or raise reserve_compression in "
            "--additional-config to what your checkpoint is sure to reach."
        )

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Rows of pages are rounded up one by one, so a page longer than a block adds some.
        return max(self.dense_blocks(max_len), cdiv(max_len, self.block_size))

    def copy_with_new_block_size(self, block_size: int) -> Self:
        layout = replace(self.layout, block_size=block_size)
        return replace(self, block_size=block_size, layout=layout)


def make_spec(vllm_config: VllmConfig, config: DMSConfig, layout: ArenaLayout) -> DMSCacheSpec:
    scheduler = vllm_config.scheduler_config
    return DMSCacheSpec(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_dim,
        dtype=layout.storage.dtype,
        state_content_bytes=layout.slot_bytes,
        layout=layout,
        max_num_seqs=scheduler.max_num_seqs,
        max_chunk_tokens=scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
        num_ranks=vllm_config.parallel_config.tensor_parallel_size,
        reserve_compression=config.reserve_compression,
    )
