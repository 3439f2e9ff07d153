"""A state that was kept goes on in another request as if that had read its tokens itself."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from arena_harness import Harness, assert_taken_from_own_blocks, copy_of, gather_row
from kernel_cases import DEVICE, Case, assert_as_good_as_plain, equal, make_kernels

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.storage import ModelStorage
from vllm_dms.backend.snapshots import TorchSnapshots
from vllm_dms.backend.torch_ops import TorchOps
from vllm_dms.backend.triton_snapshots import TritonSnapshots

CASE = Case(lengths=(70, 70, 70), window=8)
IMPLEMENTATIONS = {"torch": TorchSnapshots, "triton": TritonSnapshots}


def ids(blocks):
    return torch.as_tensor(blocks, dtype=torch.int32, device=DEVICE)


class Keeper:
    """A harness whose last rows of blocks are nobody's, to keep states in."""

    def __init__(self, case: Case, kind: str, make_ops=TorchOps) -> None:
        config, layout = case.config(), case.layout()
        self.harness = Harness(make_ops, config, layout, len(case.lengths) + 2, 512, DEVICE)
        self.snapshots = IMPLEMENTATIONS[kind](self.harness.state)
        self.layout, self.state = layout, self.harness.state
        self.spare = self.harness.rows[-2:].flatten().tolist()

    def feed(self, index, sequence, counts):
        for count in counts:
            self.harness.step([(index, sequence, count)])

    def blocks_in_use(self, index) -> int:
        return -(-int(self.state.pages_used[index + 1]) // self.layout.pages_per_block)

    def save(self, index, in_place=False, bound=0):
        """Up to ``bound`` blocks more than are in use are set aside; what they hold is left."""
        used = self.blocks_in_use(index)
        source = self.harness.rows[index][: used + bound].tolist()
        record = [self.spare.pop() for _ in range(self.layout.record_blocks)]
        target = source if in_place else [self.spare.pop() for _ in source]
        untouched = self.state.blocks[ids(target[used:]).long()].clone()
        self.snapshots.save([copy_of(index + 1, source, target, record)])
        assert torch.equal(self.state.blocks[ids(target[used:]).long()], untouched)
        return target[:used], record

    def start(self, index, kept, move=False, again=-1):
        """What `restore` is to copy."""
        blocks, record = kept
        if move:
            others = [b for b in self.harness.rows[index].tolist() if b not in blocks]
            row = [*blocks, *others][: len(self.harness.rows[index])]
            self.harness.rows[index] = ids(row)
        self.harness.start(index)
        target = self.harness.rows[index][: len(blocks)].tolist()
        return copy_of(index + 1, blocks, target, record, again)

    def restore(self, *args, **kwargs):
        self.snapshots.restore([self.start(*args, **kwargs)])


def fork(sequence, at, other):
    """``other`` with the first ``at`` tokens of ``sequence``, stored already."""
    for name in ("query", "key", "value", "alpha"):
        getattr(other, name)[:at] = getattr(sequence, name)[:at]
    other.stored = at
    other.outputs = [torch.cat(sequence.outputs)[:at]]
    return other


def check_forks(case: Case, kind: str, at: int, in_place=False, move=False):
    keeper = Keeper(case, kind)
    plain = Keeper(case, "torch")
    first, second, third = case.sequences()
    keeper.harness.start(0)
    keeper.feed(0, first, [at - 2, 1, 1] if at > 2 else [at])
    kept = keeper.save(0, in_place, bound=2)
    before = [b.clone() for b in gather_row(keeper.state, 1, case.layers - 1, 0)]
    if in_place:
        # The index goes to another request; the blocks are left to what was kept.
        keeper.state.live[1] = keeper.state.evict_ring[1] = 7
        keeper.state.page_table[1] = 0
    else:
        keeper.feed(0, first, [10, 1, 1])
    for index, sequence in ((1, second), (2, third)):
        if index == 2 and move:
            keeper.restore(2, kept, move=True)
        else:
            keeper.restore(index, kept)
        rows = gather_row(keeper.state, index + 1, case.layers - 1, 0)
        assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))
        fork(first, at, sequence)
    while second.stored < len(second):
        count = min((13, 1, 1, 1)[second.stored % 4], len(second) - second.stored)
        keeper.harness.step([(1, second, count), (2, third, count)])
    if not in_place and not move:
        assert_taken_from_own_blocks(keeper.harness, 3)
    plains = case.sequences()
    for sequence, other in zip((second, third), plains[1:], strict=True):
        fork(first, at, other)
        other.stored, other.outputs = 0, []
        plain.harness.start(0)
        plain.feed(0, other, [at] + [1] * (len(other) - at))
        assert_as_good_as_plain(case, sequence, other)


def check_again(case: Case, kind: str, at: int, chunks=(7, 1, 1), move=False, beyond=5):
    """A request goes on from a state of ``at`` tokens, of which it stores the last once more,
    beside the one that left it: nothing is different, then and later, until ``beyond`` tokens after
    the last of the kept ones left the window."""
    lengths = (at + case.window + 1 + beyond,) * 3
    case = replace(case, lengths=lengths, rounded=case.storage != "model")
    make_ops = partial(make_kernels, group=case.group) if kind == "triton" else TorchOps
    keeper, (first, *_) = Keeper(case, kind, make_ops), case.sequences()
    keeper.harness.start(0)
    counts = itertools.cycle(chunks)
    while first.stored < at:
        keeper.feed(0, first, [min(next(counts), at - first.stored)])
    kept = keeper.save(0, bound=2)
    second = fork(first, at - 1, case.sequences()[0])
    keeper.restore(1, kept, move, again=at - 1)
    keeper.feed(1, second, [1])
    assert_equal_states(case, keeper.state, at)
    assert_near(case, second.outputs[-1], first.outputs[-1][-1:])
    while first.stored < len(first):
        # One, then until the last of the kept tokens leaves the window, then the rest.
        count = min(case.window if first.stored == at + 1 else 1, len(first) - first.stored)
        keeper.harness.step([(0, first, count), (1, second, count)])
        assert_equal_states(case, keeper.state, first.stored)
        assert_near(case, second.outputs[-1], first.outputs[-1])
    assert_taken_from_own_blocks(keeper.harness, 2)


