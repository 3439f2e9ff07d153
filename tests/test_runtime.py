"""How the operations are bound and driven: what is refused, the order of calls in a step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from core_sim import make_config

from vllm_dms.backend import attention_ops, runtime
from vllm_dms.backend.runtime import Runtime
from vllm_dms.backend.state import Batch


class Recorder:
    """`Ops` that only take notes."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda batch, *args: self.calls.append((name, *args[:1]))


def make_batch(counts):
    counts = torch.tensor(counts)
    return Batch(
        num_reqs=len(counts),
        num_tokens=int(counts.sum()),
        max_query_len=int(counts.max()),
        block_table=torch.zeros(len(counts), 1, dtype=torch.int32),
        query_start=torch.cat([counts[:1] * 0, counts.cumsum(0)]).int(),
        seq_lens=counts.int(),
    )


def run_op(monkeypatch, ops, layer, batch):
    """The op of a layer, of the step ``batch``."""
    bound = SimpleNamespace(ops=ops, bind=lambda kv_cache: None)
    found = SimpleNamespace(dms_runtime=bound, kv_cache=None, layer_index=layer)
    context = SimpleNamespace(
        attn_metadata={"a": SimpleNamespace(batch=batch)}, no_compile_layers={"a": found}
    )
    monkeypatch.setattr(attention_ops, "get_forward_context", lambda: context)
    attention_ops._attention(*[None] * 5, "a")


def test_a_step_is_begun_once_and_by_its_first_layer(monkeypatch):
    """Within the forward pass, so that a CUDA graph holds it."""
    ops = Recorder()
    for layer in range(2):
        run_op(monkeypatch, ops, layer, make_batch([1, 1]))
    assert ops.calls == [
        ("begin_step",), ("store", 0), ("decode", 0), ("store", 1), ("decode", 1),
    ]  # fmt: skip
    ops.calls.clear()
    run_op(monkeypatch, ops, 0, make_batch([1, 3]))
    names = ["begin_step", "store", "prefill", "store_window", "decode"]
    assert [name for name, *_ in ops.calls] == names
    ops.calls.clear()
    run_op(monkeypatch, ops, 0, replace(make_batch([2, 3]), may_decode=False))
    assert [name for name, *_ in ops.calls] == names[:-1]


def make_runtime(**settings):
    vllm_config, config = make_config()
    return Runtime(vllm_config, replace(config, **settings), torch.device("cpu"), 0.25)


def test_side_state_that_does_not_fit_is_refused_with_a_remedy(monkeypatch):
    needed = make_runtime().layout.side_bytes(4, 48)
    monkeypatch.setattr(runtime, "free_memory", lambda device: needed)
    make_runtime()
    monkeypatch.setattr(runtime, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"--max-num-seqs 4 and --max-model-len 256 need .* Lower"):
        make_runtime()


def test_flash_attention_is_looked_for_only_if_asked_for(monkeypatch):
    def absent(*args):
        raise ValueError("looked for")

    monkeypatch.setattr(runtime, "find_flash", absent)
    for kernels in ("auto", "triton", "torch"):
        make_runtime(kernels=kernels)
    with pytest.raises(ValueError, match="looked for"):
        make_runtime(kernels="flash")


def test_an_allocation_for_fewer_blocks_than_vllm_hands_out_is_refused():
    """As if a layer had an allocation of its own."""
    made = make_runtime()
    num_layers, size = made.layout.num_layers, made.layout.block_bytes
    cache = torch.zeros(6 * size, dtype=torch.int8).view(6, -1)
    made.bind(cache[:, : size // num_layers])
    assert made.state.num_blocks == 6
    alone = torch.zeros(6, size // num_layers, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"hands out 6 blocks, but .* are 3 of"):
        make_runtime().bind(alone)
