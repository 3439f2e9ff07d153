"""A worker that only counts, for `core_sim`.

It keeps what the device would keep: per request and (layer, head) row the live slots, and pages
handed out lowest first from the blocks that it was told of. It never asks the scheduler.
"""

import numpy as np
import torch

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import DMSReport
from vllm_dms.arena.report import REPORT_HORIZON, REPORT_WIDTH


class Worker:
    """One rank. State 0 is the null state."""

    def __init__(self, layout: ArenaLayout, max_num_seqs: int, seed: int) -> None:
        self.layout = layout
        self.rng = np.random.default_rng(seed)
        self.rows = np.zeros((max_num_seqs + 1, layout.max_blocks_per_request), dtype=np.int64)
        self.live = np.zeros((max_num_seqs + 1, layout.num_rows), dtype=np.int64)
        self.tokens = np.zeros(max_num_seqs + 1, dtype=np.int64)
        # What the blocks hold: (whose, which of its row), or a record of `save`.
        self.content: dict[int, object] = {}
        self.texts: dict[int, object] = {}  # what the request of a state was fed, and its salt
        self.num_restored = self.num_again = 0
        self.stored: set[int] = set()  # states whose next token is one that they have

    def pages(self, state: int) -> int:
        return int((-(-self.live[state] // self.layout.page_size)).sum())

    def blocks_used(self, state: int) -> list[int]:
        return self.rows[state, : -(-self.pages(state) // self.layout.pages_per_block)].tolist()

    def save(self, copy) -> None:
        """Of blocks and record; the text is what the request was fed so far."""
        source, target, record = (part.tolist() for part in copy.blocks)
        used, state = len(self.blocks_used(copy.state)), copy.state
        assert used <= len(source) and source[:used] == self.blocks_used(state)
        held = [self.content[b] for b in source[:used]]
        for block, content in zip(target, held, strict=False):
            self.content[block] = content
        text = (self.texts[state][0][: self.tokens[state]], self.texts[state][1])
        for block in record:
            self.content[block] = (held, self.live[state].copy(), self.tokens[state], text)

    def restore(self, copy) -> None:
        source, target, record = (part.tolist() for part in copy.blocks)
        held, live, tokens, text = self.content[record[0]]
        assert all(self.content[b] is self.content[record[0]] for b in record)
        assert [self.content[b] for b in source[: len(held)]] == held, "overwritten since"
        own, salt = self.texts[copy.state]
        assert (own[:tokens], salt) == text, "another text's state"
        for block, content in zip(target, held, strict=False):
            self.content[block] = content
        self.live[copy.state], self.tokens[copy.state] = live, tokens
        if copy.again >= 0:
            assert copy.again == tokens - 1
            self.tokens[copy.state] -= 1
            self.live[copy.state] -= tokens <= self.layout.ring_size
            self.stored.add(copy.state)
            self.num_again += 1
        assert target[: len(held)] == self.blocks_used(copy.state)
        self.num_restored += 1

    def run(self, meta, num_tokens, keep_rates, texts=()) -> DMSReport:
        """num_tokens, keep_rates, texts: by request, in the order of ``meta.states``."""
        for copy in meta.saves:
            self.save(copy)
        self.texts.update(zip(meta.states.tolist(), texts, strict=False))
        for state, position, block in meta.row_updates:
            self.rows[state, position] = block
        for state, first in meta.starts:
            assert self.rows[state, 0] == first
            self.live[state] = 0
            self.tokens[state] = 0
            self.stored.discard(state)
        for copy in meta.restores:
            self.restore(copy)
        for state, count, keep in zip(meta.states, num_tokens, keep_rates, strict=True):
            start, ring = self.tokens[state], self.layout.ring_size
            self.tokens[state] = end = start + count
            leaving = max(end - ring, 0) - max(start - ring, 0)
            if state in self.stored:
                assert count == 1 and leaving == (start >= ring)
                self.stored.discard(state)
                leaving = 0
            # Uneven heads: every row keeps at its own rate around the request's.
            rates = np.clip(keep * self.rng.uniform(0.5, 1.5, self.layout.num_rows), 0, 1)
            rates = np.where(keep >= 1, 1.0, rates)
            self.live[state] += self.rng.binomial(leaving, rates)
            self.live[state] += min(end, ring) - min(start, ring)
            for i, block in enumerate(self.blocks_used(state)):
                self.content[block] = (meta.step_id, state, i)
        out = np.zeros((len(self.rows), REPORT_WIDTH), dtype=np.int32)
        size = self.layout.page_size
        for state in meta.states:
            live = self.live[state]
            pages = [(-(-(live + k) // size)).sum() for k in range(REPORT_HORIZON + 1)]
            out[state] = [pages[0], *(p - pages[0] for p in pages[1:]), live.sum()]
        return DMSReport(meta.step_id, meta.states.astype(np.int64), torch.from_numpy(out))
