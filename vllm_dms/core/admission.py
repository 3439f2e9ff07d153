"""What a waiting request will probably need, so that admitting it does not lead to preemptions.

Only a guess: safety comes from the reservation caps of `ledger`, whatever is admitted.
"""

from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.core.ledger import Growth

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


def estimate_blocks(spec: DMSCacheSpec, num_tokens: int, live_fraction: float) -> int:
    """Blocks that a prompt of ``num_tokens`` occupies when its last chunk runs, the peak.

    By then the earlier tokens are down to window and survivors (plus half a page per row, the
    average remainder), and the last chunk is still dense.
    """
    layout = spec.layout
    chunk = min(num_tokens, spec.max_chunk_tokens)
    settled = num_tokens - chunk
    window = min(settled, layout.ring_size)
    slots = window + live_fraction * (settled - window) + layout.page_size / 2
    pages = min(layout.num_rows * slots / layout.page_size, spec.dense_pages(settled))
    pages = min(pages + spec.dense_pages(chunk), spec.dense_pages(num_tokens))
    return max(int(-(-pages // layout.pages_per_block)), 1)
