"""Laws of the scheduler's side: blocks follow survivors, and nobody uses what it does not hold."""

from collections import Counter

import numpy as np
import pytest
from core_sim import Engine, make_config, make_engine, make_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from vllm_dms.arena.layout import choose_page_size
from vllm_dms.arena.messages import DMSReport
from vllm_dms.arena.report import Usage
from vllm_dms.core.integrity import check_integrity
from vllm_dms.core.ledger import Ledger
from vllm_dms.core.mailbox import Mailbox
from vllm_dms.core.records import Growth
from vllm_dms.core.sessions import Sessions
from vllm_dms.core.shortage import Shortage, Shortages


def report(step_id, *rows) -> DMSReport:
    return DMSReport._of_usage(step_id, Usage.of_rank(np.array(rows)))


# Texts begin the same, up to somewhere; 7 is what answers consist of. Salts keep them apart.
text = st.tuples(
    st.integers(0, 190), st.sampled_from([1, 7, 8]), st.sampled_from([None, None, None, "salt"])
)


def make_prompt(num_prompt, text):
    same, then, _ = text
    return [1] * min(same, num_prompt) + [then] * (num_prompt - same)


# Prompts of up to four chunks; answers long enough for several pages of survivors.
arrival = st.tuples(
    st.just("add"),
    st.integers(1, 190),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    text,
)
# Turns of up to three sessions with streaming input; five turns are within max_model_len.
turn = st.tuples(
    st.just("turn"), st.integers(0, 2), st.integers(1, 40), st.integers(1, 8),
    st.sampled_from([0.1, 1.0]),
)  # fmt: skip
command = st.one_of(
    arrival,
    turn,
    st.tuples(st.just("again"), st.integers(0, 7), st.integers(1, 60)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 7)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("close"), st.integers(0, 2)),
)
commands = st.tuples(
    st.lists(arrival, min_size=2, max_size=6), st.lists(command, min_size=5, max_size=30)
).map(lambda parts: parts[0] + parts[1])


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    commands=commands,
    lag=st.integers(0, 3),
    ranks=st.integers(1, 2),
    extra_blocks=st.integers(0, 12),
    ratio=st.sampled_from([1.0, 4.0]),
    policy=st.sampled_from(["fcfs", "priority"]),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 100),
)
def test_no_page_beyond_the_blocks_held_and_everything_returned(
    commands, lag, ranks, extra_blocks, ratio, policy, prefix_cache, seed
):
    """With states that are kept: that nobody wrote to their blocks, and that a request goes on only
    from the state of its own first tokens, the workers check."""
    engine = make_engine(ratio, extra_blocks, policy, prefix_cache, lag=lag, ranks=ranks, seed=seed)
    drive(engine, commands, ratio)


def drive(engine, commands, ratio):
    added, asked, turns = [], [], Counter()
    for command, *args in commands:
        if command == "again" and asked:
            # A prompt that came before, for another answer.
            num_prompt, _, *rest = asked[args[0] % len(asked)]
            command, args = "add", [num_prompt, args[1], *rest]
        if command == "add":
            asked.append(args)
            # Ids are used again, but not while a step has them: vLLM itself forbids that.
            request_id = f"r{len(added) % 8}"
            if not engine.knows(request_id):
                num_prompt, max_tokens, keep, text = args
                engine.add(
                    request_id, num_prompt, max_tokens, keep, len(added) * 7 % 3,
                    ids=make_prompt(num_prompt, text), salt=text[2],
                )  # fmt: skip
            added.append(request_id)
        elif command == "turn":
            request_id, *rest = f"s{args[0]}", *args[1:]
            is_open = request_id in engine.scheduler.requests
            if turns[request_id] < 5 and (is_open or not engine.knows(request_id)):
                engine.add(request_id, *rest, turn=True)
                turns[request_id] += 1
        elif command == "close" and f"s{args[0]}" in engine.scheduler.requests:
            engine.close(f"s{args[0]}")
        elif command == "step":
            for _ in range(args[0]):
                if engine.scheduler.has_unfinished_requests():
                    engine.step()
        elif command == "abort" and added:
            request_id = added[args[0] % len(added)]
            engine.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            engine.check()
        # While a session is open vLLM may refuse: it can't take the blocks of idle ones.
        elif command == "reset" and not any(engine.knows(f"s{i}") for i in range(3)):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
            engine.check()
            assert engine.manager.prefix is None or not engine.manager.prefix.kept.states
    engine.drain()  # idle sessions stop nobody
    for request_id in turns:
        if engine.knows(request_id):
            engine.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
    engine.drain()
    assert engine.manager.block_pool.get_num_free_blocks() == engine.manager.num_usable_blocks
    assert not engine.manager.ledger.requests and not engine.manager.mailbox.in_flight
    assert not engine.manager.sessions and not engine.scheduler.requests
    if ratio == 1.0:
        assert "error" not in engine.finished.values()


