"""States that are kept for requests to come: where they are, how they are found, how they go.

A state is that of a request at some number of tokens (see `backend.snapshots`). Its blocks are in
vLLM's free queue, with no owner, so that they count as free and cost nobody anything. The pool
hands out what is at the front of its queue: first blocks that nothing is in, then those of the
states, least recently used first. A state is of use as long as it has all its blocks; the rest of
one that lost some goes to the front. States may give way, to their own continuation say: then they
go before others (`make_room`).

A state is named by vLLM's hash of its last full block, which covers all tokens before it, salt,
adapter and media included, and by the tokens after it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, generate_block_hash_extra_keys
from vllm.v1.request import Request

from vllm_dms.arena.report import Usage
from vllm_dms.core.records import Mark, Step

# Where a state was kept: at the end of a prompt or of a request, or where prompts diverged.
PROMPT, END, BRANCH = "prompt", "end", "branch"


class Key(NamedTuple):
    parent: bytes | None  # hash of the last full block
    tail: tuple[int, ...]  # tokens after it
    extra: Any  # what else tells such tokens apart; the hash has it for those before


def key_of(request: Request, num_tokens: int, block_size: int) -> Key:
    """The name of a request's first ``num_tokens`` tokens, which must be known."""
    num_blocks = num_tokens // block_size
    start = num_blocks * block_size
    parent = request.block_hashes[num_blocks - 1] if num_blocks else None
    if start == num_tokens:
        return Key(parent, (), None)
    extra, _ = generate_block_hash_extra_keys(request, start, num_tokens, 0)
    return Key(parent, tuple(request.all_token_ids[start:num_tokens]), extra)


@dataclass(eq=False)
class Kept:
    key: Key
    num_tokens: int
    blocks: list[KVCacheBlock]  # in the order of a request's row
    record: list[KVCacheBlock]
    mark: Mark | None  # what a report said of the state; None until it arrives
    kind: str  # where in its request it was kept
    before: tuple["Kept", ...] = field(repr=False)  # states that its request went on from, or left
    hits: int = 0

    @property
    def size(self) -> int:
        return len(self.blocks) + len(self.record)


class Hit(NamedTuple):
    """What a request goes on from."""

    kept: Kept
    num_tokens: int  # that it need not compute: of a state of all its tokens, all but the last

    @property
    def again(self) -> int:
        """Position of a token that it stores although the state has it, or -1."""
        return self.num_tokens if self.num_tokens < self.kept.num_tokens else -1


