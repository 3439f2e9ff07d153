"""How the operations are bound and driven: the order of calls in a step."""

import torch

from vllm_dms.backend.attention import DMSCompactAttentionImpl
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


def test_a_step_is_begun_once_and_by_its_first_layer():
    """Within the forward pass, so that a CUDA graph holds it."""
    impl, ops = DMSCompactAttentionImpl(4, 16, 0.25, 2), Recorder()
    for layer in range(2):
        impl.attend(ops, layer, *[None] * 4, make_batch([1, 1]), None)
    assert ops.calls == [
        ("begin_step",), ("store", 0), ("decode", 0), ("store", 1), ("decode", 1),
    ]  # fmt: skip
    ops.calls.clear()
    impl.attend(ops, 0, *[None] * 4, make_batch([1, 3]), None)
    names = ["begin_step", "store", "prefill", "store_window", "decode"]
    assert [name for name, *_ in ops.calls] == names
