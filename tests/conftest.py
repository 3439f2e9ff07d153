"""Shared by all tests: the environment, one engine per set of arguments, checkpoints."""

import os

# Read when torch or vllm is imported, so they come first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read once, at the first matrix product on a GPU, whichever test that is in.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Triton's interpreter stands in for a GPU, and must not replace one. Read when a kernel's module
# is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc

import interpreter
import pytest
from checkpoints import make_checkpoint

if "TRITON_INTERPRET" in os.environ:
    interpreter.remember()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(dialect, **make_checkpoint's arguments) -> its directory, written once."""
    written = {}

    def make(dialect="nvidia-borrowed", **kwargs):
        key = repr((dialect, sorted(kwargs.items())))
        if key not in written:
            out_dir = tmp_path_factory.mktemp(dialect)
            written[key] = make_checkpoint(out_dir, dialect, **kwargs)
        return written[key]

    return make


@pytest.fixture(scope="session")
def make_engine():
    """make_engine(model, **LLM's arguments): one live engine per distinct set of arguments.

    Another engine beside the first costs 0.3 s, deleting one costs more: they live to the end."""
    from vllm import LLM

    gc.collect()
    gc.freeze()
    live = {}

    def make(model, **kwargs):
        kwargs = {
            "max_model_len": 1024,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 16 << 20,
            **kwargs,
        }
        key = repr((str(model), sorted(kwargs.items())))
        if key not in live:
            live[key] = LLM(str(model), **kwargs)
        live[key].reset_prefix_cache()
        return live[key]

    yield make
    with pytest.MonkeyPatch.context() as patch:  # an engine's end asks twice for a second of this
        patch.setattr(gc, "collect", lambda *_: 0)
        live.clear()


@pytest.fixture
def fresh_connector(monkeypatch):
    """vLLM keeps one worker connector per process and expects it of every engine there: an engine
    without one can't run beside one that has it, whichever connector it is."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", None)


@pytest.fixture
def expert_group(monkeypatch):
    """vLLM makes its groups of ranks once per process, that of experts only for a model with them.
    Of one rank, all groups are the same."""
    from vllm.distributed import parallel_state

    if parallel_state._EP is None and parallel_state._TP is not None:
        monkeypatch.setattr(parallel_state, "_EP", parallel_state.get_tp_group())
