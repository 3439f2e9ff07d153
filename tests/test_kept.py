"""Which kept states go when the pool is full, and which stay; with workers that only count."""

import pytest
from core_sim import Engine, make_config


class Talks:
    """Conversations with an engine, one turn at a time: 160 tokens, which take 10 blocks until
    they are read and 2 later, with their record 3; then 16 a turn."""

    def __init__(self, num_blocks, lag=0):
        self.engine = Engine(*make_config(prefix_cache=True), num_blocks=num_blocks, lag=lag)
        self.texts: dict[str, list[int]] = {}
        self.asked = 0

    @property
    def kept(self):
        return self.engine.manager.prefix.kept

    def ask(self, ids) -> int:
        """Tokens that a request for an answer of 8 found."""
        self.asked += 1
        prefix = self.engine.manager.prefix
        found, restore = [0], prefix.restore

        def noted(request_id, *args):
            found[0] = prefix._hits[request_id].num_tokens
            return restore(request_id, *args)

        prefix.restore = noted
        self.engine.add(f"q{self.asked}", 0, 8, 0.05, ids=ids)
        self.engine.drain()
        prefix.restore = restore
        return found[0]

    def turn(self, name, answer=True) -> int:
        """``answer``: whether the next turn's prompt begins with all that was said."""
        text = self.texts.setdefault(name, [sum(map(ord, name))] * 152)
        text += [1] * 8
        found = self.ask(text)
        self.texts[name] = [*text, *[7] * 8] if answer else text
        return found


@pytest.mark.parametrize("answer", [True, False], ids=["whole", "prompts"])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_full_pool_of_conversations_has_a_state_of_each(lag, answer):
    talks = Talks(num_blocks=91, lag=lag)
    for name in 4 * "XYZ":  # until it is known what they go on from
        talks.turn(name, answer)
    names = "abcdefghijklmnopqrstuvw"
    for name in names:  # 3 blocks each, its record among them
        talks.turn(name, answer)
    found = [talks.turn(name, answer) for name in names]
    assert all(found), found
    assert talks.engine.num_preemptions == 0


def test_what_was_superseded_stays_as_long_as_there_are_blocks_that_nothing_is_in():
    talks = Talks(num_blocks=200)
    texts = []
    for _ in range(5):
        talks.turn("a")
        texts.append(list(talks.texts["a"]))
    assert [talks.ask([*text, 3]) for text in texts] == [len(text) - 1 for text in texts]


def test_what_was_superseded_goes_first():
    talks = Talks(num_blocks=61)
    for name in "abcccc":
        talks.turn(name)
    for i in range(20):
        if not talks.kept._giving_way:
            break
        talks.ask([30 + i] * 30)
    assert 0 < i < 19
    assert talks.turn("b") and talks.turn("a") and talks.turn("c")


def test_a_text_that_many_ask_about_is_copied_whatever_that_costs_others():
    talks = Talks(num_blocks=32)
    document = [5] * 160
    for question in ([1] * 9, [2] * 9):
        talks.ask(document + question)
    for i in range(12):
        assert talks.ask(document + [20 + i] * 9) == 160
        talks.ask([50 + i] * 30)


@pytest.mark.parametrize("lag", [0, 2])
def test_ends_of_questions_are_not_kept_at_the_expense_of_their_document(lag):
    talks = Talks(num_blocks=64, lag=lag)  # 2 for a question, 3 for its end, 4 for the document
    engine, document = talks.engine, [5] * 160
    for question in ([1] * 9, [2] * 9):
        talks.ask(document + question)
    (worker,) = engine.workers
    run, copied = worker.run, []

    def noted(meta, *args):
        copied.extend(meta.saves)
        return run(meta, *args)

    worker.run = noted
    for i in range(40):
        engine.add(f"n{i}", 0, 8, 0.05, ids=[*document, *[20 + i] * 9])
    engine.drain()
    assert worker.num_restored >= 40
    moved = sum((copy.blocks[0] != copy.blocks[1]).any() for copy in copied)
    assert moved <= 20, moved
    assert talks.ask([*document, *[90] * 9]) == 160


@pytest.mark.parametrize("lag", [0, 2])
def test_turns_shorter_than_a_window_leave_where_the_next_ones_go_on(lag):
    """Three at once, in a full pool; their answers come back otherwise."""
    talks = Talks(num_blocks=60, lag=lag)
    for name in 4 * "XYZ":
        talks.turn(name, answer=False)
    engine, texts = talks.engine, [[i] * 152 for i in range(20, 29)]
    (worker,) = engine.workers
    for turn in range(6):
        for i, text in enumerate(texts):
            text += [1] * 8
            engine.add(f"t{turn} {i}", 0, 8, 0.05, ids=list(text))
            if i % 3 == 2:
                engine.drain()
        if turn == 0:
            before = worker.num_restored
    assert worker.num_restored == before + 5 * len(texts)


@pytest.mark.parametrize("lag", [0, 2])
def test_a_prompt_that_comes_again_is_found_but_for_its_last_token(lag):
    talks = Talks(num_blocks=200, lag=lag)
    for length in (8, 10, 16, 17, 33, 160, 161, 200):  # of a ring of 16 slots, in pages of 8
        text = [length] * length
        assert [talks.ask(text) for _ in range(3)] == [0, length - 1, length - 1]
        assert talks.ask([*text, 1, 2]) == length
    assert talks.engine.workers[0].num_again == 16


def test_a_page_that_the_last_token_opened_is_not_given_back():
    talks = Talks(num_blocks=200)
    assert [talks.ask([3] * 9) for _ in range(2)] == [0, 0]


def test_a_prompt_that_comes_again_takes_its_state_over_where_there_is_no_room_for_a_copy():
    talks = Talks(num_blocks=16)
    text = [5] * 160
    for _ in range(4):
        talks.ask(text)
    assert talks.engine.workers[0].num_again == 3
    assert talks.ask([*text, 1, 2, 3]) == 160


def test_a_state_that_a_hit_took_over_is_found_again_at_the_end_of_its_request():
    talks = Talks(num_blocks=16)  # a prompt takes ten, and what it leaves four or five
    for turn in range(4):
        found = talks.turn("a")
        assert found == (len(talks.texts["a"]) - 17 if turn else 0)
