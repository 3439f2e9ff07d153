"""Bad input gets one clear error; engines that don't ask for DMS stay as they were."""

import logging
import pickle
import re

import pytest
from checkpoints import random_tokens
from engines import edit_config, engine_args, engine_config, generate, sampling
from vllm import envs

from vllm_dms import connector
from vllm_dms.backend.runtime import get_runtime
from vllm_dms.core.scheduler import make_scheduler

REFUSED = {
    "speculation": (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            }
        },
        "--speculative-config",
    ),
    "a KV connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    "another's model": ({"model_impl": "transformers"}, "--model-impl"),
    "KV offload": ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
    "more ranks than heads that decide": (
        {"tensor_parallel_size": 4},
        "--tensor-parallel-size is 4",
    ),
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "context parallel": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        "--decode-context-parallel-size",
    ),
    "layers left out": ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
    "a pass for vLLM's own attention": (
        {"compilation_config": {"pass_config": {"fuse_attn_quant": True}}},
        "fuse_attn_quant",
    ),
    "an unknown setting": ({"additional_config": {"dms": {"windw": 3}}}, "windw"),
    "a setting of the wrong kind": ({"additional_config": {"dms": {"window": "3"}}}, "window"),
    "a setting outside of dms": ({"additional_config": {"prefix_cache": True}}, '{"dms": {"prefix'),
    "dms by another name": ({"additional_config": {"DMS": {}}}, """Name it "dms": '{"dms": {"""),
    "Triton without a GPU": ({"additional_config": {"dms": {"kernels": "triton"}}}, "kernels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(checkpoint, name):
    flags, setting = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(setting)):
        engine_config(checkpoint("nvidia-borrowed"), **flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True"),
        ("VLLM_BATCH_INVARIANT", "1"),
        ("VLLM_USE_BREAKABLE_CUDAGRAPH", "1"),
    ],
)
def test_environment_variables_that_do_not_go_with_dms_are_named(
    checkpoint, monkeypatch, name, value
):
    envs.disable_envs_cache()  # an engine's start turns it on
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}.*Unset it"):
        engine_config(checkpoint("nvidia-borrowed"))


def test_settings_copied_from_a_configured_engine_need_the_flag_too(checkpoint):
    configured = engine_config(checkpoint("nvidia-borrowed")).additional_config
    with pytest.raises(ValueError, match="no effect"):
        engine_config(
            checkpoint("nvidia-borrowed"), kv_cache_dtype="auto", additional_config=configured
        )


def test_weights_can_be_updated_in_chunks(checkpoint, make_engine):
    llm = make_engine(checkpoint("nvidia-adapter"), kv_cache_dtype="dms")

    def update(model):
        name, weight = next((n, p) for n, p in model.named_parameters() if "o_proj" in n)
        assert model.load_weights([(name, weight.detach().clone())]) == {name}

    llm.apply_model(update)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dms_window_size": None}, "dms_window_size"),
        ({"dms_alpha_scale": "100"}, "dms_alpha_scale"),
        ({"dms_new_key": 1}, "dms_new_key"),
        (
            {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"type": "float"}}},
            "kv_cache_scheme",
        ),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            "sliding-window",
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 16}},
            "dual_chunk_attention_config",
        ),
        ({"is_causal": False}, "is_causal"),
    ],
    ids=["missing", "mistyped", "unknown", "fp8 KV", "sliding window", "dual chunk", "encoder"],
)
def test_odd_checkpoints_are_refused_by_name(checkpoint, tmp_path, changes, named):
    path = edit_config(checkpoint("nvidia-borrowed"), tmp_path / "odd", **changes)
    with pytest.raises(ValueError, match=named):
        engine_config(path)


def test_a_model_without_dms_is_refused_with_what_is_supported(checkpoint):
    with pytest.raises(ValueError, match=r"no DMS settings(?s:.)*dms_window_size"):
        engine_config(checkpoint("dense"))


def test_pages_that_straddle_blocks_are_refused(checkpoint, make_engine):
    overrides = {"dms": {"page_size": 4096}}
    with pytest.raises(ValueError, match="not a multiple of page_size 4096"):
        make_engine(checkpoint("nvidia-borrowed"), **engine_args(96, additional_config=overrides))


def test_prefix_cache_replaces_vllms_and_cuts_chunks(checkpoint):
    path, settings = checkpoint("nvidia-borrowed"), {"dms": {"prefix_cache": True}}
    config = engine_config(path, enable_prefix_caching=True, additional_config=settings)
    assert config.cache_config.enable_prefix_caching is False
    assert config.scheduler_config.get_scheduler_cls() is make_scheduler
    own = engine_config(path, additional_config=settings, scheduler_cls="my.Scheduler")
    assert own.scheduler_config.scheduler_cls == "my.Scheduler"


def test_prefix_caching_is_turned_off(checkpoint):
    config = engine_config(checkpoint("nvidia-borrowed"), enable_prefix_caching=True)
    assert config.cache_config.enable_prefix_caching is False


