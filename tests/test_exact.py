"""Through vLLM's engine: log-probabilities equal the reference model's, whatever the batching."""

import pytest
from checkpoints import DIALECTS
from engines import (
    NOISE,
    check_exact,
    engine_args,
    generate,
    prompts,
    sampling,
    scheduler_of,
    worst_error,
)

from vllm_dms.backend.runtime import get_runtime
from vllm_dms.core.integrity import check_integrity
from vllm_dms.reference import ReferenceModel, live_counts


@pytest.mark.parametrize("chunk", [32, 96, 512])
@pytest.mark.parametrize("name", DIALECTS)
def test_log_probabilities_are_the_references(checkpoint, make_engine, name, chunk):
    if chunk != 96 and name not in ("borrowed", "adapter", "fastdms", "per-layer"):
        pytest.skip("one chunk size is enough for the variants")
    path = checkpoint(**DIALECTS[name])
    check_exact(path, make_engine(path, **engine_args(chunk)), prompts())


@pytest.mark.parametrize("name", ["borrowed", "per-layer", "fastdms", "llama-adapter"])
def test_so_are_those_of_layers_that_attend_from_their_projection(
    checkpoint, make_engine, name, monkeypatch
):
    """As with Triton's kernels, here by the plain operations."""
    monkeypatch.setattr("vllm_dms.models.graft.choose_ops", lambda *args: "triton")
    path = checkpoint(**DIALECTS[name])
    llm = make_engine(path, **engine_args(96, seed=1))  # not one that another test made
    runtime = get_runtime(llm.llm_engine.vllm_config)
    assert runtime.projection is not None
    check_exact(path, llm, prompts())


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", ["borrowed", "adapter", "fastdms", "disabled"])
def test_log_probabilities_are_the_references_on_the_gpu(checkpoint, make_engine, name, kernels):
    path = checkpoint(**DIALECTS[name])
    args = engine_args(96, additional_config={"dms": {"kernels": kernels}})
    check_exact(path, make_engine(path, gpu_memory_utilization=0.2, **args), prompts())


@pytest.mark.gpu
def test_64_mixed_requests_with_graphs_and_compile(checkpoint, make_engine):
    """Each alone in the reference, all together in the engine; warm-up and capture left nothing."""
    path = checkpoint(**DIALECTS["borrowed"])
    args = engine_args(512, enforce_eager=False, gpu_memory_utilization=0.2, max_num_seqs=64)
    llm = make_engine(path, **args | {"kv_cache_memory_bytes": 128 << 20})
    core = llm.llm_engine.engine_core.engine_core
    assert core.vllm_config.scheduler_config.async_scheduling
    runner = core.model_executor.driver_worker.worker.model_runner
    assert "vllm.v1.worker.gpu.model_runner" in type(runner).__module__
    state = get_runtime(core.vllm_config).state
    for tensor in (state.live, state.page_table, state.pages_used, state.evict_ring):
        assert not tensor.any()
    lengths = [20 + 37 * i % 900 for i in range(64)]
    check_exact(path, llm, prompts(lengths, seed=100))
    assert not state.live[0].any() and not state.page_table[0].any()


def test_live_counts_reach_the_client(checkpoint, make_engine):
    path = checkpoint(**DIALECTS["borrowed"])
    reference = ReferenceModel.from_dir(path)
    token_ids = prompts()
    outputs = generate(make_engine(path, **engine_args(96)), token_ids, sampling())
    for prompt, output in zip(token_ids, outputs, strict=True):
        stats = output.kv_transfer_params["dms"]
        ids = prompt + list(output.outputs[0].token_ids)
        # The last token is never stored, and the last steps' reports come after the end.
        assert len(ids) - 5 < stats["dense_tokens"] < len(ids)
        evict = reference.forward(ids[: stats["dense_tokens"]]).evict
        live = live_counts(evict, reference.dms.window).float().mean().item()
        assert stats["live_tokens"] == pytest.approx(live, abs=0.01)
        assert stats["compression"] == pytest.approx(stats["dense_tokens"] / live, rel=1e-3)


