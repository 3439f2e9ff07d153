"""What a waiting request will probably need, so that admitting it does not lead to preemptions.

Only a guess: safety comes from the reservation caps of `ledger`, whatever is admitted.
"""

from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.core.records import Growth, Mark

# In tokens, over all requests. Until about this many have left a window, assume that all stay.
PRIOR_TOKENS = 4096
HALF_LIFE_TOKENS = 65536


class LiveFraction:
    """Share of past-window slots that are kept, over recent reports, on the fullest rank: it
    decides how many blocks a request needs."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._kept = self._eligible = float(PRIOR_TOKENS)

    def add(self, growth: Growth) -> None:
        decay = 0.5 ** (growth.eligible / HALF_LIFE_TOKENS)
        self._kept = self._kept * decay + growth.fullest / self._num_rows
        self._eligible = self._eligible * decay + growth.eligible

    @property
    def value(self) -> float:
        return min(max(self._kept / self._eligible, 0.0), 1.0)


def estimate_blocks(
    spec: DMSCacheSpec, num_tokens: int, live_fraction: float, mark: Mark | None = None
) -> int:
    """Blocks that a prompt of ``num_tokens`` occupies when its last chunk runs, the peak.

    By then the earlier tokens are down to window and survivors (plus half a page per row, the
    average remainder), and the last chunk is still dense. ``mark``: where the request goes on from.
    """
    layout = spec.layout
    start = 0 if mark is None else mark.num_tokens
    chunk = min(num_tokens - start, spec.max_chunk_tokens)
    settled = num_tokens - chunk
    if mark is not None and start >= layout.ring_size:
        slots = live_fraction * (settled - start)
        pages = mark.num_pages + layout.num_rows * slots / layout.page_size
    else:
        window = min(settled, layout.ring_size)
        slots = window + live_fraction * (settled - window) + layout.page_size / 2
        pages = layout.num_rows * slots / layout.page_size
    pages = min(pages, spec.dense_pages(settled))
    pages = min(pages + spec.dense_pages(chunk), spec.dense_pages(num_tokens))
    return max(int(-(-pages // layout.pages_per_block)), 1)


class Admission:
    """Blocks that a waiting request is let in with."""

    def __init__(self, spec: DMSCacheSpec) -> None:
        self._spec = spec
        self.live_fraction = LiveFraction(spec.layout.num_rows)
        # What preempted requests had kept: the average says little about when they fit again.
        self._own: dict[str, float] = {}

    def preempted(self, request_id: str, live_fraction: float) -> None:
        self._own[request_id] = live_fraction

    def finished(self, request_id: str) -> None:
        self._own.pop(request_id, None)

    def estimate(self, request_id: str, num_tokens: int, mark: Mark | None, most: int) -> int:
        fraction = max(self.live_fraction.value, self._own.get(request_id, 0.0))
        # A request that is alone is let in whatever the guess, so that none waits for ever.
        return min(estimate_blocks(self._spec, num_tokens, fraction, mark), most)
