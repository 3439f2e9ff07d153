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

from vllm_dms.backend.layout import ArenaLayout
from vllm_dms.backend.ops import REPORT_HORIZON


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

    def required(self, states: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """`required_one` for arrays [n]."""
        ahead = ends - self.reported_end[states]
        exact = self.need[states, np.minimum(ahead, REPORT_HORIZON)]
        crude = self.num_rows * -(-ahead // self.page_size)
        cap = self.pages[states] + np.where(ahead <= REPORT_HORIZON, exact, crude)
        dense = self.num_rows * -(-ends // self.page_size)
        return np.maximum(-(-np.minimum(cap, dense) // self.pages_per_block), 1)

    def grow(self, state: int, num_blocks: int, end: int) -> None:
        """Record that ``state`` now holds ``num_blocks``, which suffice for ``end`` tokens."""
        self.held[state] = num_blocks
        self.read_safe_end[state] = end

    def shrink(self, states: np.ndarray, surplus: np.ndarray) -> None:
        """Record that ``states`` returned ``surplus`` blocks [n], and what the rest suffices for.

        It always suffices for what is scheduled. Recomputing can miss that: two chunks rounded up
        to pages one by one may ask for more than the same tokens did before the first was reported.
        """
        self.held[states] -= surplus
        pages = self.held[states] * self.pages_per_block
        spare = pages - self.pages[states]
        exact = (self.need[states] <= spare[:, None]).sum(1) - 1
        crude = spare // self.num_rows * self.page_size
        dense = pages // self.num_rows * self.page_size
        reached = self.reported_end[states] + np.maximum(exact, crude)
        reached = np.maximum(reached, self.scheduled_end[states])
        self.safe_end[states] = np.maximum(reached, dense)

    def make_step(self, step_id: int, states: list[int]) -> Step:
        index = np.array(states, dtype=np.int64)
        return Step(step_id, index, self.incarnation[index], self.scheduled_end[index])

    def merge(self, step: Step, report: np.ndarray) -> tuple[np.ndarray, Growth]:
        """Take in a step's ``report`` int [n, REPORT_HORIZON + 2], rows in the step's order.

        Returns the state indices that the report was valid for: the request of the step still
        owns them. All others were preempted, finished or aborted since, and are dropped.
        """
        states = step.states
        valid = self.owned[states] & (self.incarnation[states] == step.incarnations)
        ends = step.ends
        if not valid.all():
            states, ends, report = states[valid], ends[valid], report[valid]
        pages = report[:, 0]
        overrun = pages > self.held[states] * self.pages_per_block
        if overrun.any():
            raise RuntimeError(
                f"DMS pages in use beyond the blocks held, states {states[overrun].tolist()}: "
                f"{pages[overrun].tolist()} pages, {self.held[states][overrun].tolist()} blocks"
            )
        growth = self._growth(states, ends, report[:, -1])
        self.pages[states] = pages
        self.need[states, 1:] = report[:, 1:-1]
        self.live[states] = report[:, -1]
        self.reported_end[states] = ends
        return states, growth

    def surplus(self, states: np.ndarray) -> np.ndarray:
        """Blocks [n] that ``states`` hold beyond what they need in the coming step or two.

        Looking ahead to the report's horizon keeps a decoding request from returning a block
        only to ask for it again.
        """
        ends = np.maximum(self.scheduled_end[states] + 1, self.reported_end[states])
        ends = np.maximum(ends, self.reported_end[states] + REPORT_HORIZON)
        return np.maximum(self.held[states] - self.required(states, ends), 0)

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

    def _growth(self, states: np.ndarray, ends: np.ndarray, live: np.ndarray) -> Growth:
        before = self.reported_end[states]
        window_now = np.minimum(ends, self.ring_size)
        window_before = np.minimum(before, self.ring_size)
        eligible = (ends - window_now) - (before - window_before)
        kept = (live - self.live[states]).sum() - self.num_rows * (window_now - window_before).sum()
        return Growth(int(eligible.sum()) * self.num_rows, int(kept))