@pytest.mark.parametrize("chosen", [{}, {"block_size": 64}])
def test_the_arenas_block_is_the_one_that_vllm_settles_on(checkpoint, make_engine, chosen):
    """vLLM chooses a size once the model is built, when the arena's layout is fixed already."""
    llm = make_engine(checkpoint("nvidia-borrowed"), kv_cache_dtype="dms", **chosen)
    vllm_config = llm.llm_engine.vllm_config
    size = get_runtime(vllm_config).layout.block_size
    assert vllm_config.cache_config.block_size == size
    if vllm_config.device_config.device_type == "cpu":
        assert size == chosen.get("block_size", 128)


def test_overrides_reach_the_workers_config(checkpoint):
    overrides = {"window": 24, "evict": False, "page_size": 8}
    config = engine_config(
        checkpoint("nvidia-borrowed"), additional_config={"dms": overrides, "other": 1}
    )
    resolved = config.additional_config["dms"]
    assert overrides.items() <= resolved.items() and resolved["dialect"] == "nvidia-borrowed"
    assert config.additional_config["other"] == 1
    assert "vllm_dms::attention" in (config.compilation_config.splitting_ops or ["off"]) or (
        config.model_config.enforce_eager
    )


@pytest.mark.parametrize("dtype", ["dms", "dms_fp8"])
def test_the_info_metric_shows_the_cache_dtype(checkpoint, dtype):
    """vLLM makes `vllm:cache_config_info` of the attributes of this object, wherever it went."""
    config = engine_config(checkpoint("nvidia-borrowed"), kv_cache_dtype=dtype)
    info = pickle.loads(pickle.dumps(config)).cache_config.metrics_info()
    assert (info["cache_dtype"], info["dms_cache_dtype"]) == ("auto", dtype)
    config.compute_hash()
    plain = engine_config(checkpoint("dense"), kv_cache_dtype="auto")
    assert "dms_cache_dtype" not in plain.cache_config.metrics_info()


def test_the_connector_frees_at_once_and_can_end_a_request(checkpoint):
    config = engine_config(checkpoint("nvidia-borrowed")).kv_transfer_config
    assert config.is_kv_producer and not config.is_kv_consumer
    assert config.kv_load_failure_policy == "fail"
    assert config.kv_connector_module_path == connector.__name__


@pytest.fixture
def vllm_warnings(caplog):
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_flags_that_have_no_effect_are_named(checkpoint, vllm_warnings):
    path = checkpoint("nvidia-borrowed")
    engine_config(path, enable_prefix_caching=False)
    assert "turned off" not in vllm_warnings.text and "no effect" not in vllm_warnings.text
    engine_config(path, enable_prefix_caching=True, attention_backend="FLASH_ATTN")
    assert "Prefix caching is turned off" in vllm_warnings.text
    assert '{"dms": {"prefix_cache": true}}' in vllm_warnings.text
    assert "--attention-backend FLASH_ATTN has no effect" in vllm_warnings.text
    vllm_warnings.clear()
    settings = {"dms": {"prefix_cache": True}}
    engine_config(path, additional_config=settings, scheduler_cls="my.Scheduler")
    assert "--scheduler-cls my.Scheduler" in vllm_warnings.text
    assert "turned off" not in vllm_warnings.text


@pytest.mark.parametrize("dialect", ["nvidia-borrowed", "nvidia-adapter", "fastdms"])
def test_a_dms_checkpoint_without_the_flag_is_served_with_a_warning(
    checkpoint, make_engine, vllm_warnings, fresh_connector, dialect
):
    path = checkpoint(dialect)
    llm = make_engine(path, dtype="float32", max_model_len=512)
    assert "served without --kv-cache-dtype dms" in vllm_warnings.text
    output = generate(llm, [random_tokens(50, seed=1)], sampling(4))[0]
    assert len(output.outputs[0].token_ids) == 4


def test_dms_settings_without_the_flag_are_refused(checkpoint):
    with pytest.raises(ValueError, match="--kv-cache-dtype is 'auto'"):
        engine_config(
            checkpoint("dense"), kv_cache_dtype="auto", additional_config={"dms": {"evict": True}}
        )


def test_plain_models_are_untouched(checkpoint, make_engine, vllm_warnings, fresh_connector):
    path = checkpoint("dense")
    config = engine_config(path, kv_cache_dtype="auto")
    assert config.model_config.architecture == "Qwen3ForCausalLM"
    assert config.kv_transfer_config is None and not config.additional_config
    assert config.cache_config.enable_prefix_caching
    llm = make_engine(path, dtype="float32", max_model_len=512)
    assert "DMS" not in vllm_warnings.text
    generate(llm, [random_tokens(50, seed=1)], sampling(4))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.model_runner.model).__module__.startswith("vllm.")


def test_a_vllm_without_a_hook_runs_on_without_dms(monkeypatch, vllm_warnings):
    from vllm_dms import compat, plugin

    def gone(configure):
        raise compat.MissingHookError({"vllm.config.vllm:gone": "checks"})

    monkeypatch.setattr(compat, "wrap_config_hook", gone)
    monkeypatch.setattr(compat, "patch_cache_dtype", lambda: pytest.fail("the flag was accepted"))
    plugin.register()
    assert "vllm.config.vllm:gone" in vllm_warnings.text
