"""Requests with streaming input: several turns, between which they wait and keep their blocks.

When a turn stops, vLLM takes back the step it scheduled ahead, whose token can't be taken out of
the arena again. So a session has one step in flight at a time.

A session that waits, for input or for the blocks of its next turn, isn't running, so vLLM never
preempts it. Where sessions hold what somebody needs and nobody runs, one of them gives way: its
blocks return to the pool, and its next turn reads its tokens again, as after a preemption.
"""

from vllm.v1.request import Request, RequestStatus

from vllm_dms.core.ledger import Ledger

IDLE = RequestStatus.WAITING_FOR_STREAMING_REQ


class Sessions:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: dict[str, Request] = {}
        self._paused = False

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request: Request) -> None:
        self._open[request.request_id] = request

    def close(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def waiting(self, request_id: str) -> Request | None:
        """The session, if it waits for the blocks of its next turn."""
        session = self._open.get(request_id)
        return session if session and session.status == RequestStatus.WAITING else None

    # One step at a time.

    def new_step_starts(self) -> None:
        self._paused = False

    def must_pause(self, request_id: str, state: int) -> bool:
        session = self._open.get(request_id)
        if session is None or not self._ledger.in_flight(state):
            return False
        # The scheduler asks about the shortage of running requests only.
        self._paused = session.status == RequestStatus.RUNNING
        return True

    def take_pause(self) -> bool:
        """Whether the running request that just got no blocks is a session that pauses."""
        paused, self._paused = self._paused, False
        return paused

    # Giving way.

    def lost_its_state(self, request_id: str) -> bool:
        """Whether the session gave way since its last turn, and is about to go on as if not."""
        session = self._open.get(request_id)
        return (
            session is not None
            and session.status == RequestStatus.WAITING
            and session.num_computed_tokens > 0
            and self._ledger.state_of(request_id) is None
        )

    def start_anew(self) -> None:
        """Sessions without a state read their tokens again. While they are idle vLLM still needs
        the count, to know which of the tokens are computed and kept."""
        for request_id, session in self._open.items():
            if self.lost_its_state(request_id):
                session.num_computed_tokens = 0

    def choose_to_give_way(self, needy: str) -> str | None:
        """A session that holds blocks and isn't running: idle ones first, then the youngest."""
        holders = [
            s
            for request_id, s in self._open.items()
            if request_id != needy
            and s.status in (IDLE, RequestStatus.WAITING)
            and self._ledger.state_of(request_id) is not None
        ]
        if not holders:
            return None
        return max(holders, key=lambda s: (s.status == IDLE, s.arrival_time)).request_id
