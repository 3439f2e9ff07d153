"""Blocks out of vLLM's pool."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_dms.core.kept import KeptStates
from vllm_dms.core.shortage import Shortages


class Supply:
    """The one place where blocks are taken from the pool."""

    def __init__(self, pool: BlockPool, shortages: Shortages) -> None:
        self._pool, self._shortages = pool, shortages
        self.kept: KeptStates | None = None  # what may be in blocks that the pool hands out

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give."""
        return self._pool.get_num_free_blocks() - len(self._shortages.quarantine)

    def make_room(self, count: int) -> bool:
        """Whether `take` can give so many without an end of states that are of use."""
        return self.kept is None or self.kept.make_room(count + len(self._shortages.quarantine))

    def take(self, count: int) -> list[KVCacheBlock]:
        """Blocks from the pool; not those that still name a failed request."""
        self.make_room(count)
        quarantine = self._shortages.quarantine
        blocks = self._pool.get_new_blocks(count)
        if quarantine:
            held_back = [b for b in blocks if b.block_id in quarantine]
            while len(blocks) - len(held_back) < count:
                (block,) = self._pool.get_new_blocks(1)
                blocks.append(block)
                if block.block_id in quarantine:
                    held_back.append(block)
            blocks = [b for b in blocks if b.block_id not in quarantine]
            self._pool.free_blocks(held_back)
        if self.kept is not None:
            self.kept.settle()
        assert_owned(blocks)
        return blocks


def assert_owned(blocks: Iterable[KVCacheBlock]) -> None:
    for block in blocks:
        assert block.ref_cnt == 1, f"block {block.block_id} has {block.ref_cnt} owners"
