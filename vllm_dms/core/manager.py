"""The KV cache manager: vLLM's block pool on one side, reservation caps on the other."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request, RequestStatus

from vllm_dms.arena.messages import DMSStepMeta
from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.core.admission import LiveFraction, estimate_blocks
from vllm_dms.core.ledger import Growth, Ledger, Step
from vllm_dms.core.shortage import Shortage, Shortages


class DMSManager(SingleTypeKVCacheManager):
    """Holds, for each request, blocks for its reservation cap (see `ledger`); returns the rest.

    Order of calls in a step: `new_step_starts`, allocations and frees as the scheduler decides,
    `close_step` (from the connector), and, once the step ran, `merge`.
    """

    def __init__(self, kv_cache_spec: DMSCacheSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        if self.enable_caching:
            raise ValueError(
                "enable_prefix_caching is on, but DMS blocks hold what one request kept and can't "
                "be shared. Start with --no-enable-prefix-caching."
            )
        self.spec = kv_cache_spec
        self.ledger = Ledger(kv_cache_spec.layout, kv_cache_spec.max_num_seqs)
        self.live_fraction = LiveFraction(kv_cache_spec.layout.num_rows)
        self.states: dict[str, int] = {}  # request id -> state index
        self.owners: dict[int, str] = {}  # and back
        self.in_flight: deque[Step] = deque()
        self.shortages = Shortages(self.ledger, self.in_flight, kv_cache_spec.reserve_compression)
        self.returned_blocks = 0
        self._next_step = 0
        # For the next step's message to the worker.
        self._row_updates: list[tuple[int, int, int]] = []
        self._starts: dict[int, int] = {}
        self._admit = True
        # What preempted requests had kept: the average says little about when they fit again.
        self._own_fraction: dict[str, float] = {}
        self._finishing: set[str] = set()
        # Requests with streaming input: when a turn stops, vLLM takes back the step it scheduled
        # ahead, whose token can't be taken out of the arena again. So there is none.
        self.sessions: dict[str, Request] = {}
        self._paused = False

    # The scheduler's calls.

    def new_step_starts(self) -> None:
        self._admit = True

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        state = self.states.get(request_id)
        if state is not None and not apply_admission_cap:
            ledger = self.ledger
            if request_id in self.sessions and ledger.in_flight(state):
                self._paused = True
                return self.block_pool.num_gpu_blocks  # more than there can be: not now
            if num_tokens <= ledger.read_safe_end[state]:
                return 0
            needed = ledger.required_one(state, num_tokens)
            blocks = self.req_to_blocks[request_id]
            missing = max(needed - len(blocks), 0)
            if missing > self.block_pool.get_num_free_blocks():
                first = blocks[0].block_id
                self.shortages.note(Shortage(request_id, state, first, needed, missing))
                session = self.sessions.get(request_id)
                if session is not None and session.status == RequestStatus.WAITING:
                    self.shortages.end_if_waiting_for_ever(session, self.num_usable_blocks)
            return missing
        held = 0 if state is None else len(self.req_to_blocks[request_id])
        if state is None and not (self._admit and self.ledger.num_free):
            return self.block_pool.num_gpu_blocks  # more than there can be: not now
        if apply_admission_cap:
            own = self._own_fraction.get(request_id, 0.0)
            estimate = estimate_blocks(self.spec, num_tokens, max(self.live_fraction.value, own))
            # A request that is alone is let in whatever the guess, so that none waits for ever.
            return max(min(estimate, self.num_usable_blocks) - held, 0)
        return self.spec.dense_blocks(num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """The blocks of a new or resumed request; [] for a running one, because vLLM's tables on
        the worker can't shrink. Its blocks travel in the connector's message instead."""
        ledger = self.ledger
        state = self.states.get(request_id)
        first = state is None
        if state is None:
            state = self.states[request_id] = ledger.start()
            self.owners[state] = request_id
        ledger.scheduled_end[state] = num_tokens
        self.shortages.resolved(request_id)
        if num_tokens <= ledger.read_safe_end[state]:
            return []
        blocks = self.req_to_blocks[request_id]
        held = len(blocks)
        needed = ledger.required_one(state, num_tokens)
        new = self.block_pool.get_new_blocks(max(needed - held, 0))
        blocks.extend(new)
        ledger.grow(state, len(blocks), num_tokens)
        updates = self._row_updates
        updates.extend((state, held + i, block.block_id) for i, block in enumerate(new))
        if not first:
            return []
        self._starts[state] = new[0].block_id
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        state = self.states.pop(request_id, None)
        if request_id in self._finishing:
            self._finishing.discard(request_id)
            self._own_fraction.pop(request_id, None)
        elif state is not None:
            self._own_fraction[request_id] = self.ledger.live_fraction(state)
        if state is None:
            return blocks
        del self.owners[state]
        self.ledger.release(state)
        # If it is preempted in the step that gave it blocks, the worker must not hear of them.
        self._starts.pop(state, None)
        if self._row_updates:
            self._row_updates = [u for u in self._row_updates if u[0] != state]
        self.shortages.gone(request_id, blocks)
        return blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing to do: `merge` returns surplus as soon as it is known."""

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: there is no prefix caching."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        *args: Any,
        **kw: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    # The connector's calls.

    @property
    def num_usable_blocks(self) -> int:
        return self.block_pool.num_gpu_blocks - 1  # without the null block

    def close_step(self, request_ids: Iterable[str]) -> DMSStepMeta:
        """The message to the worker for the step that was just scheduled."""
        self._next_step += 1
        step = self.ledger.make_step(self._next_step, [self.states[r] for r in request_ids])
        if len(step.states):
            self.in_flight.append(step)
        meta = DMSStepMeta(
            step_id=step.step_id,
            states=step.states.astype(np.int32),
            row_updates=np.array(self._row_updates, dtype=np.int32).reshape(-1, 3),
            starts=np.array(list(self._starts.items()), dtype=np.int32).reshape(-1, 2),
            fail_blocks=self.shortages.take_fail_blocks(),
            fail_requests=self.shortages.take_fail_requests(),
        )
        self._row_updates, self._starts = [], {}
        return meta

    def merge(self, step_id: int, report: np.ndarray) -> Growth:
        """Take in the report of a step and return the blocks that nobody needs any more."""
        step = self.in_flight.popleft()
        if step.step_id != step_id:
            raise RuntimeError(f"report of step {step_id} while step {step.step_id} is due")
        states, surplus, growth = self.ledger.merge(step, report)
        self.live_fraction.add(growth)
        if surplus.any():
            self._return_surplus(states, surplus)
        return growth

    def _return_surplus(self, states: np.ndarray, surplus: np.ndarray) -> None:
        for i in np.flatnonzero(surplus).tolist():
            blocks = self.req_to_blocks[self.owners[states.item(i)]]
            tail = blocks[-surplus.item(i) :]
            del blocks[-len(tail) :]
            self.block_pool.free_blocks(reversed(tail))
            self.returned_blocks += len(tail)

    def should_wait(self) -> bool:
        """Whether the running request that just got no blocks is left be; see `shortage`."""
        if self._paused:
            self._paused = False
            return True
        wait = self.shortages.should_wait(self.num_usable_blocks)
        # While anyone waits, nobody is admitted.
        self._admit = not wait
        return wait

    def forget_failed(self, block_ids: Iterable[int]) -> None:
        """The scheduler has ended the owners of these failed blocks."""
        self.block_pool.free_blocks(self.shortages.release(block_ids))

    def request_finishes(self, request_id: str) -> None:
        """Its blocks are about to be freed for good, not because it is preempted."""
        self.sessions.pop(request_id, None)
        self._finishing.add(request_id)


