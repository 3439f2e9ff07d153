"""Reservation caps: how many blocks each request needs, from the last report and what runs since.

Everything is an array over state indices, so that a step of hundreds of requests costs a few
array operations. Index 0 is the null state and never owned. No vLLM in here.

The law: a step may take a page only from blocks that the request holds. After a report of ``u``
pages in use at ``r`` tokens, and with tokens scheduled up to ``e``, a request can come to use at
most ``cap = u + worst(e - r)`` pages, where ``worst(k)`` is what k further tokens take if all are
kept: exact from the report for k <= REPORT_HORIZON, else ceil(k / P) pages for each row. A request
without a report is at u = r = 0. Keeping everything from the start needs ceil(e / P) per row, so
that is a bound as well. Pages in use never shrink, and are handed out lowest first: blocks beyond
the cap are untouched and can go back to the pool while steps run.
"""

from typing import NamedTuple

import numpy as np

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.report import REPORT_HORIZON


class Step(NamedTuple):
    """What a step was scheduled with, kept until its report arrives. Arrays [n], by request."""

    step_id: int
    states: np.ndarray  # state index
    incarnations: np.ndarray  # of that index when the step was scheduled
    ends: np.ndarray  # tokens of the request after the step


class Growth(NamedTuple):
    """What one report adds to the totals over rows: slots past the window, and those kept."""

    eligible: int
    kept: int


