"""Prefix caching on compressed states: which states are kept, and which request goes on from one.

Kept is a request's state

at the end of its prompt    the next turn of a conversation may begin with that, not with the answer
at its end                  or with all of it
where prompts diverged      the longest prefix of whole blocks that another prompt was seen to share

The first and the last are copies, made before the step that goes on from there; at its end a
request leaves its blocks behind as they are. All of it is done as far as free blocks go.

A request all of whose tokens a state has goes on from there, too: it stores the last of them once
more, which changes nothing but gives the step a token to compute.

A request that waits while another is about to leave a state that it can go on from, waits for it.
"""

import functools
from collections.abc import Callable, Mapping

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.core.branches import Branches, Due
from vllm_dms.core.kept import BRANCH, END, PROMPT, Hit, Kept, KeptStates, key_of
from vllm_dms.core.ledger import Ledger
from vllm_dms.core.mailbox import Mailbox
from vllm_dms.core.records import Mark, Step
from vllm_dms.core.supply import Supply

# One kind of states gives way to the other if requests go on from it this much less often.
PREFERENCE = 8


class PrefixCache:
    def __init__(
        self,
        spec: DMSCacheSpec,
        pool: BlockPool,
        ledger: Ledger,
        mailbox: Mailbox,
        req_to_blocks: Mapping[str, list[KVCacheBlock]],
        supply: Supply,
    ) -> None:
        layout = spec.layout
        self._spec, self._pool, self._ledger, self._mailbox = spec, pool, ledger, mailbox
        self._req_to_blocks, self._supply = req_to_blocks, supply
        self._block_size, self._num_record_blocks = spec.block_size, layout.record_blocks
        self.kept = supply.kept = KeptStates(pool, spec.block_size, layout.pages_per_block)
        # What is worth a wait, or a chunk that ends there: less is not compressed either.
        self._worth = layout.ring_size
        self.branches = Branches(ledger, self.kept, spec.block_size, self._worth)
        self._hits: dict[str, Hit] = {}  # of waiting requests, found in this step
        self._due: list[Due] = []
        self._ending: dict[str, Request] = {}
        self._lineage: dict[str, tuple[Kept, ...]] = {}  # states that a request went on from
        self._went_on = dict.fromkeys((PROMPT, END, BRANCH), 0)  # how often requests did
        self._valid_from = 0  # tenancies of before hold what must not be kept

    # Requests come and go.

    def finishes(self, request: Request) -> None:
        """It is about to give up its blocks for good; `leave` may keep them."""
        request_id = request.request_id
        self.branches.forget(request_id)
        self._hits.pop(request_id, None)
        if request.status in (RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED):
            self._lineage.pop(request_id, None)
        else:
            self._ending[request_id] = request

    def starts(self, request_id: str, state: int) -> Callable[[int], list[KVCacheBlock]] | None:
        """It got a state index. If it has a hit, what gives it so many blocks, restored."""
        self.branches.starts(request_id)
        hit = self._hits.get(request_id)
        if hit is None:
            return None
        assert hit.kept.mark is not None and self.kept.has(hit.kept)
        self._ledger.resume(state, hit.kept.mark, hit.again >= 0)
        return functools.partial(self.restore, request_id, state)

    def leave(self, request_id: str, state: int | None, blocks: list[KVCacheBlock]) -> int:
        """Of the blocks that a request gives up, how many of the first are kept.

        What it was fed must be known: of a token that was sampled, but not reported yet, nobody
        could say that it is the same.
        """
        request = self._ending.pop(request_id, None)
        lineage = self._lineage.pop(request_id, ()) if request is not None else ()
        if request is None or state is None:
            return 0
        ledger, num_tokens = self._ledger, self._ledger.scheduled_end.item(state)
        if num_tokens > request.num_tokens or not self._may_keep(state, num_tokens):
            return 0
        key = key_of(request, num_tokens, self._block_size)
        if self.kept.get(key) is not None:
            return 0
        count = min(ledger.required_one(state, num_tokens), len(blocks))
        spare = self._num_record_blocks
        if len(blocks) - count >= spare:
            record = blocks[count : count + spare]
            taken = count + spare
        elif self._supply.num_free >= spare:
            record, taken = self._supply.take(spare), count
        else:
            return 0
        own = blocks[:count]
        self._mailbox.save(state, own, own, record)
        mark = ledger.mark(state) if ledger.reported_end[state] == num_tokens else None
        kept = Kept(key, num_tokens, own, record, mark, END, lineage)
        self.kept.add(kept, state, ledger.tenancy.item(state))
        self._supersede(kept, request)
        preferred = self._preferred()
        if preferred == PROMPT:
            self.kept.give_way(kept)
        for other in lineage[-1:]:
            if preferred == END and other.kind == PROMPT and not other.hits:
                self.kept.give_way(other)
        return taken

    def _may_keep(self, state: int, num_tokens: int) -> bool:
        enough = num_tokens >= self._spec.layout.page_size
        return enough and self._ledger.tenancy.item(state) >= self._valid_from

    def _is_near(self, before: tuple[Kept, ...], num_tokens: int) -> bool:
        """Whether who would go on from there can do so from what its request went on from, a few
        tokens before: a question's end isn't worth the end of others, of its document least. A
        turn's end is: what nobody else went on from gives way to what the turn leaves."""
        if not before or not self.kept.has(before[-1]):
            return False
        shared = before[-1].kind == BRANCH or before[-1].hits > 1
        return shared and num_tokens - before[-1].num_tokens < self._worth

    def _supersede(self, kept: Kept, request: Request) -> None:
        """Whoever would go on from what its request went on from, can go on from ``kept``; unless
        others went on from there, too, or it is the same prompt, which may come again."""
        for other in kept.before:
            same = other.num_tokens == request.num_prompt_tokens
            if other.kind != BRANCH and other.hits == 1 and not same:
                self.kept.give_way(other)

    def _preferred(self) -> str | None:
        """Of the two states that a turn leaves, the one that requests went on from, if it is
        nearly always the same."""
        prompts, ends = self._went_on[PROMPT], self._went_on[END]
        if ends > PREFERENCE * (prompts + 1):
            return END
        return PROMPT if prompts > PREFERENCE * (ends + 1) else None

    def clear(self) -> None:
        """Nothing that was computed so far is of use any more."""
        self.kept.clear()
        self._hits.clear()
        self._valid_from = self._ledger.last_tenancy + 1

    # Steps.

    def new_step_starts(self) -> None:
        """Keep what the last step left, before the coming one writes."""
        due, self._due = self._due, []
        for request, state, tenancy, num_tokens, awaited in due:
            ledger = self._ledger
            unchanged = ledger.tenancy[state] == tenancy
            if unchanged and ledger.scheduled_end[state] == num_tokens:
                self._save(request, state, num_tokens, awaited)

    def _save(self, request: Request, state: int, num_tokens: int, awaited: bool) -> None:
        ledger, request_id = self._ledger, request.request_id
        if not self._may_keep(state, num_tokens):
            return
        key = key_of(request, num_tokens, self._block_size)
        if self.kept.get(key) is not None:
            return
        # Most that the request can have in use; the report will tell.
        held = self._req_to_blocks[request_id]
        count = min(ledger.required_one(state, num_tokens), len(held))
        kind = PROMPT if num_tokens == request.num_prompt_tokens else BRANCH
        needed = count + self._num_record_blocks
        before = self._lineage.get(request_id, ())
        if not self._supply.make_room(needed):
            superfluous = self._preferred() == END or self._is_near(before, num_tokens)
            if needed > self._supply.num_free or (kind == PROMPT and not awaited and superfluous):
                return
        target, record = self._supply.take(count), self._supply.take(self._num_record_blocks)
        self._mailbox.save(state, held[:count], target, record)
        mark = ledger.mark(state) if ledger.reported_end[state] == num_tokens else None
        kept = Kept(key, num_tokens, target, record, mark, kind, before)
        self.kept.add(kept, state, ledger.tenancy.item(state))
        self._supersede(kept, request)
        self._lineage[request_id] = (*before, kept)

    def scheduled(self, step: Step) -> None:
        columns = (step.states.tolist(), step.tenancies.tolist(), step.ends.tolist())
        for request_id, state, tenancy, end in zip(step.requests, *columns, strict=True):
            due = self.branches.scheduled(request_id, state, tenancy, end)
            if due is not None:
                self._due.append(due)

    # Hits.

    def match(self, request: Request) -> int | None:
        """Tokens of the state that a waiting request can go on from; None: it shall wait."""
        self._hits.pop(request.request_id, None)
        if request.skip_reading_prefix_cache:
            return 0
        limit = request.num_tokens
        if not self._spec.layout.can_rewind(limit):
            limit -= 1
        kept = self.kept.find(request, limit)
        if kept is not None and kept.mark is None:
            return None  # until its report is in
        best = 0 if kept is None else kept.num_tokens
        if self.branches.is_coming(request, best, limit):
            return None
        if kept is None or not self._can_fit(kept, request.num_tokens):
            return 0
        hit = self._hits[request.request_id] = Hit(kept, min(best, request.num_tokens - 1))
        return hit.num_tokens

    def _can_fit(self, kept: Kept, num_tokens: int) -> bool:
        assert kept.mark is not None
        end = min(num_tokens, kept.num_tokens + self._spec.max_chunk_tokens)
        return self._ledger.required_after(kept.mark, end) < self._pool.num_gpu_blocks

    def mark_of_hit(self, request_id: str, num_tokens: int) -> Mark | None:
        """What `match` found, for a request that vLLM takes to have so many tokens computed."""
        if not num_tokens:
            return None
        hit = self._hits[request_id]
        assert hit.num_tokens == num_tokens and self.kept.has(hit.kept)
        return hit.kept.mark

    def restore(self, request_id: str, state: int, count: int) -> list[KVCacheBlock]:
        """``count`` blocks for the request that goes on from its hit. It takes over those of the
        hit where a copy would be at the expense of other states, or there is no room for one."""
        hit = self._hits.pop(request_id)
        kept = hit.kept
        self.kept.pin(kept)
        room, source = self._supply.make_room(count), kept.blocks
        if room or (count <= self._supply.num_free and (kept.kind == BRANCH or kept.hits)):
            blocks = self._supply.take(count)
            self.kept.unpin(kept)
        else:
            source = self.kept.take_over(kept)
            blocks = [*source, *self._supply.take(count - len(source))]
        target = blocks[: len(source)]
        self._mailbox.restore(state, source, target, kept.record, again=hit.again)
        kept.hits += 1
        self._went_on[kept.kind] += 1
        if max(self._went_on.values()) > 1 << 8:
            self._went_on = {kind: n // 2 for kind, n in self._went_on.items()}
        for other in kept.before:
            # Hit once at most: by the request that left ``kept``.
            if other.kind != BRANCH and other.hits <= 1:
                self.kept.give_way(other)
        kept.before = ()
        self._lineage[request_id] = (kept,)
        return blocks