# Requests that do not fit.


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_request_that_can_never_fit_ends_with_an_error_and_the_others_go_on(lag):
    # 16 blocks would hold a dense request; the pool is 16 / 4 + 3 = 7 blocks.
    engine = make_engine(4.0, lag=lag)
    engine.add("dense", 180, 20, keep=1.0)
    engine.add("small", 10, 40, keep=0.0)
    for _ in range(3):
        engine.step()
    engine.add("sparse", 180, 20, keep=0.1)
    engine.drain()
    assert engine.finished == {"dense": "error", "small": "length", "sparse": "length"}
    assert engine.manager.block_pool.get_num_free_blocks() == 7


def test_the_block_that_names_a_failed_request_is_not_given_to_another():
    manager = make_engine(4.0).manager  # 7 blocks
    manager.allocate_new_blocks("dense", 48, 48)
    first = manager.req_to_blocks["dense"][0].block_id
    step_id = manager.close_step(["dense"]).step_id
    # 48 slots in each of 4 rows are 24 pages of 8; all are kept.
    manager.merge(report(step_id, [24, 4, 4, 4, 4, 4 * 48]))
    assert manager.get_num_blocks_to_allocate("dense", 200, [], 48, 48, 200) > 7
    assert manager.should_wait()
    assert manager.close_step([]).fail_blocks == {first}
    assert manager.should_wait() and not manager.close_step([]).fail_blocks  # told once
    manager.free("dense")
    check_integrity(manager)
    assert manager.block_pool.get_num_free_blocks() == 7  # free, but for nobody yet
    manager.new_step_starts()
    assert manager.get_num_blocks_to_allocate("six", 96, [], 0, 0, 96) == 7
    assert manager.get_num_blocks_to_allocate("seven", 112, [], 0, 0, 112) == 8
    manager.allocate_new_blocks("six", 96, 96)
    assert first not in [block.block_id for block in manager.req_to_blocks["six"]]
    check_integrity(manager)
    manager.forget_failed({first})
    assert manager.get_num_blocks_to_allocate("one", 16, [], 0, 0, 16) == 1
    manager.allocate_new_blocks("one", 16, 16)
    assert first == manager.req_to_blocks["one"][0].block_id


def test_waiting_for_reports_ends_with_those_in_flight_at_its_start():
    ledger, mailbox = Ledger(make_layout(), 2), Mailbox()
    state = ledger.start("a")
    ledger.scheduled_end[state] = 300
    ledger.grow(state, 100, 300)
    mailbox.post(ledger.make_step(1, ("a",)))
    mailbox.post(ledger.make_step(2, ("a",)))
    shortages = Shortages(ledger, mailbox, Sessions(ledger), {}, reserve_compression=1.0)
    shortages.note(Shortage("a", needed=4, missing=2))
    waits = []
    for step_id in (3, 4, 5):
        waits.append(shortages.should_wait(num_usable_blocks=10))
        mailbox.receive(step_id - 2)
        mailbox.post(ledger.make_step(step_id, ("a",)))
    assert waits == [True, True, False]
    shortages.resolved("a")
    assert shortages.should_wait(num_usable_blocks=10)


