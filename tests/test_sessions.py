"""Requests with streaming input: several turns, between which they wait and keep their blocks."""

import pytest
from core_sim import make_engine as simulated_engine
from engines import engine_args, prompts, scheduler_of
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_dms.core.manager import check_integrity


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
        state = engine.manager.states["stream"]
        computed = engine.scheduler.requests["stream"].num_computed_tokens
        assert engine.workers[0].tokens[state] == computed
    engine.scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    engine.drain()
    assert engine.finished["other"] == "length"
    assert not engine.manager.states and not engine.manager.sessions


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
    assert not engine.manager.states and not engine.scheduler.requests


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
    assert not manager.sessions and not manager.states
