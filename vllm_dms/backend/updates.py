"""The worker's end of the channel: block rows onto the device, page counts off it.

Both only enqueue work on the current stream, so they keep their place between two steps.
"""

import numpy as np
import torch

from vllm_dms.arena.messages import DMSReport, DMSStepMeta
from vllm_dms.arena.report import REPORT_WIDTH
from vllm_dms.backend.ops import Ops
from vllm_dms.backend.snapshots import Snapshots
from vllm_dms.backend.state import ArenaState

# More than the steps that can be in flight, so that a buffer's copy is long done when it is reused.
NUM_BUFFERS = 8
# A step that starts the null state with block 0 and reports nobody: as if it had not been.
NULL_STEP = DMSStepMeta(
    step_id=-1,
    states=np.zeros(0, np.int32),
    row_updates=np.zeros((1, 3), np.int32),
    starts=np.zeros((1, 2), np.int32),
    fail_blocks=frozenset(),
    fail_requests=frozenset(),
)


def apply_message(state: ArenaState, snapshots: Snapshots | None, meta: DMSStepMeta) -> None:
    """Must precede the step's forward pass on the stream.

    What is kept is what the steps before this one left, and its index may be another's from now
    on; what is restored is read before the step writes anything.
    """
    assert snapshots is not None or not (meta.saves or meta.restores), "prefix_cache is off"
    if snapshots is not None and meta.saves:
        snapshots.save(meta.saves)
    apply_updates(state, meta)
    if snapshots is not None and meta.restores:
        snapshots.restore(meta.restores)


def apply_updates(state: ArenaState, meta: DMSStepMeta) -> None:
    """Bring the block rows up to date."""
    num_rows, num_starts = len(meta.row_updates), len(meta.starts)
    if num_rows == 0 and num_starts == 0:
        return
    packed = torch.from_numpy(np.concatenate((meta.row_updates.T.ravel(), meta.starts.T.ravel())))
    device = state.block_rows.device
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    states, positions, blocks = packed[: 3 * num_rows].view(3, num_rows).unbind()
    state.block_rows.index_put_((states, positions), blocks)
    if num_starts:
        states, blocks = packed[3 * num_rows :].view(2, num_starts).unbind()
        state.state_of_block.index_put_((blocks,), states)
        state.pages_used.index_fill_(0, states.long(), 0)
        state.leaves_used.index_fill_(0, states.long(), 0)


def make_buffers(
    shape: tuple[int, int], device: torch.device
) -> list[tuple[torch.Tensor, torch.cuda.Event]]:
    """Where reports are copied to, and the events of their arrival. None on a CPU: a report is read
    when it is made."""
    if device.type != "cuda":
        return []
    # A waiting thread sleeps instead of spinning on the driver's lock.
    return [
        (torch.zeros(shape, dtype=torch.int32, pin_memory=True), torch.cuda.Event(blocking=True))
        for _ in range(NUM_BUFFERS)
    ]


class Reporter:
    """Makes a step's `DMSReport` without waiting for the step."""

    def __init__(self, state: ArenaState, ops: Ops) -> None:
        self._ops = ops
        device, shape = state.live.device, (state.num_states, REPORT_WIDTH)
        self._on_device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._buffers = make_buffers(shape, device)
        self._reports: list[DMSReport | None] = [None] * len(self._buffers)
        self._next = 0

    def warm_up(self) -> None:
        self._ops.report(self._on_device)
        for host, event in self._buffers:
            host.copy_(self._on_device, non_blocking=True)
            event.record()

    def report(self, meta: DMSStepMeta) -> DMSReport:
        """Must follow the step's forward pass on the stream."""
        self._ops.report(self._on_device)
        if not self._buffers:
            result = DMSReport(meta.step_id, meta.states, self._on_device)
            result.usage  # noqa: B018 the tensor is overwritten in the next step
            return result
        slot = self._next
        self._next = (slot + 1) % len(self._buffers)
        previous = self._reports[slot]
        if previous is not None:
            previous.usage  # noqa: B018 read it before its buffer is overwritten
        host, event = self._buffers[slot]
        host.copy_(self._on_device, non_blocking=True)
        event.record()
        self._reports[slot] = result = DMSReport(meta.step_id, meta.states, host, event)
        return result
