"""What a worker reports of each request after a step: the columns of a row, and how ranks merge.

A row is int32 [REPORT_WIDTH]::

    0                       pages in use
    1 .. REPORT_HORIZON     the most further pages that k more tokens can take, sum over rows of
                            ceil((live + k) / P) - ceil(live / P)
    REPORT_WIDTH - 1        live slots, summed over the (layer, head) rows of the rank

Tensor-parallel ranks hold different heads in the same blocks. So the fullest rank decides how many
blocks a request needs, and what is live is the sum over ranks. NumPy only: the ledger reads this.
"""

from typing import NamedTuple

import numpy as np

# Tokens in flight for which a report gives the exact worst case; beyond, a bound is used.
REPORT_HORIZON = 4
REPORT_WIDTH = 1 + REPORT_HORIZON + 1


class Usage(NamedTuple):
    """The rows of a step's requests over all ranks."""

    fullest: np.ndarray  # int [n, REPORT_WIDTH]: of each column the largest of any rank
    live: np.ndarray  # int [n]: live slots summed over the rows of all ranks

    @classmethod
    def of_rank(cls, rows: np.ndarray) -> "Usage":
        return cls(rows, rows[:, -1].astype(np.int64))

    def merged(self, other: "Usage") -> "Usage":
        return Usage(np.maximum(self.fullest, other.fullest), self.live + other.live)
