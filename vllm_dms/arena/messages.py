"""What scheduler and worker tell each other, once per step."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vllm_dms.arena.report import Usage


class Copy(NamedTuple):
    """A request's state is kept, or given to another; see `backend.snapshots`."""

    state: int  # index
    # int32 [n], [n], [record_blocks]: read from, written to, and what lies beside them
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray]
    again: int = -1  # restored: position of the last token, if it is about to be stored once more


@dataclass(frozen=True)
class DMSStepMeta(KVConnectorMetadata):
    """Scheduler -> worker, before the step runs. Arrays are int32."""

    step_id: int
    states: np.ndarray  # [n] state indices of the requests in the step
    row_updates: np.ndarray  # [u, 3] state index, position in its row of blocks, block id
    starts: np.ndarray  # [s, 2] new and resumed requests: state index, first block
    fail_blocks: frozenset[int]  # first blocks of running requests to end with an error
    fail_requests: frozenset[str]  # waiting ones
    # In their order; before the rest of this message, and after it.
    saves: tuple[Copy, ...] = ()
    restores: tuple[Copy, ...] = ()


class DMSReport(KVConnectorWorkerMetadata):
    """Worker -> scheduler, after the step: one row (see `arena.report`) per request in the step.

    Made while the step still runs on the device; the rows are read when they are first asked
    for, or when the report is pickled to leave the worker's process.
    """

    def __init__(
        self,
        step_id: int,
        states: np.ndarray,
        host: torch.Tensor,
        copied: "torch.cuda.Event | None" = None,
    ) -> None:
        """``host`` int32 [num_states, REPORT_WIDTH]: complete once ``copied`` has happened."""
        self.step_id = step_id
        self._states = states
        self._host = host
        self._copied = copied
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """In the order of the step's states."""
        if self._usage is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._usage = Usage.of_rank(self._host.numpy()[self._states])
        return self._usage

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "DMSReport":
        """The report of two ranks, or groups of ranks, of one step."""
        assert isinstance(other, DMSReport) and other.step_id == self.step_id
        return DMSReport._of_usage(self.step_id, self.usage.merged(other.usage))

    @classmethod
    def _of_usage(cls, step_id: int, usage: Usage) -> "DMSReport":
        report = cls.__new__(cls)
        report.step_id, report._usage = step_id, usage
        return report

    def __reduce__(self) -> tuple[Any, ...]:
        return DMSReport._of_usage, (self.step_id, self.usage)