def assert_near(case: Case, a, b):
    """Kernels sum up tile by tile, program by program; with FP8 and 4 bits weights are float16."""
    eps = 1e-5 if case.storage == "model" else 4 * torch.finfo(torch.float16).eps
    assert (a - b).abs().max() <= eps * b.abs().max()


def assert_equal_states(case: Case, state, stored: int):
    """Of the first two requests, whatever pages they are in."""
    for part in (state.pages_used, state.leaves_used, state.live):
        assert torch.equal(part[1], part[2])
    ring = torch.arange(max(0, stored - case.window - 1), stored) % (case.window + 1)
    assert torch.equal(state.evict_ring[1][..., ring], state.evict_ring[2][..., ring])
    for layer in range(case.layers):
        for head in range(case.heads):
            rows = (gather_row(state, index, layer, head) for index in (1, 2))
            assert all(equal(a, b) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("at", [1, 5, 8, 9, 10, 50])
@pytest.mark.parametrize("shift", [0, 1])
def test_two_requests_fork_from_a_state_whose_request_went_on(kind, shift, at):
    check_forks(replace(CASE, shift=shift), kind, at)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("move", [False, True])
def test_blocks_of_a_request_that_ended_are_kept_where_they_are(kind, move):
    check_forks(CASE, kind, 40, in_place=True, move=move)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        {"leaf": 1, "rates": (0.1, 0.6)},
        {"leaf": 2, "rates": (0.0, 0.9, 0.3), "heads": 3},
        {"storage": "fp8", "rounded": True, "leaf": 2},
        {"evict": False},
        {"window": 40, "dim": 16, "page": 8, "heads": 1},
        {"window": 70, "heads": 1, "layers": 1, "storage": "fp8", "rounded": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_place", [False, True])
def test_page_tables_follow_the_blocks(kind, case, in_place):
    check_forks(replace(CASE, **case), kind, 50, in_place=in_place)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_several_requests_go_on_at_once_from_rows_that_have_leaves(kind):
    case = Case(lengths=(300, 300, 300), evict=False)
    keeper, (first, *_) = Keeper(case, kind), case.sequences()
    keeper.harness.start(0)
    keeper.feed(0, first, [290])
    kept = keeper.save(0, bound=2)
    assert keeper.state.leaves_used[1] and case.layout().leaf_size == 32
    keeper.snapshots.restore([keeper.start(1, kept), keeper.start(2, kept, again=289)])
    second, third = (fork(first, at, case.sequences()[0]) for at in (290, 289))
    keeper.harness.step([(2, third, 1)])
    for _ in range(2):
        keeper.harness.step([(0, first, 1), (1, second, 1), (2, third, 1)])
    for layer, head in itertools.product(range(case.layers), range(case.heads)):
        one, *others = (gather_row(keeper.state, s, layer, head) for s in (1, 2, 3))
        for other in others:
            assert all(equal(a, b) for a, b in zip(one, other, strict=True))
    assert_taken_from_own_blocks(keeper.harness, 3)


def test_a_record_may_take_several_blocks():
    case = Case(lengths=(70, 70, 70), window=4000, dim=16)
    assert case.layout().record_blocks > 1
    for kind in IMPLEMENTATIONS:
        check_forks(case, kind, 50)


def test_the_record_of_an_8b_model_takes_one_block():
    storage = ModelStorage(torch.bfloat16)
    layout = ArenaLayout(36, 8, 128, 512, 64, 16, storage, max_model_len=40960)
    assert layout.record_blocks == 1


AGAIN = [
    {"shift": 0, "rates": (0.5, 0.1)},
    {"shift": 1},
    {"evict": False},
    {"leaf": 2, "rates": (0.0, 0.9, 0.3), "heads": 3, "shift": 0},
    {"storage": "fp8", "leaf": 2},
    {"storage": "int4", "dim": 64, "shift": 0},
    {"window": 40, "heads": 1},
    {"window": 15, "page": 4, "evict": False, "shift": 0},
]


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_the_last_token_of_a_state_may_be_stored_once_more(case):
    case = replace(CASE, **case)
    for at in (*range(1, 20), *range(23, 60, 5)):
        if case.layout().can_rewind(at):
            check_again(case, "torch", at, (7, 1, 1) if at % 2 else (70,), move=at % 3 == 0)


@pytest.mark.parametrize("at", [8, 17])  # of a ring of 9 slots, in pages of 8
@pytest.mark.parametrize("case", AGAIN[:-2], ids=str)
def test_the_last_token_of_a_state_may_be_stored_once_more_by_kernels(case, at):
    case = replace(CASE, **case, layers=2 if "heads" in case else 1)
    check_again(case, "triton", at, (at,), move=at == 17, beyond=2)


def test_the_last_token_of_a_long_state_may_be_stored_once_more_by_kernels():
    check_again(replace(CASE, leaf=2, rates=(0.0, 0.3)), "triton", 50, (50,), beyond=2)


def test_a_token_that_opened_a_page_in_a_growing_ring_is_not_stored_once_more():
    layout = CASE.layout()
    assert [at for at in range(1, 30) if not layout.can_rewind(at)] == [1, 9]
