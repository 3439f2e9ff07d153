"""The KV cache manager: vLLM's block pool on one side, reservation caps on the other.

Who owns what, when it is born and when it dies:

what          owner                     born                       dies
state index   `Ledger`                  `allocate_new_blocks`, of  `pop_blocks_for_free`: finished,
                                        a request without one      aborted, preempted, gave way
block         vLLM's pool, or one       `allocate_new_blocks`      `pop_blocks_for_free`; surplus
              request: `req_to_blocks`                             in `merge`, while it runs
kept state    `PrefixCache`; its        the end of a prompt or     the pool hands out one of its
              blocks are the pool's     request, a branch          blocks, `clear`, a hit takes over
page          the device; a request     a token that opens it,     with its block, never before
              has those of its blocks   the lowest free one
message       `Mailbox`                 while a step is scheduled  `close_step` posts it; the worker
                                                                   reads it before the step runs
report        worker, then `Ledger`     the end of a step          `merge`, in the order of steps

The ends of a request:

finished, aborted   `request_finishes` -> `pop_blocks_for_free`
preempted           `pop_blocks_for_free`; resumed like a new request
gave way            `close_step` -> `pop_blocks_for_free`; see `sessions`
can never fit       `should_wait` -> message -> the worker names its first block as failed -> vLLM
                    ends it -> `pop_blocks_for_free` -> `forget_failed`; see `shortage`

A freed block may be given to another request at once, although steps that still write to it are in
flight: the device works in the order of steps, and a message takes effect between two of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_dms.arena.messages import DMSReport, DMSStepMeta
from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.core.admission import Admission
from vllm_dms.core.ledger import Ledger
from vllm_dms.core.mailbox import Mailbox
from vllm_dms.core.prefix import PrefixCache
from vllm_dms.core.records import Growth, Step
from vllm_dms.core.sessions import Sessions
from vllm_dms.core.shortage import Shortage, Shortages
from vllm_dms.core.supply import Supply, assert_owned

logger = init_logger(__name__)


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
        spec = self.spec = kv_cache_spec
        self.ledger = Ledger(spec.layout, spec.max_num_seqs, spec.num_ranks)
        self.mailbox = Mailbox()
        self.sessions = Sessions(self.ledger)
        self.shortages = Shortages(
            self.ledger, self.mailbox, self.sessions, self.req_to_blocks, spec.reserve_compression
        )
        self.supply = Supply(block_pool, self.shortages)
        self.prefix: PrefixCache | None = None
        self.admission = Admission(spec)
        self.returned_blocks = 0
        self._num_steps = 0
        self._admit = True
        self._finishing: set[str] = set()

    @property
    def num_usable_blocks(self) -> int:
        return self.block_pool.num_gpu_blocks - 1  # without the null block

    def keep_states(self) -> None:
        """For requests that begin as earlier ones did."""
        parts = (self.ledger, self.mailbox, self.req_to_blocks, self.supply)
        self.prefix = PrefixCache(self.spec, self.block_pool, *parts)

    # The scheduler's calls.

    def new_step_starts(self) -> None:
        if self.prefix is not None:
            self.prefix.new_step_starts()
        self._admit = True
        self.sessions.new_step_starts()
        self.shortages.new_step_starts()

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
        """Decides nothing: what follows from a refusal is decided in `should_wait` (running
        requests) and `close_step` (waiting ones)."""
        state = self.ledger.state_of(request_id)
        if state is None:
            may_start = self._admit and self.ledger.num_free
            if not may_start or self.sessions.lost_its_state(request_id):
                return self.block_pool.num_gpu_blocks  # more than there can be: not now
        elif not apply_admission_cap:
            if self.sessions.must_pause(request_id, state):
                return self.block_pool.num_gpu_blocks
            if num_tokens <= self.ledger.read_safe_end[state]:
                return 0
        starts = state is None and self.prefix
        mark = starts.mark_of_hit(request_id, total_computed_tokens) if starts else None
        if apply_admission_cap:
            needed = self.admission.estimate(request_id, num_tokens, mark, self.num_usable_blocks)
        elif mark is not None:
            needed = self.ledger.required_after(mark, num_tokens)
        elif state is None:
            needed = self.spec.dense_blocks(num_tokens)
        else:
            needed = self.ledger.required_one(state, num_tokens)
        missing = needed - (0 if state is None else len(self.req_to_blocks[request_id]))
        if missing <= 0:
            return 0
        missing += len(self.shortages.quarantine)  # free, but for nobody yet
        if missing > self.block_pool.get_num_free_blocks():
            self.shortages.note(Shortage(request_id, needed, missing))
        return missing

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """The blocks of a new or resumed request; [] for a running one, because vLLM's tables on
        the worker can't shrink. Its blocks travel in the connector's message instead."""
        ledger = self.ledger
        state = ledger.state_of(request_id)
        first, hit = state is None, None
        if state is None:
            state = ledger.start(request_id)
            hit = self.prefix.starts(request_id, state) if self.prefix else None
        ledger.scheduled_end[state] = num_tokens
        self.shortages.resolved(request_id)
        if num_tokens <= ledger.read_safe_end[state]:
            return []
        blocks = self.req_to_blocks[request_id]
        held = len(blocks)
        take = self.supply.take if hit is None else hit
        new = take(max(ledger.required_one(state, num_tokens) - held, 0))
        blocks.extend(new)
        ledger.grow(state, len(blocks), num_tokens)
        self.mailbox.give(state, held, new)
        if not first:
            return []
        self.mailbox.start(state, new[0])
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        state = self.ledger.state_of(request_id)
        if request_id in self._finishing:
            self._finishing.discard(request_id)
            self.admission.finished(request_id)
        elif state is not None:
            self.admission.preempted(request_id, self.ledger.live_fraction(state))
        assert_owned(blocks)
        num_kept = 0 if self.prefix is None else self.prefix.leave(request_id, state, blocks)
        if state is None:
            assert not blocks, f"{request_id} holds blocks without a state index"
            return blocks
        assert len(blocks) == self.ledger.held[state], (request_id, len(blocks))
        self.ledger.release(request_id)
        self.mailbox.forget(state)
        self.shortages.gone(request_id, blocks[0])
        return blocks[num_kept:]

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing to do: `merge` returns surplus as soon as it is known."""

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `allocate_new_blocks` has the blocks of what was kept copied, too."""

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: vLLM's prefix caching is off."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    # The connector's calls.

    def close_step(self, request_ids: Iterable[str]) -> DMSStepMeta:
        """The message to the worker for the step that was just scheduled."""
        self._num_steps += 1
        step = self.ledger.make_step(self._num_steps, tuple(request_ids))
        if self.prefix is not None:
            self.prefix.scheduled(step)
        nothing_runs = not step.requests and not self.mailbox.in_flight
        gives_way = self.shortages.resolve_waiting(self.num_usable_blocks, nothing_runs)
        if gives_way is not None:
            logger.info("Session %s gives way: its next turn reads its tokens again.", gives_way)
            self.free(gives_way)
        self.sessions.start_anew()
        if nothing_runs and not self.ledger.requests:
            free = self.block_pool.get_num_free_blocks()
            assert free == self.num_usable_blocks, f"{self.num_usable_blocks - free} blocks lost"
        return self.mailbox.post(step)

    def merge(self, report: DMSReport) -> tuple[Step, Growth]:
        """Take in the report of a step and return the blocks that nobody needs any more."""
        step = self.mailbox.receive(report.step_id)
        if self.prefix is not None:
            self.prefix.kept.resolve(step, report.usage)
        surplus, growth = self.ledger.merge(step, report.usage)
        self.admission.live_fraction.add(growth)
        for request_id, count in surplus:
            blocks = self.req_to_blocks[request_id]
            tail = blocks[-count:]
            del blocks[-count:]
            assert_owned(tail)
            self.block_pool.free_blocks(reversed(tail))
            self.returned_blocks += count
        return step, growth

    def should_wait(self) -> bool:
        """Whether the running request that just got no blocks is left be; see `shortage`."""
        if self.sessions.take_pause():
            return True
        wait = self.shortages.should_wait(self.num_usable_blocks)
        # While anyone waits, nobody is admitted.
        self._admit = not wait
        return wait

    def forget_failed(self, block_ids: Iterable[int]) -> None:
        """The scheduler has ended the owners of these failed blocks."""
        self.shortages.told(block_ids)

    def request_finishes(self, request: Request) -> None:
        """Its blocks are about to be freed for good, not because it is preempted."""
        self.sessions.close(request.request_id)
        self._finishing.add(request.request_id)
        if self.prefix is not None:
            self.prefix.finishes(request)
