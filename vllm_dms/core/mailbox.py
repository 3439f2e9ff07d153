"""What the scheduler tells the worker with the next step, and the steps whose reports are due."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_dms.arena.messages import Copy, DMSStepMeta
from vllm_dms.core.records import Step


class Mailbox:
    """Messages are filled while a step is scheduled, and posted with it, in the order of steps."""

    def __init__(self) -> None:
        self.in_flight: deque[Step] = deque()
        # state index, position in its row of blocks, ids of the blocks from there on
        self._row_updates: list[tuple[int, int, list[int]]] = []
        self._starts: dict[int, int] = {}
        self._fail_blocks: list[int] = []
        self._fail_requests: list[str] = []
        self._saves: list[Copy] = []
        self._restores: list[Copy] = []

    def start(self, state: int, first: KVCacheBlock) -> None:
        """The device finds the state index by the request's first block."""
        self._starts[state] = first.block_id

    def give(self, state: int, position: int, blocks: Iterable[KVCacheBlock]) -> None:
        """More blocks for the row of a state index, from ``position`` on."""
        self._row_updates.append((state, position, [block.block_id for block in blocks]))

    def forget(self, state: int) -> None:
        """Its request is gone, perhaps preempted in the step that gave it blocks: the worker must
        not hear of them."""
        self._starts.pop(state, None)
        if self._row_updates:
            self._row_updates = [u for u in self._row_updates if u[0] != state]
        if self._restores:
            self._restores = [copy for copy in self._restores if copy.state != state]

    def save(self, state: int, *blocks: list[KVCacheBlock]) -> None:
        """What the steps so far left; even of a request that is about to go."""
        self._saves.append(make_copy(state, *blocks))

    def restore(self, state: int, *blocks: list[KVCacheBlock], again: int) -> None:
        """For a request that starts in the coming step."""
        self._restores.append(make_copy(state, *blocks, again=again))

    def fail_running(self, first: KVCacheBlock) -> None:
        """Have the worker name this block as failed: vLLM ends the running request that owns it."""
        self._fail_blocks.append(first.block_id)

    def fail_waiting(self, request_id: str) -> None:
        """Have the worker say that a transfer failed for which this request waits."""
        self._fail_requests.append(request_id)

    def post(self, step: Step) -> DMSStepMeta:
        if len(step.states):
            self.in_flight.append(step)
        meta = DMSStepMeta(
            step_id=step.step_id,
            states=step.states.astype(np.int32),
            row_updates=make_row_updates(self._row_updates),
            starts=np.array(list(self._starts.items()), dtype=np.int32).reshape(-1, 2),
            fail_blocks=frozenset(self._fail_blocks),
            fail_requests=frozenset(self._fail_requests),
            saves=tuple(self._saves),
            restores=tuple(self._restores),
        )
        self._row_updates, self._starts = [], {}
        self._fail_blocks, self._fail_requests = [], []
        self._saves, self._restores = [], []
        return meta

    def receive(self, step_id: int) -> Step:
        """The step that this report is of: reports arrive in the order of steps."""
        step = self.in_flight.popleft()
        if step.step_id != step_id:
            raise RuntimeError(f"report of step {step_id} while step {step.step_id} is due")
        return step


def make_row_updates(updates: Sequence[tuple[int, int, list[int]]]) -> np.ndarray:
    """`DMSStepMeta.row_updates`; a request that goes on from a state has hundreds."""
    counts = [len(ids) for _, _, ids in updates]
    rows = np.empty((sum(counts), 3), dtype=np.int32)
    if updates:
        states, positions, ids = zip(*updates, strict=True)
        before = np.cumsum(counts) - counts  # rows
        rows[:, 0] = np.repeat(states, counts)
        rows[:, 1] = np.arange(len(rows)) + np.repeat(np.array(positions) - before, counts)
        rows[:, 2] = list(itertools.chain.from_iterable(ids))
    return rows


def make_copy(state: int, *blocks: list[KVCacheBlock], again: int = -1) -> Copy:
    source, target, record = (np.array([b.block_id for b in part], np.int32) for part in blocks)
    return Copy(state, (source, target, record), again)
