"""Requests with streaming input: several turns, between which they wait and keep their blocks."""

import pytest
from core_sim import HASHER
from core_sim import make_engine as simulated_engine
from engines import engine_args, prompts, scheduler_of
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_dms.core.integrity import check_integrity


@pytest.mark.parametrize("lag", [0, 1])
def test_turns_of_streaming_input_are_stored_once(lag):
    """A turn ends by a stop token: what vLLM had scheduled ahead it takes back."""
    engine = simulated_engine(extra_blocks=40, lag=lag)
    params = SamplingParams(max_tokens=60, stop_token_ids=[7], ignore_eos=True)
    engine.keep["stream"] = 1.0
    engine.add("other", 30, 120, keep=0.5)
    for turn in range(40):
        engine.scheduler.add_request(
            Request("stream", [1] * (2 if turn else 20), params, None, resumable=True)
        )
        for _ in range(8):
            engine.step()
        state = engine.manager.ledger.state_of("stream")
        computed = engine.scheduler.requests["stream"].num_computed_tokens
        assert engine.workers[0].tokens[state] == computed
    engine.scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    engine.drain()
    assert engine.finished["other"] == "length"
    assert not engine.manager.ledger.requests and not engine.manager.sessions


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_turn_that_stores_a_token_once_more_has_one_step_in_flight(lag):
    engine = simulated_engine(extra_blocks=40, prefix_cache=True, lag=lag)
    engine.add("plain", 100, 4, keep=0.5)
    engine.drain()
    params = SamplingParams(max_tokens=60, stop_token_ids=[7], ignore_eos=True)
    engine.keep["stream"] = 1.0
    for ids in ([1] * 100, [1] * 20):
        engine.scheduler.add_request(
            Request("stream", ids, params, None, resumable=True, block_hasher=HASHER)
        )
        for _ in range(8):
            engine.step()
        state = engine.manager.ledger.state_of("stream")
        computed = engine.scheduler.requests["stream"].num_computed_tokens
        assert engine.workers[0].tokens[state] == computed
    assert engine.workers[0].num_again == 1
    engine.scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    engine.drain()


def session_that_outgrows_the_pool(lag):
    """It waits with blocks for a turn that can't fit; vLLM admits nobody before it."""
    engine = simulated_engine(reserve_compression=4.0, lag=lag)
    params = SamplingParams(max_tokens=60, stop_token_ids=[7], ignore_eos=True)
    engine.keep["stream"] = 1.0
    for num_tokens in (90, 60):
        engine.scheduler.add_request(
            Request("stream", [1] * num_tokens, params, None, resumable=True)
        )
        for _ in range(10 if num_tokens == 90 else 0):
            engine.step()
    engine.add("small", 10, 5, keep=0.0)
    return engine


@pytest.mark.parametrize("lag", [0, 1])
def test_a_turn_that_can_never_fit_ends_its_session_alone(lag):
    engine = session_that_outgrows_the_pool(lag)
    engine.drain()
    assert engine.finished == {"stream": "error", "small": "length"}
    assert not engine.manager.sessions and not engine.scheduler.requests


def test_a_session_that_is_about_to_end_may_be_aborted():
    engine = session_that_outgrows_the_pool(lag=0)
    output = engine.scheduler.schedule()
    session = engine.scheduler.requests["stream"]
    assert session.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    engine.check()
    engine.in_flight.append((output, [], engine._held()))
    engine.drain()
    assert engine.finished["small"] == "length" and engine.finished["stream"] != "error"
    assert not engine.manager.ledger.requests and not engine.scheduler.requests


def test_the_pause_of_a_waiting_session_is_not_that_of_the_next_request_that_lacks_blocks():
    engine = simulated_engine(extra_blocks=40, lag=1)
    engine.add("stream", 20, 8, keep=1.0, turn=True)
    engine.step()
    state = engine.manager.ledger.state_of("stream")
    session = engine.scheduler.requests["stream"]
    session.status = RequestStatus.WAITING
    assert engine.manager.sessions.must_pause("stream", state)
    assert not engine.manager.sessions.take_pause()  # nobody asked about the waiting session
    session.status = RequestStatus.RUNNING
    assert engine.manager.sessions.must_pause("stream", state)
    engine.manager.new_step_starts()
    assert not engine.manager.sessions.take_pause()  # that was another step


