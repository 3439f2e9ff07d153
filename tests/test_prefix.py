"""Through vLLM's engine, with `prefix_cache`: what a request goes on from is what it would have
computed itself, and it is used where it may be."""

import pytest
from engines import NOISE, engine_args, generate, prompts, sampling, scheduler_of, worst_error
from vllm import SamplingParams
from vllm.v1.request import Request

from vllm_dms.core.integrity import check_integrity
from vllm_dms.reference import ReferenceModel

DIALECTS = {
    "borrowed": {"dialect": "nvidia-borrowed"},
    "adapter": {"dialect": "nvidia-adapter"},
    "per-layer": {"dialect": "nvidia-borrowed", "alpha_per": "layer"},
    "fastdms": {"dialect": "fastdms"},
    "disabled": {"dialect": "nvidia-borrowed", "disable_eviction": True},
}
ON = {"dms": {"prefix_cache": True}}


class Chat:
    """An engine with `prefix_cache`, whose answers are compared with the reference's."""

    def __init__(self, path, make_engine, chunk=96, noise=NOISE, **kwargs):
        args = engine_args(chunk, **{"additional_config": ON, **kwargs})
        self.llm = make_engine(path, **args)
        self.llm.reset_prefix_cache(reset_connector=True)
        self.scheduler = scheduler_of(self.llm)
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.reference, self.noise = ReferenceModel.from_dir(path), noise

    @property
    def kept(self):
        return self.manager.prefix.kept

    def ask(self, token_ids, max_tokens=8, salts=None, every=1, **params):
        """Their outputs, of which ``every`` n-th is compared; nothing is left in use."""
        params = {**sampling_args(max_tokens), **params}
        salts = salts or [None] * len(token_ids)
        asked = [
            {"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})}
            for ids, salt in zip(token_ids, salts, strict=True)
        ]
        outputs = self.llm.generate(asked, SamplingParams(**params), use_tqdm=False)
        for ids, output in list(zip(token_ids, outputs, strict=True))[::every]:
            assert worst_error(self.reference, ids, output) < self.noise
        check_integrity(self.manager)
        assert self.manager.block_pool.get_num_free_blocks() == self.manager.num_usable_blocks
        return outputs


def sampling_args(max_tokens):
    return {
        "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 3,
        "detokenize": False,
    }  # fmt: skip


def answer_of(output):
    return list(output.outputs[0].token_ids)


def talk(chat, turns=5, thinking=False):
    """Conversations of several turns; how many tokens each turn found."""
    texts = prompts((230, 97), seed=20)
    cached = []
    for turn in range(turns):
        outputs = chat.ask(texts)
        cached.append([o.num_cached_tokens for o in outputs])
        for text, output in zip(texts, outputs, strict=True):
            text += [3, 4] if thinking else answer_of(output)
            text += prompts((33,), seed=100 + turn)[0]
    return cached


@pytest.mark.parametrize("chunk", [32, 96, 512])
@pytest.mark.parametrize("name", DIALECTS)
def test_a_conversation_goes_on_from_its_last_turn(checkpoint, make_engine, name, chunk):
    if chunk != 96 and name not in ("borrowed", "adapter"):
        pytest.skip("one chunk size is enough for the variants")
    cached = talk(Chat(checkpoint(**DIALECTS[name]), make_engine, chunk))
    # All that was fed: the last token of an answer never is.
    ends = [[230 + 41 * turn - 34, 97 + 41 * turn - 34] for turn in range(1, 5)]
    assert cached == [[0, 0], *ends]


def test_a_conversation_whose_answers_come_back_otherwise_goes_on_from_its_prompt(
    checkpoint, make_engine
):
    cached = talk(Chat(checkpoint(**DIALECTS["borrowed"]), make_engine), thinking=True)
    assert cached == [[0, 0], *([230 + 35 * t, 97 + 35 * t] for t in range(4))]


@pytest.mark.parametrize("name", ["borrowed", "fastdms"])
def test_a_document_is_read_by_the_first_of_many_questions(checkpoint, make_engine, name):
    args = {"max_model_len": 4352, "kv_cache_memory_bytes": 64 << 20}
    chat = Chat(checkpoint(**DIALECTS[name]), make_engine, 1024, **args)
    (document,) = prompts((4096,), seed=1)
    questions = [document + ids for ids in prompts([20 + i for i in range(20)], seed=50)]
    outputs = chat.ask(questions[:10], 2, every=9) + chat.ask(questions[10:], 2, every=9)
    cached = [o.num_cached_tokens for o in outputs]
    assert sorted(cached) == [0] + [4096] * 19, cached


def test_prompts_fork_inside_a_chunk_and_a_block(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine, 512)
    (trunk, other) = prompts((300, 300), seed=8)
    for at in (290, 203, 117, 117, 45):
        chat.ask([trunk[:at] + other[at:]])
    # Whole blocks of 16 of what two prompts share; a third that has them finds them.
    found = [chat.ask([trunk[:at] + other[:30]])[0].num_cached_tokens for at in (291, 204, 118, 46)]
    assert found == [192, 192, 112, 32]


def test_answers_of_one_prompt_fork_from_one_reading(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    (ids,) = prompts((230,), seed=9)
    params = SamplingParams(**{**sampling_args(8), "temperature": 1.0, "n": 4})
    (output,) = generate(chat.llm, [ids], params)
    for i in range(4):
        output.outputs[0] = output.outputs[i]
        assert worst_error(chat.reference, ids, output) < NOISE
    assert chat.manager.prefix._went_on["branch"] == 3


def test_hits_go_on_when_half_of_the_states_are_gone(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine, num_gpu_blocks_override=130)
    texts = prompts([200 + 5 * i for i in range(24)], seed=30)
    for text, output in zip(texts, chat.ask(texts), strict=True):
        text += [*answer_of(output), 5, 6, 7]
    ends = [k for k in chat.kept.states if k.kind == "end"]
    assert 6 < len(ends) < 18
    # The most recent first, so that they are there still.
    cached = [chat.ask([text])[0].num_cached_tokens for text in reversed(texts)]
    assert 0 in cached and sum(map(bool, cached)) >= len(ends) // 2


def test_preempted_requests_come_back_to_what_they_left(checkpoint, make_engine):
    path = checkpoint("nvidia-borrowed", evict_rate=0.5)
    chat = Chat(
        path, make_engine, 64,
        max_model_len=1024, max_num_seqs=12, num_gpu_blocks_override=84,
    )  # fmt: skip
    chat.scheduler.connector.stats.preemptions = 0
    texts = prompts([40 + 9 * i for i in range(12)], seed=50)
    outputs = chat.ask(texts, 300)
    assert chat.scheduler.connector.stats.preemptions > 0
    again = [ids + answer_of(output) for ids, output in zip(texts, outputs, strict=True)]
    chat.ask(again, 20)


@pytest.mark.parametrize("storage", ["dms", "dms_fp8"])
def test_a_state_is_as_it_was_stored(checkpoint, make_engine, storage):
    """FP8 rounds; a hit rounds no more: twice the same, from a state and from another's."""
    chat = Chat(
        checkpoint(**DIALECTS["borrowed"]), make_engine, kv_cache_dtype=storage,
        noise=NOISE if storage == "dms" else float("inf"),
    )  # fmt: skip
    (ids,) = prompts((230,), seed=3)
    (first,) = chat.ask([ids], 20)
    again = ids + answer_of(first)[:1]
    (hit,) = chat.ask([again], 19)
    assert hit.num_cached_tokens == 230
    assert answer_of(hit) == answer_of(first)[1:]
    for a, b in zip(hit.outputs[0].logprobs, first.outputs[0].logprobs[1:], strict=True):
        assert all(abs(a[t].logprob - b[t].logprob) < 1e-4 for t in a if t in b)


# What must not be shared.


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
    weight = model.lm_head.weight if hasattr(model, "lm_head") else None
    assert weight is not None
    values = [p for n, p in model.named_parameters() if "down_proj" in n]
    for value in values:
        value.data.mul_(1.5)
    chat.llm.reset_prefix_cache(reset_connector=True)
    while core.scheduler.has_unfinished_requests():
        core.step_fn()
    assert not chat.kept.states
    assert (
        chat.llm.generate([{"prompt_token_ids": [*ids, 9, 1]}], params, use_tqdm=False)[
            0
        ].num_cached_tokens
        == 0
    )
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


# On a GPU, with CUDA graphs and async scheduling.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["borrowed", "adapter", "fastdms"])
def test_conversations_and_documents_with_graphs(checkpoint, make_engine, name):
    args = {
        "enforce_eager": False, "gpu_memory_utilization": 0.2, "max_num_seqs": 64,
        "kv_cache_memory_bytes": 128 << 20,
    }  # fmt: skip
    chat = Chat(checkpoint(**DIALECTS[name]), make_engine, 512, **args)
    cached = talk(chat)
    assert cached[0] == [0, 0]
    assert all(tokens >= 97 for turn in cached[1:] for tokens in turn)
    (document,) = prompts((900,), seed=1)
    questions = [document + ids for ids in prompts([20 + i for i in range(40)], seed=50)]
    outputs = chat.ask(questions, 20)
    assert sum(o.num_cached_tokens >= 896 for o in outputs) >= 38
    texts = prompts([20 + 37 * i % 900 for i in range(64)], seed=100)
    for text, output in zip(texts, chat.ask(texts, 40), strict=True):
        text += [*answer_of(output), 1, 2, 3]
    outputs = chat.ask(texts, 40)
    assert sum(o.num_cached_tokens > 0 for o in outputs) >= 50