def check_integrity(manager: DMSManager) -> None:
    """Every block of the pool is free or owned exactly once; the ledger agrees with the lists."""
    pool, ledger = manager.block_pool, manager.ledger
    held = [b for blocks in manager.req_to_blocks.values() for b in blocks]
    held += manager.shortages.quarantine.values()
    ids = [b.block_id for b in held]
    assert len(set(ids)) == len(ids), "a block is owned twice"
    assert pool.null_block.block_id not in ids, "the null block is owned"
    assert all(b.ref_cnt == 1 for b in held), "a held block was freed"
    total = pool.get_num_free_blocks() + len(ids) + 1
    assert total == pool.num_gpu_blocks, f"{total} blocks of {pool.num_gpu_blocks} accounted for"
    assert set(manager.states) == {r for r, b in manager.req_to_blocks.items() if b}
    states = list(manager.states.values())
    assert len(set(states)) == len(states), "a state index is owned twice"
    assert manager.owners == {state: request for request, state in manager.states.items()}
    assert sorted(np.flatnonzero(ledger.owned)) == sorted(states)
    assert ledger.num_free + len(states) == manager.spec.max_num_seqs
    for request_id, state in manager.states.items():
        num_blocks = len(manager.req_to_blocks[request_id])
        assert num_blocks == ledger.held[state] >= 1
        assert ledger.pages[state] <= num_blocks * ledger.pages_per_block
        assert ledger.scheduled_end[state] <= ledger.safe_end[state]