def test_a_request_that_a_report_made_fit_may_wait_anew():
    manager = make_engine(1.0).manager  # 16 blocks of 8 pages of 8 slots
    manager.allocate_new_blocks("a", 192, 192)  # in 4 rows: 12 blocks if all are kept
    manager.allocate_new_blocks("b", 24, 24)
    chunks = manager.close_step(["a", "b"]).step_id
    manager.allocate_new_blocks("b", 48, 48)
    manager.close_step(["b"])
    assert manager.get_num_blocks_to_allocate("b", 80, [], 48, 48, 80) == 2
    assert manager.should_wait() and "b" in manager.shortages._waits
    # Little was kept: the blocks that "b" has suffice now.
    manager.merge(report(chunks, [12, 4, 4, 4, 4, 4 * 20], [8, 4, 4, 4, 4, 4 * 16]))
    assert manager.get_num_blocks_to_allocate("b", 50, [], 48, 48, 50) == 0
    assert manager.allocate_new_blocks("b", 50, 50) == []
    assert "b" not in manager.shortages._waits
    check_integrity(manager)


def test_nobody_is_preempted_when_a_report_in_flight_brings_the_blocks():
    # Four chunks of 48 tokens in flight hold 12 of the 16 blocks until the first report.
    engine = make_engine(1.0, lag=3)
    engine.manager.admission.live_fraction.add(Growth(eligible=10**9, fullest=0, kept=0))
    for i, num_prompt in enumerate((16, 16, 16, 200)):
        engine.add(str(i), num_prompt, 25, keep=0.0)
    engine.drain()
    assert engine.num_preemptions == 0
    assert set(engine.finished.values()) == {"length"}


def test_preempted_requests_come_back_and_finish():
    engine = make_engine(1.0)
    for i in range(4):
        engine.add(f"r{i}", 60, 120, keep=1.0)  # 12 blocks each in the end; there are 16
    engine.drain()
    assert engine.num_preemptions > 0
    assert engine.connector.stats.preemptions == engine.num_preemptions
    assert set(engine.finished.values()) == {"length"}


def test_a_request_that_kept_much_comes_back_only_when_that_fits():
    engine = make_engine(1.0)
    engine.manager.admission.live_fraction.add(Growth(eligible=10**9, fullest=0, kept=0))
    for i in range(4):
        engine.add(f"r{i}", 60, 120, keep=1.0)
    engine.drain()
    # The average of others lets each of them in too early, but only once.
    assert 0 < engine.num_preemptions <= 6


# The memory law.


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
    ("window", "num_layers", "num_kv_heads", "block_size"),
    [(16, 2, 2, 16), (64, 4, 4, 16), (128, 36, 8, 16), (256, 16, 8, 32), (512, 36, 8, 16)],
    ids=lambda v: str(v),
)
def test_held_blocks_follow_the_live_slots(window, num_layers, num_kv_heads, block_size, lag):
    """At 16 windows and more with 7/8 evicted: at most 1.10 x the live bytes + 2 blocks each."""
    num_prompt, num_requests = 16 * window + 5, 3
    vllm_config, config = make_config(
        chunk=2048, max_model_len=num_prompt + 200, block_size=block_size
    )
    layout = make_layout(
        window=window,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        page_size=choose_page_size(window),
        max_model_len=num_prompt + 200,
    )
    num_blocks = 1 + num_requests * layout.max_blocks_per_request
    engine = Engine(vllm_config, config, num_blocks, lag=lag, layout=layout)
    for i in range(num_requests):
        engine.add(str(i), num_prompt, 150, keep=1 / 8)
    excess = []
    while not engine.finished:
        engine.step()
        if len(engine.manager.ledger.requests) < num_requests:
            continue
        if all(engine.manager.ledger.reported_end[1:4] > num_prompt):
            live_slots = int(engine.workers[0].live[1:4].sum())
            held = sum(len(b) for b in engine.manager.req_to_blocks.values())
            live_blocks = live_slots * layout.slot_bytes / layout.block_bytes
            excess.append((held - 1.10 * live_blocks) / num_requests)
    assert len(excess) > 100
    assert max(excess) <= 2


def test_preemption_in_the_step_that_grew_a_request_leaves_no_row_update():
    manager = make_engine(1.0).manager
    for request_id in "ab":
        manager.get_num_blocks_to_allocate(request_id, 40, [], 0, 0, 40)
        manager.allocate_new_blocks(request_id, 40, 40)
    manager.close_step("ab")
    for request_id in "ab":
        manager.allocate_new_blocks(request_id, 80, 80)
    state = manager.ledger.state_of("b")
    manager.free("b")
    meta = manager.close_step("a")
    assert len(meta.row_updates) > 0 and state not in meta.row_updates[:, 0]
    assert len(meta.starts) == 0
