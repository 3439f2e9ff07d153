"""Where prompts diverge, and so where a prompt's chunk is to end and its state to be kept.

A branch is the longest prefix of whole blocks that a prompt shares with another one that was seen:
with one that came before, or one that waits. Who shares a prefix that is being read just now waits
for its state.
"""

from collections import OrderedDict
from typing import NamedTuple

from vllm.v1.request import Request

from vllm_dms.core.kept import KeptStates
from vllm_dms.core.ledger import Ledger

MAX_SEEN = 1 << 16  # hashes of blocks of prompts
SHARED = ""  # of a block that prompts of several requests have; no request has this id


class Due(NamedTuple):
    """A state to keep before the next step: of a request at what that step leaves."""

    request: Request
    state: int
    tenancy: int
    num_tokens: int
    awaited: bool  # others wait for it, or have that prefix, too


class Branches:
    """Prompts that are not read to their ends yet."""

    def __init__(self, ledger: Ledger, kept: KeptStates, block_size: int, worth: int) -> None:
        """``worth``: tokens that make a chunk of its own, or a wait, pay off."""
        self._ledger, self._kept = ledger, kept
        self._block_size, self._worth = block_size, worth
        self._prompts: dict[str, Request] = {}
        # Of those, by their first blocks, that started, if not preempted since.
        self._reading: dict[bytes, dict[str, Request]] = {}
        self._cuts: dict[str, set[int]] = {}
        self._seen: OrderedDict[bytes, str] = OrderedDict()

    def arrives(self, request: Request) -> None:
        self._prompts[request.request_id] = request
        # Ends of prompts go first when there are too many.
        for block_hash in reversed(request.block_hashes):
            owner = self._seen.setdefault(block_hash, request.request_id)
            if owner == SHARED:
                break  # and so are those before it
            if owner != request.request_id:
                self._seen[block_hash] = SHARED
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def starts(self, request_id: str) -> None:
        """It got a state index: what it leaves behind is worth a wait."""
        request = self._prompts.get(request_id)
        if request is not None and request.block_hashes:
            self._reading.setdefault(request.block_hashes[0], {})[request_id] = request

    def forget(self, request_id: str) -> None:
        self._cuts.pop(request_id, None)
        request = self._prompts.pop(request_id, None)
        if request is None or not request.block_hashes:
            return
        first = request.block_hashes[0]
        group = self._reading.get(first, {})
        group.pop(request_id, None)
        if not group:
            self._reading.pop(first, None)

    def scheduled(self, request_id: str, state: int, tenancy: int, end: int) -> Due | None:
        """What is to be kept of a step that brings the request to ``end`` tokens."""
        request = self._prompts.get(request_id)
        if request is None:
            return None
        shared = end in self._cuts.get(request_id, ())
        due = shared or end == request.num_prompt_tokens
        if end >= request.num_prompt_tokens:
            self.forget(request_id)
        return Due(request, state, tenancy, end, shared) if due else None

    def chunk_of(self, request: Request, start: int, num_tokens: int) -> int:
        """Of ``num_tokens`` from ``start``, how many the next chunk has: it ends where a state is
        to be kept."""
        request_id, end = request.request_id, start + num_tokens
        if request_id not in self._prompts:
            return num_tokens
        cuts = self._cuts.setdefault(request_id, set())
        branch = self._branch(request)
        if start < branch <= end:
            kept = self._kept.find(request, branch)
            if branch - (kept.num_tokens if kept else 0) >= self._worth:
                cuts.add(branch)
        return min((cut for cut in cuts if start < cut < end), default=end) - start

    def _branch(self, request: Request) -> int:
        """Tokens of whole blocks, up to one before the prompt's end, that another prompt has."""
        hashes = request.block_hashes
        low, high = 0, min(len(hashes), (request.num_prompt_tokens - 1) // self._block_size)
        while low < high:  # whoever has a block has those before it
            middle = (low + high + 1) // 2
            owner = self._seen.get(hashes[middle - 1], request.request_id)
            low, high = (low, middle - 1) if owner == request.request_id else (middle, high)
        return low * self._block_size

    def is_coming(self, request: Request, best: int, limit: int) -> bool:
        """Whether a state of more than ``best`` tokens is about to be left, up to ``limit``."""
        if limit - best < self._worth or not request.block_hashes:
            return False
        for other in self._reading.get(request.block_hashes[0], {}).values():
            state = self._ledger.state_of(other.request_id)
            if state is None or other is request:
                continue
            shared = min(_num_shared_blocks(request, other), limit // self._block_size)
            point = min(shared * self._block_size, other.num_prompt_tokens)
            behind = self._ledger.scheduled_end.item(state) <= point
            if behind and point - best >= self._worth:
                self._cuts.setdefault(other.request_id, set()).add(point)
                return True
        return False


def _num_shared_blocks(a: Request, b: Request) -> int:
    """Full blocks that two requests begin with: equal hashes mean that all before is equal."""
    low, high = 0, min(len(a.block_hashes), len(b.block_hashes))
    while low < high:
        middle = (low + high + 1) // 2
        same = a.block_hashes[middle - 1] == b.block_hashes[middle - 1]
        low, high = (middle, high) if same else (low, middle - 1)
    return low
