"""Proof that it compresses: what is logged while serving, and told to the client at the end."""

import time
from typing import Any

from vllm.logger import init_logger

from vllm_dms.arena.report import Usage
from vllm_dms.core.manager import DMSManager
from vllm_dms.core.records import Growth, Step

logger = init_logger(__name__)

# Past-window tokens after which a checkpoint that evicts nothing deserves a warning.
SUSPICIOUS_TOKENS = 4096


class Stats:
    """Counters of one scheduler. Tokens are means over the (layer, head) rows of all ranks."""

    def __init__(self, manager: DMSManager, evict: bool, log_interval: float) -> None:
        self._manager = manager
        self._log_interval = log_interval
        self._next_log = time.monotonic() + log_interval
        self._warn_if_nothing_evicted = evict
        self.eligible_tokens = 0  # that left their window
        self._kept = 0  # slots of those, over all rows
        self.preemptions = 0
        # Of finished requests whose last report is still to come: what their clients are told.
        self._parting: dict[str, dict[str, Any]] = {}

    @property
    def evicted_tokens(self) -> float:
        return self.eligible_tokens - self._kept / self._manager.ledger.all_rows

    def add(self, step: Step, usage: Usage, growth: Growth) -> None:
        for request_id, figures in self._parting.items():
            if request_id in step.requests:
                i = step.requests.index(request_id)
                figures.update(self._figures(step.ends.item(i), usage.live.item(i),
                                             usage.fullest.item(i, 0)))  # fmt: skip
        self._parting.clear()
        self.eligible_tokens += growth.eligible
        self._kept += growth.kept
        if self._warn_if_nothing_evicted and self.eligible_tokens >= SUSPICIOUS_TOKENS:
            self._warn_if_nothing_evicted = False
            if self.evicted_tokens == 0:
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
        running = (ledger.tenancy > 0) & (ledger.reported_end > 0)
        if running.any():
            dense = int(ledger.reported_end[running].sum()) * ledger.all_rows
            compression = dense / int(ledger.live[running].sum())
            now = f"live compression {compression:.2f}x over {int(running.sum())} running requests"
        else:
            now = "no running requests"
        usable, kept = manager.num_usable_blocks, ""
        if manager.prefix is not None:
            states = manager.prefix.kept
            gib = states.num_blocks * manager.spec.layout.block_bytes / (1 << 30)
            kept = f", {len(states)} states kept in {gib:.2f} GiB of free blocks"
        return (
            f"DMS: {now}, {usable - manager.block_pool.get_num_free_blocks()}/{usable} blocks "
            f"held, {manager.returned_blocks} returned, {self.preemptions} preemptions, "
            f"{self.evicted_tokens:.0f} of {self.eligible_tokens} past-window tokens evicted{kept}"
        )

    def of_finished(self, request_id: str) -> dict[str, Any]:
        """What the client of a request that just finished is told.

        vLLM asks while it takes in the output of the request's last step, and hands it the report
        of that step next: the figures are filled in then, before they are sent. Those of a request
        that was aborted between steps are of its last report.
        """
        ledger = self._manager.ledger
        figures: dict[str, Any] = {}
        state = ledger.state_of(request_id)
        if state is not None and ledger.reported_end[state]:
            figures = self._figures(
                ledger.reported_end.item(state), ledger.live.item(state), ledger.pages.item(state)
            )
        self._parting[request_id] = figures
        return figures

    def _figures(self, num_tokens: int, live: int, pages: int) -> dict[str, Any]:
        """Tokens stored, slots over all rows, and pages of the fullest rank."""
        ledger = self._manager.ledger
        mean = live / ledger.all_rows
        return {
            "live_tokens": round(mean, 2),
            "dense_tokens": num_tokens,
            "compression": round(num_tokens / mean, 3),
            "blocks": -(-pages // ledger.pages_per_block),
        }
