"""Laws of the scheduler's side: blocks follow survivors, and nobody uses what it does not hold."""

import json
import pickle

import numpy as np
import pytest
import torch
from core_sim import MAX_MODEL_LEN, Engine, make_layout, make_vllm_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from vllm_dms.backend.layout import choose_page_size
from vllm_dms.backend.ops import REPORT_HORIZON
from vllm_dms.core.ledger import Ledger
from vllm_dms.core.spec import make_spec

CHUNK = 48


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 65536,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def make_engine(model_dir):
    """make_engine(reserve_compression, extra_blocks, **Engine's arguments) over the smallest pool
    that vLLM's start-up check lets through, and some more."""
    known = {
        ratio: make_vllm_config(model_dir, chunk=CHUNK, reserve_compression=ratio)
        for ratio in (1.0, 4.0)
    }

    def make(ratio=1.0, extra_blocks=0, **kwargs) -> Engine:
        vllm_config, config = known[ratio]
        spec = make_spec(vllm_config, config, make_layout())
        num_blocks = spec.max_blocks(MAX_MODEL_LEN) + 1 + extra_blocks
        return Engine(vllm_config, config, num_blocks, **kwargs)

    return make


# Prompts of up to four chunks; answers long enough for several pages of survivors.
arrival = st.tuples(
    st.just("add"),
    st.integers(1, 190),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.4, 1.0]),
)
command = st.one_of(
    arrival,
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 7)),
    st.tuples(st.just("reset")),
)
commands = st.tuples(
    st.lists(arrival, min_size=2, max_size=6), st.lists(command, min_size=5, max_size=30)
).map(lambda parts: parts[0] + parts[1])


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    commands=commands,
    lag=st.integers(0, 3),
    ranks=st.integers(1, 2),
    extra_blocks=st.integers(0, 12),
    ratio=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 100),
)
def test_no_page_beyond_the_blocks_held_and_everything_returned(
    make_engine, commands, lag, ranks, extra_blocks, ratio, seed
):
    engine = make_engine(ratio, extra_blocks, lag=lag, ranks=ranks, seed=seed)
    added = []
    for command, *args in commands:
        if command == "add":
            # Ids are used again, but not while a step has them: vLLM itself forbids that.
            request_id = f"r{len(added) % 8}"
            if not engine.knows(request_id):
                engine.add(request_id, *args)
            added.append(request_id)
        elif command == "step":
            for _ in range(args[0]):
                if engine.scheduler.has_unfinished_requests():
                    engine.step()
        elif command == "abort" and added:
            request_id = added[args[0] % len(added)]
            engine.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            engine.check()
        elif command == "reset":
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            engine.check()
    engine.drain()
    assert engine.manager.block_pool.get_num_free_blocks() == engine.manager.num_usable_blocks
    assert not engine.manager.states and not engine.manager.in_flight
    if ratio == 1.0:
        assert "error" not in engine.finished.values()
