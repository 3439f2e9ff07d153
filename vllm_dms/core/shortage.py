"""Running requests that find too few free blocks: who waits for reports, and who is ended.

vLLM's scheduler preempts the youngest running request then, in the end the one that asks. For a
request that can never fit, that would go on for ever. The official way out has two parts: a
connector that has "pending block frees" keeps the scheduler from preempting, and a block that a
worker names as failed ends the request that owns it with an error (failure policy "fail").
A session with streaming input can lack blocks while it waits: it ends as if a transfer had failed.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_dms.core.ledger import Ledger, Step

logger = init_logger(__name__)


class Shortage(NamedTuple):
    """A running request did not get the blocks for its next tokens."""

    request_id: str
    state: int
    first_block: int
    needed: int  # blocks in all
    missing: int  # of those, not held yet


class Shortages:
    def __init__(self, ledger: Ledger, in_flight: deque[Step], reserve_compression: float) -> None:
        self._ledger = ledger
        self._in_flight = in_flight
        self._reserve_compression = reserve_compression
        self._last: Shortage | None = None
        # Request id -> last step in flight when it first had to wait for reports.
        self._waits: dict[str, int] = {}
        # Requests to end, and their first blocks once they are gone: such a block names the
        # request to the scheduler, so nobody else may own it until the scheduler was told.
        self.condemned: set[str] = set()
        self.quarantine: dict[int, KVCacheBlock] = {}
        self._to_fail: list[int] = []
        self._to_fail_waiting: list[str] = []
        self.ended_requests = 0

    def note(self, shortage: Shortage) -> None:
        self._last = shortage

    def should_wait(self, num_usable_blocks: int) -> bool:
        """Whether to leave the request of the last shortage be, instead of preempting for it.

        Yes if it can never fit: it ends as soon as the worker has repeated its first block to the
        scheduler. Yes, once, if reports in flight can bring back what is missing.
        """
        assert self._last is not None
        request_id, state, first_block, needed, missing = self._last
        ledger = self._ledger
        if needed > num_usable_blocks:
            if not ledger.in_flight(state) and request_id not in self.condemned:
                self.condemned.add(request_id)
                self._to_fail.append(first_block)
                self.ended_requests += 1
                self._explain(self._last, num_usable_blocks)
            return True
        if not self._in_flight or ledger.recoverable() < missing:
            return False
        deadline = self._waits.setdefault(request_id, self._in_flight[-1].step_id)
        return self._in_flight[0].step_id <= deadline

    def end_if_waiting_for_ever(self, session: Request, num_usable_blocks: int) -> None:
        """The next turn of a session with streaming input did not get its blocks. It is not
        running, and vLLM admits nobody before it: if it can never fit, it must end.

        As if a transfer for it had failed: it waits for one until the worker says so.
        """
        assert self._last is not None and self._last.request_id == session.request_id
        if self._last.needed > num_usable_blocks:
            session.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            self._to_fail_waiting.append(session.request_id)
            self.ended_requests += 1
            self._explain(self._last, num_usable_blocks)

    def resolved(self, request_id: str) -> None:
        """The request got its blocks, or a report showed that it needs none."""
        self._waits.pop(request_id, None)

    def gone(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """The request gives up its ``blocks``. Takes out of them what can't be freed yet."""
        self._waits.pop(request_id, None)
        if request_id in self.condemned:
            self.condemned.discard(request_id)
            first = blocks.pop(0)
            self.quarantine[first.block_id] = first

    def take_fail_blocks(self) -> frozenset[int]:
        """First blocks of requests to end, for the next message to the worker."""
        taken, self._to_fail = frozenset(self._to_fail), []
        return taken

    def take_fail_requests(self) -> frozenset[str]:
        """Waiting requests to end, for the next message to the worker."""
        taken, self._to_fail_waiting = frozenset(self._to_fail_waiting), []
        return taken

    def release(self, fail_blocks: Iterable[int]) -> list[KVCacheBlock]:
        """The scheduler has acted on these: blocks that may be used again."""
        blocks = [self.quarantine.pop(block_id, None) for block_id in fail_blocks]
        return [block for block in blocks if block is not None]

    def _explain(self, shortage: Shortage, num_usable_blocks: int) -> None:
        tokens = int(self._ledger.reported_end[shortage.state])
        live = self._ledger.live[shortage.state] / self._ledger.num_rows
        logger.error(
            "Request %s ends with an error: of its %d tokens it keeps %.0f %%, and it needs %d KV "
            "blocks to go on, but there are only %d. reserve_compression %g let --max-model-len "
            "count on more compression than this request has. Lower reserve_compression in "
            "--additional-config or --max-model-len, or raise --gpu-memory-utilization.",
            shortage.request_id,
            tokens,
            100 * live / max(tokens, 1),
            shortage.needed,
            num_usable_blocks,
            self._reserve_compression,
        )
