"""Through vLLM's engine, with `prefix_cache`: what a request goes on from is what it would have
computed itself."""

import time

import pytest
from chats import Chat, answer_of, sampling_args, talk
from checkpoints import DIALECTS
from engines import NOISE, generate, prompts, worst_error
from vllm import SamplingParams

from vllm_dms.config import DMSConfig
from vllm_dms.core.banner import banner
from vllm_dms.core.integrity import check_integrity


@pytest.mark.parametrize("chunk", [32, 96, 512])
@pytest.mark.parametrize("name", ["borrowed", "adapter", "per-layer", "fastdms", "disabled"])
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


@pytest.mark.parametrize("name", ["borrowed", "adapter", "per-layer", "fastdms", "disabled"])
def test_a_prompt_that_comes_again_is_not_read_again(checkpoint, make_engine, name):
    chat = Chat(checkpoint(**DIALECTS[name]), make_engine)
    for length in (12, 30, 97, 230):
        (ids,) = prompts((length,), seed=60 + length)
        fresh, *again = (chat.ask([ids], 20)[0] for _ in range(3))
        assert fresh.num_cached_tokens == 0
        for output in again:
            assert output.num_cached_tokens == length - 1
            assert furthest(output, fresh) < NOISE
        # Another answer, and a turn after it.
        (other,) = chat.ask([ids], 20, temperature=1.0, seed=length)
        assert other.num_cached_tokens == length - 1
        assert answer_of(other) != answer_of(fresh)
        (turn,) = chat.ask([[*ids, *answer_of(other), 5, 6, 7]], 20)
        assert turn.num_cached_tokens == length + 19
        assert chat.ask([ids], salts=["a"])[0].num_cached_tokens == 0
    chat.llm.reset_prefix_cache(reset_connector=True)
    assert [o.num_cached_tokens for o in chat.ask([ids])] == [0]


def furthest(output, other) -> float:
    """Largest difference of log-probabilities of the same tokens in two same answers."""
    assert answer_of(output) == answer_of(other)
    steps = zip(output.outputs[0].logprobs, other.outputs[0].logprobs, strict=True)
    return max(abs(a[t].logprob - b[t].logprob) for a, b in steps for t in a if t in b)


def test_the_same_prompt_at_once_is_read_once(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine)
    (ids,) = prompts((230,), seed=10)
    assert [o.num_cached_tokens for o in chat.ask([ids, ids, ids])] == [0, 224, 224]
    assert [o.num_cached_tokens for o in chat.ask([ids, ids, ids])] == [229] * 3


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
    before = chat.manager.prefix._went_on["branch"]
    params = SamplingParams(**{**sampling_args(8), "temperature": 1.0, "n": 4})
    (output,) = generate(chat.llm, [ids], params)
    for i in range(4):
        output.outputs[0] = output.outputs[i]
        assert worst_error(chat.reference, ids, output) < NOISE
    assert chat.manager.prefix._went_on["branch"] == before + 3


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


def test_requests_that_a_full_pool_preempts_are_exact(checkpoint, make_engine):
    """What is preempted for want of blocks rarely finds its state again: it was taken first."""
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


@pytest.mark.parametrize("name", ["borrowed", "adapter", "fastdms"])
def test_preempted_requests_go_on_from_a_state_that_is_still_there(checkpoint, make_engine, name):
    chat = Chat(checkpoint(**DIALECTS[name]), make_engine, 64)
    engine, scheduler, prefix = chat.llm.llm_engine, chat.scheduler, chat.manager.prefix
    restore, went_on = prefix.restore, []

    def watched(request_id, *args):
        if scheduler.requests[request_id].num_preemptions:
            given = request_id.partition("-")[0]  # vLLM adds to it
            went_on.append((given, prefix._hits[request_id].num_tokens))
        return restore(request_id, *args)

    prefix.restore = watched
    a, b, tail = prompts((230, 97, 129), seed=3)
    texts = {"a": a, "b": b, "fork": a[:160] + tail, "same": a}
    params = SamplingParams(**sampling_args(40))
    for request_id, ids in texts.items():
        engine.add_request(request_id, {"prompt_token_ids": ids}, params)
    outputs, step = {}, 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        step += 1
        if step in (2, 3, 6, 9, 14, 20, 21, 30) and scheduler.running:
            # As vLLM's scheduler does it, the last and the first in turn; here blocks are free.
            victim = scheduler.running.pop(-1 if step % 2 else 0)
            scheduler._preempt_request(victim, time.monotonic())
        check_integrity(chat.manager)
    for request_id, ids in texts.items():
        assert worst_error(chat.reference, ids, outputs[request_id]) < NOISE
    assert len(went_on) >= 3 and ("b", 97) in went_on, went_on


@pytest.mark.parametrize("storage", ["dms", "dms_fp8", "dms_int4"])
def test_a_state_is_as_it_was_stored(checkpoint, make_engine, storage):
    """FP8 and 4 bits round; a hit rounds no more: twice the same, from a state and another's."""
    shape = {"head_dim": 64} if storage == "dms_int4" else {}
    chat = Chat(
        checkpoint(**DIALECTS["borrowed"], **shape), make_engine, kv_cache_dtype=storage,
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
    # What was read of the prompt's last chunk in its own step was not rounded yet.
    second, third = (chat.ask([ids], 20)[0] for _ in range(2))
    assert second.num_cached_tokens == third.num_cached_tokens == 229
    assert furthest(second, third) < 1e-4


def test_hits_and_queries_are_counted_in_tokens(checkpoint, make_engine):
    chat = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine, disable_log_stats=False)
    names = [f"vllm:external_prefix_cache_{what}" for what in ("queries", "hits")]

    def counted():  # by all engines of this process
        found = {metric.name: metric for metric in chat.llm.get_metrics()}
        return [found[name].value if name in found else 0 for name in names]

    before = counted()
    (ids,) = prompts((230,), seed=11)
    outputs = chat.ask([ids]) + chat.ask([ids, ids[:100]]) + chat.ask([ids], salts=["a"])
    hits = sum(output.num_cached_tokens for output in outputs)
    assert hits >= 229
    assert [b - a for a, b in zip(before, counted(), strict=True)] == [3 * 230 + 100, hits]
    assert len(chat.kept) > 1 and chat.kept.num_blocks > 0
    assert f", {len(chat.kept)} states kept in 0.00 GiB" in chat.scheduler.connector.stats.line()


def test_the_banner_says_what_a_kept_state_costs(checkpoint, make_engine):
    spec = Chat(checkpoint(**DIALECTS["borrowed"]), make_engine).manager.spec
    on, off = (DMSConfig("nvidia-borrowed", 32, 1.0, 0.0, 1, prefix_cache=p) for p in (True, False))
    beside = spec.layout.record_blocks * spec.layout.block_bytes / 2**20
    assert f"prefix cache on: states are kept in free blocks, each with {beside:.1f} MiB" in banner(
        spec, on, 100, 1024
    )
    assert "prefix cache" not in banner(spec, off, 100, 1024)


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
    again = chat.ask(texts[-8:], 40)
    assert [o.num_cached_tokens for o in again] == [len(text) - 1 for text in texts[-8:]]
