"""Addresses beyond 32 bits, in sparse memory: what is never touched costs nothing on a CPU.

Before an array lies as much as in it, so that an offset that wraps around finds zeros there and
gives a wrong result, not a crash.
"""

from dataclasses import fields
from functools import partial
from tempfile import NamedTemporaryFile

import pytest
import torch
from arena_harness import Harness, gather_row
from kernel_cases import DEVICE, Case, equal, make_kernels

from vllm_dms.backend.state import SideState, allocate_side_state, bind_state
from vllm_dms.backend.torch_ops import TorchOps


def sparse(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 [num_bytes], with as many before them."""
    if DEVICE == "cuda":
        return torch.zeros(2 * num_bytes, dtype=torch.uint8, device=DEVICE)[num_bytes:]
    with NamedTemporaryFile() as file:  # unlike memory, files may promise more than there is
        zeros = torch.from_file(file.name, shared=True, size=2 * num_bytes, dtype=torch.uint8)
    return zeros[num_bytes:]


def sparse_state(layout, num_blocks: int, max_num_seqs: int):
    shapes = allocate_side_state(layout, max_num_seqs, "meta")
    like = (getattr(shapes, f.name) for f in fields(SideState))
    side = (sparse(t.numel() * t.element_size()).view(t.dtype).view(t.shape) for t in like)
    return bind_state(sparse(num_blocks * layout.block_bytes), layout, SideState(*side))


class FarTokens:
    """Lays tensors [T, ...] of up to three tokens so that 2 ** 30 elements lie between tokens."""

    def __init__(self, dtype):
        self.elements = sparse((2 << 30) * dtype.itemsize + (1 << 16)).view(dtype)
        self.next = 0

    def __call__(self, tensor):
        strides = (1 << 30, *tensor.stride()[1:])
        far = self.elements[self.next :].as_strided(tensor.shape, strides)
        self.next += -(-tensor[0].numel() // 64) * 64
        return far.copy_(tensor)


def run(make_ops, case: Case, num_blocks: int, num_seqs: int, spread=None):
    """Each sequence begins with a chunk of three tokens and goes on token by token, beside the
    others; with the last states and the last blocks that there are."""
    layout = case.layout()
    state = sparse_state(layout, num_blocks, num_seqs)
    harness = Harness(make_ops, case.config(), layout, num_seqs, 16, DEVICE, state)
    work = list(enumerate(case.sequences(), start=num_seqs - len(case.lengths)))
    harness.spread = spread or harness.spread
    for place, seq in work:
        harness.start(place)
        harness.step([(place, seq, 3)])
    while work[0][1].stored < len(work[0][1]):
        harness.step([(place, seq, 1) for place, seq in work])
    return harness, work


def check(case: Case, num_blocks: int, num_seqs: int, spread=None) -> None:
    kernels = partial(make_kernels, group=case.group, max_num_seqs=num_seqs)
    found, work = run(kernels, case, num_blocks, num_seqs, spread)
    plain, expected = run(TorchOps, case, num_blocks, num_seqs)
    for (place, seq), (_, other) in zip(work, expected, strict=True):
        for head in range(case.heads):
            states = [harness.state for harness in (found, plain)]
            bits = [s.evict_ring[place + 1, 0, head, : seq.stored] for s in states]
            assert torch.equal(*bits)
            rows = [gather_row(s, place + 1, 0, head) for s in states]
            assert all(equal(a, b) for a, b in zip(*rows, strict=True))
        outputs = (torch.cat(s.outputs).float() for s in (seq, other))
        torch.testing.assert_close(*outputs, rtol=0.01, atol=0.01)


SMALL_CASE = Case(dim=32, layers=1, window=4, page=8, lengths=(24, 24, 24), dtype=torch.float16)


@pytest.mark.parametrize(("storage", "dim"), [("model", 32), ("fp8", 32), ("int4", 64)])
def test_pages_beyond_32_bits(storage, dim):
    """In elements of two bytes, values or scales."""
    case = Case(**vars(SMALL_CASE) | {"storage": storage, "dim": dim})
    check(case, num_blocks=(1 << 32) // case.layout().block_bytes + 100, num_seqs=3)


def test_rows_beyond_32_bits():
    """1,100 requests with a window of 2 ** 20 - 1: a byte for each token, two heads."""
    case = Case(layers=1, window=(1 << 20) - 1, lengths=(8, 8, 8))
    check(case, num_blocks=1100 * case.layout().max_blocks_per_request + 1, num_seqs=1100)


def test_tokens_beyond_32_bits():
    check(SMALL_CASE, num_blocks=100, num_seqs=3, spread=FarTokens(torch.float16))