class Ledger:
    def __init__(self, layout: ArenaLayout, max_num_seqs: int) -> None:
        self.num_rows = layout.num_rows
        self.page_size = layout.page_size
        self.pages_per_block = layout.pages_per_block
        self.ring_size = layout.ring_size

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((max_num_seqs + 1, *shape), dtype=np.int64)

        self.incarnation = zeros()  # how many requests an index has had
        self.owned = np.zeros(max_num_seqs + 1, dtype=bool)
        self.held = zeros()  # blocks
        self.scheduled_end = zeros()  # tokens, steps in flight included
        self.reported_end = zeros()  # tokens at the last report
        self.pages = zeros()  # in use at the last report
        self.live = zeros()  # slots in use at the last report, summed over rows
        self.need = zeros(REPORT_HORIZON + 1)  # worst(k) for k = 0..REPORT_HORIZON
        self.safe_end = zeros()  # tokens for which the held blocks suffice
        # Reading one element is much faster through a memoryview than through numpy.
        self.read_safe_end = memoryview(self.safe_end)
        self._free = list(range(max_num_seqs, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def start(self) -> int:
        """A state index for a new or resumed request, at zero tokens and no blocks."""
        state = self._free.pop()
        self.owned[state] = True
        self.incarnation[state] += 1
        for array in (self.held, self.scheduled_end, self.reported_end, self.pages, self.live):
            array[state] = 0
        # Up to a page of tokens takes at most one page of each row.
        self.need[state] = self.num_rows
        self.need[state, 0] = 0
        self.safe_end[state] = 0
        return state

    def release(self, state: int) -> None:
        self.owned[state] = False
        self.held[state] = 0
        self._free.append(state)

    def in_flight(self, state: int) -> bool:
        """Whether a step of the request was scheduled and is not reported yet."""
        return self.scheduled_end.item(state) > self.reported_end.item(state)

    def required_one(self, state: int, end: int) -> int:
        """Blocks needed so that ``state`` can run up to ``end`` tokens."""
        ahead = end - self.reported_end.item(state)
        if ahead <= REPORT_HORIZON:
            further = self.need.item(state, ahead)
        else:
            further = self.num_rows * -(-ahead // self.page_size)
        dense = self.num_rows * -(-end // self.page_size)
        # Block 0 of a row stays: it is how the device finds the request.
        return max(-(-min(self.pages.item(state) + further, dense) // self.pages_per_block), 1)

    def grow(self, state: int, num_blocks: int, end: int) -> None:
        """Record that ``state`` now holds ``num_blocks``, which suffice for ``end`` tokens."""
        self.held[state] = num_blocks
        self.read_safe_end[state] = end

    def make_step(self, step_id: int, states: list[int]) -> Step:
        index = np.array(states, dtype=np.int64)
        return Step(step_id, index, self.incarnation[index], self.scheduled_end[index])

    def merge(self, step: Step, report: np.ndarray) -> tuple[np.ndarray, np.ndarray, Growth]:
        """Take in a step's ``report`` int [n, REPORT_HORIZON + 2], rows in the step's order.

        Returns the state indices that the report was valid for, and of each the blocks to return:
        what it holds beyond its need in the coming step or two. Valid means that the request of
        the step still owns the index. All others were preempted, finished or aborted since, and
        are dropped. Once per step for all requests: each array is read once.
        """
        states, ends = step.states, step.ends
        valid = self.owned[states] & (self.incarnation[states] == step.incarnations)
        if not valid.all():
            states, ends, report = states[valid], ends[valid], report[valid]
        report = report.astype(np.int64)
        pages, need, live = report[:, 0], report[:, 1:-1], report[:, -1]
        held = self.held[states]
        spare = held * self.pages_per_block - pages
        if (spare < 0).any():
            over = spare < 0
            raise RuntimeError(
                f"DMS pages in use beyond the blocks held, states {states[over].tolist()}: "
                f"{pages[over].tolist()} pages, {held[over].tolist()} blocks"
            )
        growth = self._growth(ends - self.reported_end[states], ends, live - self.live[states])
        self.pages[states] = pages
        self.need[states, 1:] = need
        self.live[states] = live
        self.reported_end[states] = ends

        # As `required_one`, looking ahead to the report's horizon: a decoding request would only
        # ask again for what it returned.
        scheduled = self.scheduled_end[states]
        ahead = np.maximum(scheduled + 1 - ends, REPORT_HORIZON)
        crude = self.num_rows * -(-ahead // self.page_size)
        cap = pages + np.where(ahead == REPORT_HORIZON, need[:, -1], crude)
        cap = np.minimum(cap, self.num_rows * -(-(ends + ahead) // self.page_size))
        surplus = np.maximum(held - np.maximum(-(-cap // self.pages_per_block), 1), 0)
        if surplus.any():
            held -= surplus
            self.held[states] = held
            spare -= surplus * self.pages_per_block
        self.safe_end[states] = self._safe_ends(ends, scheduled, held, spare, need)
        return states, surplus, growth

    def _safe_ends(
        self,
        ends: np.ndarray,
        scheduled: np.ndarray,
        held: np.ndarray,
        spare: np.ndarray,
        need: np.ndarray,
    ) -> np.ndarray:
        """Tokens [n] that ``held`` blocks, of which ``spare`` pages are not in use, suffice for.

        They always do for what is scheduled. Recomputing can miss that: two chunks rounded up to
        pages one by one may ask for more than the same tokens did before the first was reported.
        """
        exact = (need <= spare[:, None]).sum(1)
        crude = spare // self.num_rows * self.page_size
        dense = held * self.pages_per_block // self.num_rows * self.page_size
        return np.maximum(np.maximum(ends + np.maximum(exact, crude), scheduled), dense)

    def live_fraction(self, state: int) -> float:
        """Share of past-window slots that the request kept, 0 if none was past its window yet."""
        eligible = self.reported_end.item(state) - self.ring_size
        kept = self.live.item(state) / self.num_rows - self.ring_size
        return kept / eligible if eligible > 0 else 0.0

    def recoverable(self) -> int:
        """Most blocks that reports of prefill chunks now in flight can bring back."""
        ahead = self.scheduled_end - self.reported_end
        chunks = np.flatnonzero(self.owned & (ahead > REPORT_HORIZON))
        in_use = -(-self.pages[chunks] // self.pages_per_block)
        return int((self.held[chunks] - np.maximum(in_use, 1)).sum())

    def _growth(self, further: np.ndarray, ends: np.ndarray, live: np.ndarray) -> Growth:
        """Of ``further`` tokens [n], up to ``ends``, that took ``live`` slots over all rows."""
        past = np.maximum(ends - self.ring_size, 0)
        past_before = np.maximum(ends - further - self.ring_size, 0)
        eligible = int((past - past_before).sum())
        kept = int(live.sum()) - self.num_rows * (int(further.sum()) - eligible)
        return Growth(eligible * self.num_rows, kept)
