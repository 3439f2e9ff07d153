"""Conversations with a server: what is asked of it, and what is counted."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import multi_turn


class Answers:
    """A server whose cache holds ``capacity`` conversations, told apart by how they begin."""

    def __init__(self, capacity):
        self.capacity, self.texts = capacity, {}

    def ask(self, prompt, answer, ids=True):
        key = tuple(prompt[:8])
        cached = self.texts.pop(key, 0)
        self.texts[key] = len(prompt) + answer - 1
        if len(self.texts) > self.capacity:
            self.texts.pop(next(iter(self.texts)))
        turn = {"ttft_s": 0.5 if cached else 1.5, "cached": cached, "prompt": len(prompt)}
        return turn | ({"said": [7] * answer} if ids else {})


@pytest.mark.parametrize("capacity", [0, 1, 3, 11, 100, 300])
def test_conversations_are_counted_up_to_the_last_number_that_all_find_their_past(capacity):
    load = multi_turn.Kept(1, first=80, further=8, answer=4, most=256)
    row, rounds = multi_turn.keep(Answers(capacity), load, seed=0)
    found = row["conversations_kept"]
    assert capacity * 8 / 9 - 1 < found <= capacity or found >= load.most
    hits = {r["conversations"]: r["hits"] for r in rounds}
    assert all((number == n) == (number <= capacity) for number, n in hits.items())


def test_a_turn_s_prompt_is_all_that_was_said_before():
    load = multi_turn.Talks(conversations=3, at_once=1, turns=3, message=20, answer=5)
    row, turns = multi_turn.talk(Answers(9), load, seed=0)
    assert [t["prompt"] for t in turns] == 3 * [20, 45, 70]
    assert [t["cached"] for t in turns] == 3 * [0, 24, 49]
    assert row["hit_tokens"] == 3 * 73 and row["prompt_tokens"] == 3 * 135
    assert row["completed"] == 9 and row["later_ttft_ms"] == 500
    assert row["mean_ttft_ms"] == pytest.approx(1000 * 2.5 / 3)
    document = multi_turn.Talks(4, 2, turns=1, message=10, answer=5, document=50)
    row, turns = multi_turn.talk(Answers(9), document, seed=0)
    # Questions asked before have shown the text to the server.
    assert all(t["cached"] for t in turns) and "later_ttft_ms" not in row
