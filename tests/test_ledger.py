"""Laws of the ledger and of the admission guess, without a scheduler."""

import subprocess
import sys

import numpy as np
import pytest
from core_sim import CHUNK, make_engine, make_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dms.arena.report import REPORT_HORIZON, REPORT_WIDTH, Usage
from vllm_dms.core.admission import LiveFraction, estimate_blocks
from vllm_dms.core.ledger import Ledger
from vllm_dms.core.records import Growth, Mark


def worst_case(live: np.ndarray, tokens: int, size: int) -> int:
    return int((-(-(live + tokens) // size) - -(-live // size)).sum())


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    lag=st.integers(0, 3),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_caps_cover_the_pages_in_use_and_one_element_agrees_with_arrays(chunks, lag, keep, seed):
    layout = make_layout()
    ledger, rng = Ledger(layout, 3), np.random.default_rng(seed)
    for request_id in "ab":
        state = ledger.start(request_id)
    live = np.zeros(layout.num_rows, dtype=np.int64)
    ran, in_flight, end = 0, [], 0
    for step_id, chunk in enumerate(chunks):
        end += chunk
        needed = ledger.required_one(state, end)
        ledger.scheduled_end[state] = end
        if end > ledger.safe_end[state]:
            ledger.grow(state, max(needed, int(ledger.held[state])), end)
        in_flight.append(ledger.make_step(step_id, ("b",)))
        if len(in_flight) <= lag:
            continue
        step = in_flight.pop(0)
        for token in range(ran, step.ends[0]):
            live += 1 if token < layout.ring_size else rng.random(len(live)) < keep
        ran = step.ends[0]
        pages = int((-(-live // layout.page_size)).sum())
        assert pages <= ledger.held[state] * layout.pages_per_block
        need = [worst_case(live, k, layout.page_size) for k in range(1, REPORT_HORIZON + 1)]
        held = ledger.held[state]
        report = np.array([[pages, *need, live.sum()]], dtype=np.int32)
        surplus, _ = ledger.merge(step, Usage.of_rank(report))
        ahead = max(end + 1, step.ends[0] + REPORT_HORIZON)
        assert ledger.held[state] == min(held, ledger.required_one(state, ahead))
        assert sum(count for _, count in surplus) == held - ledger.held[state]
        # The held blocks suffice for safe_end, and for no further token of a bound we know.
        safe_end = int(ledger.safe_end[state])
        assert safe_end >= end
        if safe_end > end:
            assert ledger.required_one(state, safe_end) <= ledger.held[state]
            assert ledger.required_one(state, safe_end + 1) > ledger.held[state]


def test_reports_of_former_owners_of_a_state_index_are_dropped():
    ledger = Ledger(make_layout(), 1)
    state = ledger.start("a")
    ledger.scheduled_end[state] = 10
    ledger.grow(state, 8, 10)
    stale = ledger.make_step(1, ("a",))
    ledger.release("a")
    assert ledger.start("a") == state
    report = np.full((1, REPORT_WIDTH), 5)
    surplus, growth = ledger.merge(stale, Usage.of_rank(report))
    assert surplus == [] and growth == Growth(0, 0, 0)
    assert ledger.pages[state] == 0


def test_pages_beyond_the_blocks_held_are_an_error():
    ledger = Ledger(make_layout(), 1)
    state = ledger.start("a")
    ledger.scheduled_end[state] = 10
    ledger.grow(state, 1, 10)  # 8 pages
    report = np.zeros((1, REPORT_WIDTH), dtype=np.int32)
    report[0, 0] = 9
    with pytest.raises(RuntimeError, match="beyond the blocks held"):
        ledger.merge(ledger.make_step(1, ("a",)), Usage.of_rank(report))


# Admission.


@pytest.mark.parametrize("num_tokens", [1, 16, 48, 49, 100, 256])
def test_the_estimate_is_dense_at_first_and_at_least_a_chunk_when_all_is_evicted(num_tokens):
    spec = make_engine(1.0).spec
    chunk = spec.dense_blocks(min(num_tokens, CHUNK))
    assert estimate_blocks(spec, num_tokens, 1.0) == spec.dense_blocks(num_tokens)
    assert chunk <= estimate_blocks(spec, num_tokens, 0.0) <= spec.dense_blocks(num_tokens)


def test_the_live_fraction_starts_at_one_and_follows_what_is_kept():
    fraction = LiveFraction(num_rows=10)
    assert fraction.value == 1.0
    for _ in range(1000):
        fraction.add(Growth(eligible=1_000, fullest=1_250, kept=0))
    assert fraction.value == pytest.approx(0.125, abs=0.01)
    for _ in range(1000):
        fraction.add(Growth(eligible=1_000, fullest=5_000, kept=0))
    assert fraction.value == pytest.approx(0.5, abs=0.01)


def test_the_ledger_needs_no_torch():
    code = "import sys, vllm_dms.core.ledger; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_index_has_one_owner():
    ledger = Ledger(make_layout(), 2)
    state = ledger.start("a")
    with pytest.raises(AssertionError, match="already"):
        ledger.start("a")
    ledger.grow(state, 3, 10)
    with pytest.raises(AssertionError):
        ledger.grow(state, 2, 20)
    ledger.release("a")
    with pytest.raises(KeyError):
        ledger.release("a")
    with pytest.raises(AssertionError):
        ledger.grow(state, 3, 10)


@pytest.mark.parametrize("num_tokens", [10, 100])  # within the ring, and past it
def test_a_token_that_is_stored_once_more_is_in_flight_and_adds_nothing(num_tokens):
    layout = make_layout()
    ledger, live = Ledger(layout, 3), layout.num_rows * 10
    mark = Mark(num_tokens, np.array([8, *[4] * REPORT_HORIZON, live]), live)
    state = ledger.start("a")
    ledger.resume(state, mark, again=True)
    ledger.scheduled_end[state] = num_tokens
    assert ledger.required_one(state, num_tokens) == ledger.required_after(mark, num_tokens) == 1
    ledger.grow(state, 1, num_tokens)
    step = ledger.make_step(1, ("a",))
    assert ledger.in_flight(state)
    _, growth = ledger.merge(step, Usage.of_rank(mark.row[None].astype(np.int32)))
    assert not ledger.in_flight(state)
    assert growth == Growth(0, 0, 0)
    assert ledger.release("a") == ledger.start("b") == state and not ledger.in_flight(state)
