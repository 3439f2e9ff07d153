"""Requests that find too few free blocks: who waits for reports, who gives way, who is ended.

vLLM's scheduler asks for blocks, is refused (`note` keeps the last refusal of a step), and then:

running    asks `should_wait`. It preempts the youngest running request, in the end the one that
           asks, unless told to wait: reports in flight may bring the blocks back. A request that
           can never fit would go round for ever. The official way out has two parts: a connector
           that has "pending block frees" keeps the scheduler from preempting, and a block that a
           worker names as failed ends the request that owns it (failure policy "fail").
waiting    is asked again in the next step, and nobody is admitted before it. If nothing runs that
           could end, `resolve_waiting` finds a way: a session gives way, or, if it is the one that
           waits and can never fit, ends as if a transfer for it had failed.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from vllm_dms.core.ledger import Ledger
from vllm_dms.core.mailbox import Mailbox
from vllm_dms.core.sessions import Sessions

logger = init_logger(__name__)


class Shortage(NamedTuple):
    """A request did not get the blocks for its next tokens."""

    request_id: str
    needed: int  # blocks in all
    missing: int  # of those, not held yet


class Shortages:
    def __init__(
        self,
        ledger: Ledger,
        mailbox: Mailbox,
        sessions: Sessions,
        req_to_blocks: Mapping[str, list[KVCacheBlock]],
        reserve_compression: float,
    ) -> None:
        self._ledger = ledger
        self._mailbox = mailbox
        self._sessions = sessions
        self._req_to_blocks = req_to_blocks
        self._reserve_compression = reserve_compression
        self._last: Shortage | None = None
        # Request id -> last step in flight when it first had to wait for reports.
        self._waits: dict[str, int] = {}
        # Requests to end, and their first blocks once they are gone: such a block names the
        # request to the scheduler, so nobody else may get it until the scheduler was told.
        self._condemned: set[str] = set()
        self.quarantine: set[int] = set()
        self.ended_requests = 0

    def new_step_starts(self) -> None:
        self._last = None

    def note(self, shortage: Shortage) -> None:
        self._last = shortage

    def should_wait(self, num_usable_blocks: int) -> bool:
        """Whether to leave the running request of the last shortage be, not to preempt for it.

        Yes if it can never fit: it ends as soon as the worker has repeated its first block to the
        scheduler. Yes, once, if reports in flight can bring back what is missing.
        """
        assert self._last is not None
        request_id, needed, missing = self._last
        ledger, in_flight = self._ledger, self._mailbox.in_flight
        state = ledger.state_of(request_id)
        assert state is not None, f"{request_id} runs without a state index"
        if needed > num_usable_blocks:
            if not ledger.in_flight(state) and request_id not in self._condemned:
                self._condemned.add(request_id)
                self._mailbox.fail_running(self._req_to_blocks[request_id][0])
                self._explain(state, num_usable_blocks)
            return True
        if not in_flight or ledger.recoverable() < missing:
            return False
        deadline = self._waits.setdefault(request_id, in_flight[-1].step_id)
        return in_flight[0].step_id <= deadline

    def resolve_waiting(self, num_usable_blocks: int, nothing_runs: bool) -> str | None:
        """After a step was scheduled: the session that must give its blocks back, if any."""
        if self._last is None:
            return None
        request_id, needed, _ = self._last
        session, state = self._sessions.waiting(request_id), self._ledger.state_of(request_id)
        if needed > num_usable_blocks:
            if session is not None and state is not None:
                session.status = RequestStatus.WAITING_FOR_REMOTE_KVS
                self._mailbox.fail_waiting(request_id)
                self._explain(state, num_usable_blocks)
            return None
        return self._sessions.choose_to_give_way(request_id) if nothing_runs else None

    def resolved(self, request_id: str) -> None:
        """The request got its blocks, or a report showed that it needs none."""
        self._waits.pop(request_id, None)

    def gone(self, request_id: str, first: KVCacheBlock) -> None:
        """The request gives up its blocks."""
        self._waits.pop(request_id, None)
        if request_id in self._condemned:
            self._condemned.discard(request_id)
            self.quarantine.add(first.block_id)

    def told(self, fail_blocks: Iterable[int]) -> None:
        """The scheduler has ended the owners of these: others may have the blocks again."""
        self.quarantine.difference_update(fail_blocks)

    def _explain(self, state: int, num_usable_blocks: int) -> None:
        assert self._last is not None
        ledger = self._ledger
        self.ended_requests += 1
        tokens = ledger.reported_end.item(state)
        live = ledger.live.item(state) / ledger.all_rows
        logger.error(
            "Request %s ends with an error: of its %d tokens it keeps %.0f %%, and it needs %d KV "
            "blocks to go on, but there are only %d. reserve_compression %g let --max-model-len "
            "count on more compression than this request has. Lower reserve_compression in "
            "--additional-config or --max-model-len, or raise --gpu-memory-utilization.",
            self._last.request_id,
            tokens,
            100 * live / max(tokens, 1),
            self._last.needed,
            num_usable_blocks,
            self._reserve_compression,
        )
