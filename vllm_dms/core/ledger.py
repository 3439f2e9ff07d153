"""The one owner of state indices, and how many blocks the request of each needs.

Everything is an array over state indices, so that a step of hundreds of requests costs a few
array operations. Index 0 is the null state and never owned. No vLLM and no torch in here.

The law: a step may take a page only from blocks that the request holds. After a report of ``u``
pages in use at ``r`` tokens, and with tokens scheduled up to ``e``, a request can come to use at
most ``cap = u + worst(e - r)`` pages, where ``worst(k)`` is what k further tokens take if all are
kept: exact from the report for k <= REPORT_HORIZON, else ceil(k / P) pages for each row. A request
without a report is at u = r = 0. Keeping everything from the start needs ceil(e / P) per row, so
that is a bound as well. Pages in use never shrink, and are handed out lowest first: blocks beyond
the cap are untouched and can go back to the pool while steps run.

Tensor-parallel ranks share the blocks: pages are those of the fullest rank, so that caps hold for
every rank.
"""

import numpy as np

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.report import REPORT_HORIZON, REPORT_WIDTH, Usage
from vllm_dms.core.records import Growth, Mark, Step


class Ledger:
    def __init__(self, layout: ArenaLayout, max_num_seqs: int, num_ranks: int = 1) -> None:
        self.num_rows = layout.num_rows  # of one rank
        self.all_rows = layout.num_rows * num_ranks
        self.page_size = layout.page_size
        self.pages_per_block = layout.pages_per_block
        self.ring_size = layout.ring_size

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((max_num_seqs + 1, *shape), dtype=np.int64)

        # Who has which index, and since when: a report of an earlier tenancy says nothing.
        self._states: dict[str, int] = {}
        self._free = list(range(max_num_seqs, 0, -1))
        self.tenancy = zeros()  # a number that no other request ever had; 0: nobody's
        self._tenancies = 0

        self.held = zeros()  # blocks
        self.scheduled_end = zeros()  # tokens, steps in flight included
        self.reported_end = zeros()  # tokens at the last report
        self.pages = zeros()  # in use at the last report, on the fullest rank
        self.fullest = zeros()  # slots in use at the last report, over the fullest rank's rows
        self.again = zeros()  # 1: its step in flight stores a token that was stored before
        self.live = zeros()  # the same over the rows of all ranks
        self.need = zeros(REPORT_HORIZON + 1)  # worst(k) for k = 0..REPORT_HORIZON
        self.safe_end = zeros()  # tokens for which the held blocks suffice
        # Reading one element is much faster through a memoryview than through numpy.
        self.read_safe_end = memoryview(self.safe_end)

    # Who owns a state index.

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def requests(self) -> tuple[str, ...]:
        """Those that own a state index, and so hold blocks."""
        return tuple(self._states)

    @property
    def last_tenancy(self) -> int:
        return self._tenancies

    def state_of(self, request_id: str) -> int | None:
        return self._states.get(request_id)

    def start(self, request_id: str) -> int:
        """A state index for a new or resumed request, at zero tokens and no blocks."""
        assert request_id not in self._states, f"{request_id} owns a state index already"
        state = self._free.pop()
        assert self.tenancy[state] == 0, f"state index {state} is free and owned"
        self._states[request_id] = state
        self._tenancies += 1
        self.tenancy[state] = self._tenancies
        for array in (self.held, self.scheduled_end, self.reported_end, self.pages, self.again):
            array[state] = 0
        self.fullest[state] = self.live[state] = self.safe_end[state] = 0
        # Up to a page of tokens takes at most one page of each row.
        self.need[state] = self.num_rows
        self.need[state, 0] = 0
        return state

    def resume(self, state: int, mark: Mark, again: bool) -> None:
        """Not at zero tokens, but where another request was. ``again``: its first step stores the
        last of these tokens once more, so that after it there are as many."""
        self.again[state] = again
        self.scheduled_end[state] = self.reported_end[state] = mark.num_tokens
        self.pages[state], self.fullest[state] = mark.row[0], mark.row[-1]
        self.need[state, 1:] = mark.row[1:-1]
        self.live[state] = mark.live

    def mark(self, state: int) -> Mark:
        """What its last report said."""
        row = np.empty(REPORT_WIDTH, dtype=np.int64)
        row[0], row[1:-1], row[-1] = self.pages[state], self.need[state, 1:], self.fullest[state]
        return Mark(self.reported_end.item(state), row, self.live.item(state))

    def release(self, request_id: str) -> int:
        """The request gives its state index back. Reports of its steps may still be due: they are
        dropped. Its blocks may be another's at once: the device works in the order of steps."""
        state = self._states.pop(request_id)
        assert self.tenancy[state], f"state index {state} was free"
        self.tenancy[state] = self.held[state] = 0
        self._free.append(state)
        return state

    # What its request needs.

    def in_flight(self, state: int) -> bool:
        """Whether a step of the request was scheduled and is not reported yet."""
        ahead = self.scheduled_end.item(state) > self.reported_end.item(state)
        return ahead or bool(self.again[state])

    def required_one(self, state: int, end: int) -> int:
        """Blocks needed so that ``state`` can run up to ``end`` tokens."""
        ahead = end - self.reported_end.item(state)
        further = self.need.item(state, ahead) if ahead <= REPORT_HORIZON else None
        return self._required(self.pages.item(state), ahead, further, end)

    def required_after(self, mark: Mark, end: int) -> int:
        """The same for a request that goes on from ``mark``."""
        ahead = end - mark.num_tokens
        further = mark.row.item(ahead) if 0 < ahead <= REPORT_HORIZON else None
        return self._required(mark.num_pages, ahead, further, end)

    def _required(self, pages: int, ahead: int, further: int | None, end: int) -> int:
        if further is None:
            further = self.num_rows * -(-ahead // self.page_size)
        dense = self.num_rows * -(-end // self.page_size)
        # Block 0 of a row stays: it is how the device finds the request.
        return max(-(-min(pages + further, dense) // self.pages_per_block), 1)

    def grow(self, state: int, num_blocks: int, end: int) -> None:
        """Record that ``state`` now holds ``num_blocks``, which suffice for ``end`` tokens."""
        assert self.tenancy[state] and num_blocks >= self.held[state], (state, num_blocks)
        self.held[state] = num_blocks
        self.read_safe_end[state] = end

    def live_fraction(self, state: int) -> float:
        """Share of past-window slots that the request kept on the fullest rank, 0 if none was past
        its window yet."""
        eligible = self.reported_end.item(state) - self.ring_size
        kept = self.fullest.item(state) / self.num_rows - self.ring_size
        return kept / eligible if eligible > 0 else 0.0

    def recoverable(self) -> int:
        """Most blocks that reports of prefill chunks now in flight can bring back."""
        ahead = self.scheduled_end - self.reported_end
        chunks = np.flatnonzero((self.tenancy > 0) & (ahead > REPORT_HORIZON))
        in_use = -(-self.pages[chunks] // self.pages_per_block)
        return int((self.held[chunks] - np.maximum(in_use, 1)).sum())

    # Steps.

    def make_step(self, step_id: int, requests: tuple[str, ...]) -> Step:
        states = np.array([self._states[r] for r in requests], dtype=np.int64)
        return Step(step_id, requests, states, self.tenancy[states], self.scheduled_end[states])

    def merge(self, step: Step, usage: Usage) -> tuple[list[tuple[str, int]], Growth]:
        """Take in the report of a step.

        Returns which requests hold how many blocks beyond their need in the coming step or two,
        and what the report adds. Rows of requests that were preempted, finished or aborted since
        are dropped. Once per step for all requests: each array is read once.
        """
        states, ends, rows, live = step.states, step.ends, usage.fullest, usage.live
        valid = self.tenancy[states] == step.tenancies
        if not valid.all():
            states, ends, rows, live = states[valid], ends[valid], rows[valid], live[valid]
        rows = rows.astype(np.int64)
        pages, need, fullest = rows[:, 0], rows[:, 1:-1], rows[:, -1]
        held = self.held[states]
        spare = held * self.pages_per_block - pages
        if (spare < 0).any():
            over = spare < 0
            raise RuntimeError(
                f"DMS pages in use beyond the blocks held, states {states[over].tolist()}: "
                f"{pages[over].tolist()} pages, {held[over].tolist()} blocks"
            )
        growth = self._growth(states, ends, fullest, live)
        self.pages[states] = pages
        self.need[states, 1:] = need
        self.fullest[states], self.live[states] = fullest, live
        self.reported_end[states], self.again[states] = ends, 0

        # As `required_one`, looking ahead to the report's horizon: a decoding request would only
        # ask again for what it returned.
        scheduled = self.scheduled_end[states]
        ahead = np.maximum(scheduled + 1 - ends, REPORT_HORIZON)
        crude = self.num_rows * -(-ahead // self.page_size)
        cap = pages + np.where(ahead == REPORT_HORIZON, need[:, -1], crude)
        cap = np.minimum(cap, self.num_rows * -(-(ends + ahead) // self.page_size))
        surplus = np.maximum(held - np.maximum(-(-cap // self.pages_per_block), 1), 0)
        returns: list[tuple[str, int]] = []
        if surplus.any():
            held -= surplus
            self.held[states] = held
            spare -= surplus * self.pages_per_block
            index = np.flatnonzero(valid)
            returns = [(step.requests[index[i]], surplus.item(i)) for i in np.flatnonzero(surplus)]
        self.safe_end[states] = self._safe_ends(ends, scheduled, held, spare, need)
        return returns, growth

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

    def _growth(
        self, states: np.ndarray, ends: np.ndarray, fullest: np.ndarray, live: np.ndarray
    ) -> Growth:
        before = self.reported_end[states]
        past = np.maximum(ends - self.ring_size, 0)
        past_before = np.maximum(before - self.ring_size, 0)
        eligible = int((past - past_before).sum())
        in_window = int((ends - before).sum()) - eligible  # slots of each row
        return Growth(
            eligible,
            int((fullest - self.fullest[states]).sum()) - self.num_rows * in_window,
            int((live - self.live[states]).sum()) - self.all_rows * in_window,
        )
