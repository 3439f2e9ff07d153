"""Through vLLM's engine, with `prefix_cache`: states are not used where they must not be, and in
vLLM's other modes they are."""

from chats import Chat, answer_of, sampling_args, talk
from checkpoints import DIALECTS
from engines import engine_args, generate, prompts, sampling, scheduler_of
from vllm import SamplingParams
from vllm.v1.request import Request


def test_salts_are_apart(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    for length in (10, 230):  # shorter than a block, and not
        (ids,) = prompts((length,), seed=length)
        chat.ask([ids])
        for salt in ("a", "b"):  # with which the same prompt would be found without one
            assert chat.ask([[*ids, 1, 2, 3]], salts=[salt])[0].num_cached_tokens == 0
            assert chat.ask([[*ids, 1, 2, 3, 4]], salts=[salt])[0].num_cached_tokens == length + 3
        assert chat.ask([[*ids, 1, 2, 3]])[0].num_cached_tokens == length


def test_after_a_reset_nothing_old_is_used(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    (ids,) = prompts((230,), seed=5)
    for reset in ({}, {"reset_connector": True}, {"reset_running_requests": True}):
        chat.ask([ids])
        assert chat.kept.states
        assert chat.llm.reset_prefix_cache(**reset)
        assert not chat.kept.states
        assert chat.ask([[*ids, 1]])[0].num_cached_tokens == 0
        chat.llm.reset_prefix_cache()


def test_new_weights_are_not_asked_for_old_states(checkpoint, make_engine):
    """As with vLLM's own cache, with the reset that belongs to an update; of a request that runs
    through it nothing is kept either."""
    path = checkpoint(**DIALECTS["borrowed"], seed=77)
    chat = Chat(path, make_engine)
    core = chat.llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    (ids,) = prompts((230,), seed=6)
    chat.ask([ids])
    params = SamplingParams(**sampling_args(30))
    core.add_request(
        Request("runs", [*ids, 9], params, None, block_hasher=core.request_block_hasher)
    )
    for _ in range(8):
        core.step_fn()
    values = [p for n, p in model.named_parameters() if "down_proj" in n]
    for value in values:
        value.data.mul_(1.5)
    chat.llm.reset_prefix_cache(reset_connector=True)
    while core.scheduler.has_unfinished_requests():
        core.step_fn()
    assert not chat.kept.states
    (output,) = generate(chat.llm, [[*ids, 9, 1]], params)
    assert output.num_cached_tokens == 0
    for value in values:
        value.data.div_(1.5)
    chat.llm.reset_prefix_cache(reset_connector=True)


def test_requests_that_need_their_whole_prompt_read_it(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    (ids,) = prompts((230,), seed=7)
    chat.ask([ids])
    for params in ({"prompt_logprobs": 2}, {"skip_reading_prefix_cache": True}):
        (output,) = chat.ask([[*ids, 1]], **params)
        assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs or [1]) >= 1
    assert chat.ask([[*ids, 1, 2]])[0].num_cached_tokens > 0


def test_streaming_sessions_find_and_leave_states(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    core = chat.llm.llm_engine.engine_core.engine_core
    (first, second) = prompts((120, 40), seed=11)
    (plain,) = chat.ask([first], 4)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

    def turn(ids):
        core.add_request(
            Request("s", ids, params, None, resumable=True, block_hasher=core.request_block_hasher)
        )
        for _ in range(12):
            core.step_fn()

    turn([*first, 5])
    turn(second)
    session = chat.scheduler.requests["s"]
    text = list(session.all_token_ids)
    core.abort_requests(["s"])
    for _ in range(3):
        core.step_fn()
    assert any(k.kind == "end" and k.num_tokens > 160 for k in chat.kept.states)
    (output,) = chat.ask([[*text, 1, 2]], 4)
    assert output.num_cached_tokens >= 120 + 1 + 3 + 40
    assert answer_of(plain)


def test_it_works_with_priorities(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine, scheduling_policy="priority")
    assert talk(chat, turns=3)[-1][0] > 230


def test_an_engine_without_the_setting_keeps_nothing(checkpoint, make_engine):
    path = checkpoint(**DIALECTS["borrowed"])
    llm = make_engine(path, **engine_args(96))
    manager = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0]
    assert manager.prefix is None and manager.supply.kept is None
    assert type(scheduler_of(llm)).__module__.startswith("vllm.")
    ids = prompts((230,), seed=2)[0]
    outputs = [generate(llm, [ids], sampling(2))[0] for _ in range(2)]
    assert [o.num_cached_tokens for o in outputs] == [0, 0]