# Sessions that hold what others need.


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("num_sessions", [2, 3])
def test_sessions_that_each_hold_what_another_needs_all_finish(num_sessions, keep, lag):
    engine = simulated_engine(lag=lag)  # 16 blocks of 16 tokens, if all are kept
    names = [f"s{i}" for i in range(num_sessions)]
    for name in names:
        engine.add(name, 200 // num_sessions, 4, keep, turn=True)
    for _ in range(40):
        engine.step()
    assert len(engine.manager.ledger.requests) == num_sessions  # all idle, and hold their blocks
    for name in names:
        engine.add(name, 120, 4, keep, turn=True)
    engine.add("plain", 30, 4, keep)
    engine.drain()
    sessions = [engine.scheduler.requests[name] for name in names]
    assert engine.finished["plain"] == "length"
    assert [s.num_prompt_tokens for s in sessions] == [200 // num_sessions + 3 + 120] * num_sessions
    assert all(s.num_output_tokens == 4 for s in sessions)


@pytest.mark.parametrize("lag", [0, 1])
def test_an_idle_session_gives_way_to_a_request_and_its_next_turn_sees_all_its_tokens(lag):
    engine = simulated_engine(lag=lag)
    engine.add("session", 180, 4, keep=1.0, turn=True)
    for _ in range(12):
        engine.step()
    engine.add("plain", 150, 4, keep=1.0)
    engine.drain()
    assert engine.finished["plain"] == "length"
    assert not engine.manager.ledger.requests  # the session's blocks went to the plain request
    engine.add("session", 20, 4, keep=1.0, turn=True)
    engine.drain()
    session = engine.scheduler.requests["session"]
    assert session.num_prompt_tokens == 180 + 3 + 20 and session.num_output_tokens == 4
    assert engine.workers[0].tokens[engine.manager.ledger.state_of("session")] == 180 + 3 + 20 + 3


@pytest.mark.parametrize("evict", [False, True])
def test_a_whole_engine_goes_on_with_the_tokens_of_sessions_that_gave_way(
    checkpoint, make_engine, evict
):
    """Each turn's answer in a pool where sessions take turns equals that in an ample one."""
    dms = {"dms": {"evict": evict}}
    answers = {}
    for blocks in (34, 200):
        args = engine_args(
            256, max_model_len=512, num_gpu_blocks_override=blocks, additional_config=dms
        )
        llm = make_engine(checkpoint("nvidia-borrowed"), **args)
        answers[blocks] = turns_of_three_sessions(llm)
    assert answers[34] == answers[200]
    assert len(answers[34]) == 7 and all(len(ids) == 4 for ids in answers[34].values())


def turns_of_three_sessions(llm) -> dict[str, list[int]]:
    """Answers by session and turn; a plain request that comes last; nothing is left behind."""
    core = llm.llm_engine.engine_core.engine_core
    answers = {}

    def run(turn):
        for _ in range(60):
            for outputs in (core.step_fn()[0] or {}).values():
                for out in outputs.outputs:
                    answers.setdefault(f"{out.request_id} {turn}", []).extend(out.new_token_ids)

    def add(name, ids, resumable=True):
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        core.add_request(Request(name, ids, params, None, resumable=resumable))

    *texts, other = prompts((160, 155, 150, 120, 125, 130, 30), seed=5)
    for i, ids in enumerate(texts[:3]):
        add(f"s{i}", ids)
    run(1)
    for i, ids in enumerate(texts[3:]):
        add(f"s{i}", ids)
    add("plain", other, resumable=False)
    run(2)
    core.abort_requests([f"s{i}" for i in range(3)])
    run(3)
    manager = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0]
    check_integrity(manager)
    assert not manager.sessions and not manager.ledger.requests
    return answers


def test_a_whole_engine_ends_the_session_and_goes_on(checkpoint, make_engine):
    overrides = {"dms": {"reserve_compression": 8, "evict": False}}
    args = engine_args(256, num_gpu_blocks_override=65, additional_config=overrides)
    llm = make_engine(checkpoint("nvidia-borrowed"), **args)
    core = llm.llm_engine.engine_core.engine_core
    finished = {}

    def add(name, ids, resumable):
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        core.add_request(Request(name, ids, params, None, resumable=resumable))

    def run(steps):
        for _ in range(steps):
            for outputs in (core.step_fn()[0] or {}).values():
                finished.update(
                    {o.request_id: str(o.finish_reason) for o in outputs.outputs if o.finished}
                )

    first, second, other = prompts((900, 700, 60), seed=3)
    add("session", first, resumable=True)
    run(12)
    add("session", second, resumable=True)
    add("other", other, resumable=False)
    run(12)
    assert finished == {"session": "error", "other": "length"}
    manager = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0]
    check_integrity(manager)
    assert not manager.sessions and not manager.ledger.requests