class KeptStates:
    def __init__(self, pool: BlockPool, block_size: int, pages_per_block: int) -> None:
        self._pool = pool
        self._block_size, self.pages_per_block = block_size, pages_per_block
        self._by_key: dict[Key, Kept] = {}
        # By the parents of keys: how many states have tails of which lengths.
        self._tails: dict[bytes | None, Counter[int]] = {}
        self._owner: dict[int, Kept] = {}  # by block id
        # By state index and its tenancy: kept, but how many of their blocks they need is unknown.
        self._pending: list[tuple[int, int, Kept]] = []
        self._broken: list[Kept] = []  # the pool handed out some of their blocks
        self._giving_way: dict[Kept, None] = {}  # in this order
        self._num_pinned = 0  # blocks

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def states(self) -> list[Kept]:
        return list(self._by_key.values())

    @property
    def num_blocks(self) -> int:
        return len(self._owner)

    def find(self, request: Request, limit: int) -> Kept | None:
        """The longest state of at most ``limit`` tokens that the request begins with."""
        hashes, size = request.block_hashes, self._block_size
        for i in range(min(limit // size, len(hashes)) if self._tails else -1, -1, -1):
            for tail in sorted(self._tails.get(hashes[i - 1] if i else None, ()), reverse=True):
                num_tokens = i * size + tail
                if num_tokens <= limit:
                    kept = self.get(key_of(request, num_tokens, size))
                    if kept is not None:
                        return kept
        return None

    def get(self, key: Key) -> Kept | None:
        return self._by_key.get(key)

    def add(self, kept: Kept, state: int, tenancy: int) -> None:
        """Keep a state whose blocks have an owner; from now on they have none. How many of them it
        needs is known at once, or with the report of what ``state`` is at ``kept.num_tokens``."""
        assert kept.key not in self._by_key, "kept twice"
        self._by_key[kept.key] = kept
        self._tails.setdefault(kept.key.parent, Counter())[len(kept.key.tail)] += 1
        for block in (*kept.blocks, *kept.record):
            assert block.block_id not in self._owner
            self._owner[block.block_id] = kept
        self._release(kept)
        if kept.mark is None:
            self._pending.append((state, tenancy, kept))
        else:
            self._trim(kept)

    def resolve(self, step: Step, usage: Usage) -> None:
        """A report arrived: of states kept as they are after its step."""
        waiting, self._pending = self._pending, []
        for state, tenancy, kept in waiting:
            if not self.has(kept):
                continue
            here = (step.states == state) & (step.tenancies == tenancy)
            index = np.flatnonzero(here & (step.ends == kept.num_tokens))
            if len(index):
                i = index.item()
                kept.mark = Mark(kept.num_tokens, usage.fullest[i].copy(), usage.live.item(i))
                self._trim(kept)
            else:
                self._pending.append((state, tenancy, kept))

    def has(self, kept: Kept) -> bool:
        return self._by_key.get(kept.key) is kept

    def pin(self, kept: Kept) -> None:
        """It is about to be used: its blocks are not for the pool to hand out, until `unpin`."""
        self._giving_way.pop(kept, None)
        self._pool.touch([*kept.blocks, *kept.record])
        self._num_pinned += kept.size

    def unpin(self, kept: Kept) -> None:
        """It was used: others go before it."""
        self._num_pinned -= kept.size
        self._release(kept)

    def take_over(self, kept: Kept) -> list[KVCacheBlock]:
        """The blocks of a pinned state, for a request to own; it is kept no longer."""
        self._num_pinned -= kept.size
        self._forget(kept)
        self._pool.free_blocks(kept.record)
        return kept.blocks

    def give_way(self, kept: Kept) -> None:
        """It goes before all others, but until then it is kept."""
        if self.has(kept):
            self._giving_way[kept] = None

    def make_room(self, count: int) -> bool:
        """To be called before the pool hands out ``count`` blocks: states that give way do it now,
        as far as that is needed. Whether all other states stay."""
        while (empty := self._num_empty) < count and self._giving_way:
            self._drop(next(iter(self._giving_way)))
        return empty >= count

    @property
    def _num_empty(self) -> int:
        """Free blocks that nothing is in."""
        return self._pool.get_num_free_blocks() - self.num_blocks + self._num_pinned

    def clear(self) -> None:
        for kept in self.states:
            self._drop(kept)

    def settle(self) -> None:
        """To be called when the pool has handed out blocks: nobody needs the rest of the states
        that they are of."""
        broken, self._broken = self._broken, []
        for kept in broken:
            rest = [b for b in (*kept.blocks, *kept.record) if self._owner.get(b.block_id) is kept]
            for block in rest:
                del self._owner[block.block_id]
            self._to_front(rest)

    def _release(self, kept: Kept) -> None:
        self._pool.unpin_blocks([*kept.blocks, *kept.record], self._handed_out)

    def _handed_out(self, block: KVCacheBlock) -> None:
        kept = self._owner.pop(block.block_id, None)
        if kept is None:
            return  # kept once, and no longer
        if self.has(kept):
            self._drop_from_index(kept)
            self._broken.append(kept)

    def _trim(self, kept: Kept) -> None:
        assert kept.mark is not None
        needed = -(-kept.mark.num_pages // self.pages_per_block)
        assert needed <= len(kept.blocks), (needed, len(kept.blocks))
        surplus = kept.blocks[needed:]
        del kept.blocks[needed:]
        for block in surplus:
            del self._owner[block.block_id]
        self._to_front(surplus)

    def _drop(self, kept: Kept) -> None:
        self._forget(kept)
        self._to_front([*kept.blocks, *kept.record])

    def _forget(self, kept: Kept) -> None:
        self._drop_from_index(kept)
        for block in (*kept.blocks, *kept.record):
            del self._owner[block.block_id]

    def _drop_from_index(self, kept: Kept) -> None:
        self._giving_way.pop(kept, None)
        parent, tail, _ = kept.key
        del self._by_key[kept.key]
        tails = self._tails[parent]
        tails[len(tail)] -= 1
        if not tails[len(tail)]:
            del tails[len(tail)]
        if not tails:
            del self._tails[parent]

    def _to_front(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Of the queue of free blocks, where these are already."""
        blocks = list(blocks)
        self._pool.touch(blocks)
        self._pool.free_blocks(blocks)