def drive(llm, token_ids, params, abort_after):
    """Run all requests together; abort every third one after ``abort_after`` outputs."""
    engine = llm.llm_engine
    for i, ids in enumerate(token_ids):
        engine.add_request(f"r{i}", {"prompt_token_ids": ids}, params)
    done, seen = {}, dict.fromkeys(range(len(token_ids)), 0)
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = int(output.request_id.removeprefix("r"))
            seen[index] = len(output.outputs[0].token_ids)
            if output.finished and output.outputs[0].finish_reason == "length":
                done[index] = output
            elif index % 3 == 2 and seen[index] >= abort_after:
                engine.abort_request([output.request_id])
    return done


def test_preempted_and_aborted_requests_leave_the_others_exact(checkpoint, make_engine):
    """12 requests of up to 450 tokens, half of them kept: about 2.5 times the pool."""
    path = checkpoint("nvidia-borrowed", evict_rate=0.5)
    reference = ReferenceModel.from_dir(path)
    llm = make_engine(
        path, **engine_args(64, max_model_len=1024, max_num_seqs=12, num_gpu_blocks_override=84)
    )
    scheduler = scheduler_of(llm)
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    scheduler.connector.stats.preemptions = 0
    token_ids = prompts([40 + 9 * i for i in range(12)], seed=50)
    done = drive(llm, token_ids, sampling(300), abort_after=40)
    assert len(done) == 8
    assert scheduler.connector.stats.preemptions > 0
    for index, output in done.items():
        assert worst_error(reference, token_ids[index], output) < NOISE
    check_integrity(manager)
    assert manager.block_pool.get_num_free_blocks() == manager.num_usable_blocks


@pytest.mark.parametrize(
    "wrong", [{"shift": 0}, {"window": 15}, {"window": 17}, {"zero": "before"}], ids=str
)
def test_a_wrong_rule_is_noticed(checkpoint, make_engine, wrong):
    path = checkpoint(**DIALECTS["borrowed"])
    llm = make_engine(path, **engine_args(96, additional_config={"dms": wrong}))
    prompt = prompts((230,))[0]
    output = generate(llm, [prompt], sampling(8))[0]
    assert worst_error(ReferenceModel.from_dir(path), prompt, output) > 10 * NOISE


def test_a_channel_left_in_attention_is_noticed(checkpoint, make_engine, monkeypatch):
    from vllm_dms.models.decision import BorrowedChannel

    path = checkpoint(**DIALECTS["borrowed"])
    llm = make_engine(path, **engine_args(96))
    monkeypatch.setattr(BorrowedChannel, "clear", lambda self, query: query)
    prompt = prompts((230,))[0]
    output = generate(llm, [prompt], sampling(8))[0]
    assert worst_error(ReferenceModel.from_dir(path), prompt, output) > 10 * NOISE


def test_a_request_that_can_never_fit_ends_with_an_error_and_others_go_on(checkpoint, make_engine):
    """reserve_compression lets max_model_len exceed the pool, and then nothing is evicted."""
    path = checkpoint(**DIALECTS["borrowed"])
    overrides = {"dms": {"reserve_compression": 8, "evict": False}}
    llm = make_engine(
        path, **engine_args(64, num_gpu_blocks_override=40, additional_config=overrides)
    )
    params = sampling(40)
    token_ids = prompts((900, 60, 1200, 130), seed=7)
    outputs = generate(llm, token_ids, params)
    assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length", "error", "length"]
    reference = ReferenceModel.from_dir(path, overrides={"evict": False})
    for i in (1, 3):
        assert worst_error(reference, token_ids[i], outputs[i]) < NOISE
    manager = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0]
    check_integrity(manager)
    assert manager.block_pool.get_num_free_blocks() == manager.num_usable_blocks
