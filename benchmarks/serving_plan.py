"""What can be run, and the limits that an engine needs for it. Imports nothing of vLLM: the process
that starts engines has no use for it.

Lengths count in units of ``unit`` tokens, 1024 but in rehearsals: "8k" is 8 units.
"""

import math
from dataclasses import dataclass

PREFILL_UNITS = {"prefill-8k": 8, "prefill-32k": 32, "prefill-128k": 128}
WORKLOADS = ("decode-8k", "saturated-8k", "capacity-8k", *PREFILL_UNITS, "reason-1k-8k")
QUIET_STEPS = 8  # quiet steps after which the engine has admitted what it will
# Rows have these; a figure that does not apply is None.
FIGURES = (
    "concurrency",
    "decode_tok_s",
    "prefill_tok_s",
    "requests_held",
    "preemptions",
    "live_compression",
)


@dataclass
class Plan:
    """What to run in one engine."""

    workloads: list[str]
    levels: list[int]  # of decode-8k
    window_steps: int  # of decode measurements
    max_requests: int  # max_num_seqs
    chunk: int  # max_num_batched_tokens
    unit: int = 1024
    reason_requests: int = 64

    @property
    def output_limit(self) -> int:
        """Tokens after which a request of decode-8k or saturated-8k would end: after the window."""
        ramp = math.ceil(self.max_requests * 8 * self.unit / self.chunk)
        return ramp + (len(self.levels) + 4) * (self.window_steps + 2 * QUIET_STEPS)

    @property
    def max_model_len(self) -> int:
        lengths = [PREFILL_UNITS[w] * self.unit + 64 for w in self.workloads if w in PREFILL_UNITS]
        if {"decode-8k", "saturated-8k", "capacity-8k"} & set(self.workloads):
            lengths.append(8 * self.unit + self.output_limit)
        if "reason-1k-8k" in self.workloads:
            lengths.append(9 * self.unit)
        return max(lengths)
