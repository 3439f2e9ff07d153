"""Proof that it compresses: what is logged while serving, and told to the client at the end."""

import time
from typing import Any

from vllm.logger import init_logger

from vllm_dms.core.ledger import Growth
from vllm_dms.core.manager import DMSManager

logger = init_logger(__name__)

# Past-window tokens after which a checkpoint that evicts nothing deserves a warning.
SUSPICIOUS_TOKENS = 4096


class Stats:
    """Counters of one scheduler. Tokens are means over the (layer, head) rows."""

    def __init__(self, manager: DMSManager, evict: bool, log_interval: float) -> None:
        self._manager = manager
        self._log_interval = log_interval
        self._next_log = time.monotonic() + log_interval
        self._warn_if_nothing_evicted = evict
        self._eligible = 0  # past-window slots over all rows
        self._kept = 0
        self.preemptions = 0

    @property
    def eligible_tokens(self) -> float:
        return self._eligible / self._manager.ledger.num_rows

    @property
    def evicted_tokens(self) -> float:
        return (self._eligible - self._kept) / self._manager.ledger.num_rows

    def add(self, growth: Growth) -> None:
        self._eligible += growth.eligible
        self._kept += growth.kept
        if self._warn_if_nothing_evicted and self.eligible_tokens >= SUSPICIOUS_TOKENS:
            self._warn_if_nothing_evicted = False
            if self._kept == self._eligible:
                logger.warning(
                    "DMS: none of the first %d tokens that left their window was evicted, so "
                    "nothing is compressed. Is this a DMS checkpoint with its own window, "
                    "alpha_scale and alpha_offset?",
                    self.eligible_tokens,
                )
        if self._log_interval and time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + self._log_interval
            logger.info("%s", self.line())

    def line(self) -> str:
        manager, ledger = self._manager, self._manager.ledger
        running = ledger.owned & (ledger.reported_end > 0)
        dense = int(ledger.reported_end[running].sum()) * ledger.num_rows
        live = int(ledger.live[running].sum())
        usable = manager.num_usable_blocks
        return (
            f"DMS: live compression {dense / max(live, 1):.2f}x over {int(running.sum())} running "
            f"requests, {usable - manager.block_pool.get_num_free_blocks()}/{usable} blocks held, "
            f"{manager.returned_blocks} returned, {self.preemptions} preemptions, "
            f"{self.evicted_tokens:.0f} of {self.eligible_tokens:.0f} past-window tokens evicted"
        )

    def of_request(self, request_id: str) -> dict[str, Any] | None:
        """A request's last report, mean over rows; None if none arrived (it may have run for a
        single step)."""
        manager, ledger = self._manager, self._manager.ledger
        state = manager.states.get(request_id)
        if state is None or not ledger.reported_end[state]:
            return None
        dense = int(ledger.reported_end[state])
        live = float(ledger.live[state]) / ledger.num_rows
        return {
            "live_tokens": round(live, 2),
            "dense_tokens": dense,
            "compression": round(dense / live, 3),
            "blocks": len(manager.req_to_blocks[request_id]),
        }
