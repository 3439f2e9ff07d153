"""The kernels at the sizes and with the launch parameters that serve, and inside a CUDA graph."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_as_good_as_plain, assert_same_state, check, null_batch

from vllm_dms.backend.ops import attend

pytestmark = pytest.mark.gpu

SERVED = Case(
    dim=128, heads=8, group=4, window=512, page=64, lengths=(1, 63, 513, 1500, 2100),
    rates=(0.95, 0.5, 0.9, 1.0, 0.0, 0.8, 0.99, 0.7), tuning=None, dtype=torch.bfloat16,
)  # fmt: skip


@pytest.mark.parametrize("storage", ["model", "fp8", "int4"])
def test_at_the_size_that_serves(storage):
    # Long chunks first, so that few of the plain version's slow steps remain.
    chunks = (700, 1, 260, 513, 1, 640)
    check(replace(SERVED, storage=storage, rounded=storage != "model", chunks=chunks))


def test_a_captured_step_replays_for_other_requests():
    """Captured on the null state, replayed twice: the same as the eager steps."""
    case = replace(SERVED, lengths=(600, 700), chunks=(597, 1))
    eager, _ = case.run(kernels=True)
    _, plain = case.run(kernels=False)
    harness, seqs = case.harness(kernels=True), case.sequences()
    for index, seq in enumerate(seqs):
        harness.start(index)
        harness.step([(index, seq, len(seq) - 2)])

    inputs = [getattr(seqs[0], n)[:3].clone() for n in ("query", "key", "value", "alpha")]
    output = torch.zeros_like(inputs[0])
    batch = null_batch(counts=(1, 1, 1), stored=(0, 0, 0))

    def step():
        harness.ops.begin_step(batch)
        for layer in range(2):
            attend(harness.ops, batch, layer, *inputs, output)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    batch.query_start.copy_(torch.tensor([0, 1, 2, 2]))  # the third row is padding
    batch.block_table[:2, 0] = harness.rows[:, 0]
    for _ in range(2):
        for i, seq in enumerate(seqs):
            for tensor, name in zip(inputs, ("query", "key", "value", "alpha"), strict=True):
                tensor[i] = getattr(seq, name)[seq.stored]
            seq.stored += 1
            batch.seq_lens[i] = seq.stored
        graph.replay()
        for i, seq in enumerate(seqs):
            seq.outputs.append(output[i : i + 1].clone())
    assert_same_state(case, harness, eager)
    for seq, other in zip(seqs, plain, strict=True):
        assert_as_good_as_plain(case, seq, other)
