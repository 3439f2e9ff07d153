"""What the ledger and those around it tell each other. No vLLM and no torch: see the ledger."""

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """What a step was scheduled with, kept until its report arrives: [n], by request."""

    step_id: int
    requests: tuple[str, ...]
    states: np.ndarray  # state index
    tenancies: np.ndarray  # of that index when the step was scheduled
    ends: np.ndarray  # tokens of the request after the step


class Mark(NamedTuple):
    """What a report said of a request, kept for those that go on from there."""

    num_tokens: int
    row: np.ndarray  # int [REPORT_WIDTH] of the fullest rank
    live: int  # slots over the rows of all ranks

    @property
    def num_pages(self) -> int:
        return self.row.item(0)


class Growth(NamedTuple):
    """What one report adds: tokens that left their window, and what was kept of them."""

    eligible: int  # tokens
    fullest: int  # slots, over the rows of the fullest rank
    kept: int  # slots, over the rows of all ranks
