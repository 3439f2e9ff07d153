"""All copies of a step leave what they leave one after the other, in three launches as long as none
writes what another one reads or writes."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from arena_harness import copy_of
from kernel_cases import DEVICE, Case, watch_launches

from vllm_dms.backend.copies import pack
from vllm_dms.backend.snapshots import TorchSnapshots
from vllm_dms.backend.state import ArenaState, allocate_state
from vllm_dms.backend.triton_snapshots import TritonSnapshots
from vllm_dms.backend.updates import NULL_STEP, apply_message

NUM_BLOCKS, NUM_STATES = 40, 9
CASES = {
    "no leaves": Case(lengths=(70,), window=8),
    "leaves of 2": Case(lengths=(70,), leaf=2, heads=3, layers=1),
    "leaves of 32": Case(lengths=(320,)),
    "fp8": Case(lengths=(70,), storage="fp8", leaf=4),
    "int4": Case(lengths=(70,), storage="int4", dim=64, leaf=4),
    "records of two blocks": Case(lengths=(70,), window=4000, heads=1),
}
LAUNCHES = ["places", "copy_blocks", "record"]


class Arena:
    """Anything in its blocks and states; pages and leaves that exist in its tables."""

    def __init__(self, case: Case, make_snapshots, seed=0) -> None:
        self.layout = layout = case.layout()
        bytes = torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8, device=DEVICE)
        self.state = state = allocate_state(bytes, layout, NUM_BLOCKS, NUM_STATES - 1)
        rng = np.random.default_rng(seed)

        def fill(tensor, bound):
            found = rng.integers(0, bound, tensor.shape)
            tensor.copy_(torch.from_numpy(found).to(tensor.dtype))

        num_pages = NUM_BLOCKS * layout.pages_per_block
        fill(state.blocks, 256)
        fill(state.leaves, num_pages)
        fill(state.page_table[..., : layout.leaf_size], num_pages)
        fill(state.page_table[..., layout.leaf_size :], max(len(state.leaves), 1))
        fill(state.live, 100)
        fill(state.evict_ring, 2)
        fill(state.leaves_used, 9)
        fill(state.pages_used, 3 * layout.pages_per_block)
        self.snapshots = make_snapshots(state)

    def record(self, number):
        """Blocks of one of the records for which the last ones of the arena are set aside."""
        size = self.layout.record_blocks
        return [NUM_BLOCKS - 1 - number * size - i for i in range(size)]

    def contents(self):
        others = [getattr(self.state, f.name) for f in fields(ArenaState)[3:]]
        return [self.state.blocks, *others]


def check(case: Case, saves, restores=(), seed=0):
    """Kernels, which get all at once, leave what plain PyTorch does, copy after copy."""
    results = []
    for make_snapshots in (TorchSnapshots, TritonSnapshots):
        arena = Arena(case, make_snapshots, seed)
        if saves:
            arena.snapshots.save(saves)
        if restores:
            arena.snapshots.restore(restores)
        results.append(arena.contents())
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_many_requests_go_on_from_one_state_at_once(case):
    record = Arena(case, TorchSnapshots).record(0)
    saves = [copy_of(1, [1, 2, 3], [4, 5, 6], record)]
    targets = [[7 + 3 * i, 8 + 3 * i, 9 + 3 * i] for i in range(6)]
    restores = [
        copy_of(2 + i, [4, 5, 6], target, record, again=(-1, 5, 700)[i % 3])
        for i, target in enumerate(targets)
    ]
    assert pack(restores, NUM_BLOCKS, saves=False).runs == [(0, 6)]
    check(case, saves, restores)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_requests_go_on_from_several_states_at_once_that_were_saved_at_once(case):
    """Of different sizes, more blocks than are in use among them; one stays where it is."""
    records = [Arena(case, TorchSnapshots).record(i) for i in range(3)]
    saves = [
        copy_of(3, [1, 2, 3, 4, 5], [6, 7, 8, 9, 10], records[0]),
        copy_of(1, [11], [12], records[1]),
        copy_of(2, [13, 14, 15], [13, 14, 15], records[2]),
    ]
    restores = [
        copy_of(8, [6, 7, 8], [1, 2, 3], records[0]),
        copy_of(7, [13, 14, 15], [16, 17, 18], records[2], again=3),
        copy_of(6, [12], [4], records[1]),
        copy_of(5, [6, 7, 8], [5, 19, 20], records[0], again=12),
        copy_of(4, [13, 14, 15], [13, 14, 15], records[2]),
    ]
    assert pack(saves, NUM_BLOCKS, saves=True).runs == [(0, 3)]
    assert pack(restores, NUM_BLOCKS, saves=False).runs == [(0, 5)]
    check(case, saves, restores)


SAVED = [copy_of(1, [1, 2], [3, 4], [39]), copy_of(2, [5, 6], [7, 8], [38])]
ONE_BLOCK = CASES["leaves of 2"]
# Copies, and how many runs they are.
RESTORES = {
    "what one writes the next reads": ([(3, [3, 4], [7, 9], [39]), (4, [7, 8], [10, 11], [38])], 2),
    "what one reads the next writes": ([(3, [3, 4], [9, 10], [39]), (4, [7, 8], [4, 11], [38])], 2),
    "the record of one is written by the next": (
        [(3, [3, 4], [3, 4], [39]), (4, [7, 8], [39, 9], [38])],
        2,
    ),
    "both write the same": ([(3, [3, 4], [9, 10], [39]), (4, [7, 8], [11, 9], [38])], 2),
    "one state twice": ([(3, [3, 4], [9, 10], [39]), (3, [7, 8], [11, 12], [38])], 2),
    "a block in two places": ([(3, [3, 4], [9, 10], [39]), (4, [4, 7], [11, 12], [38])], 2),
    "what stays where it is was read before": (
        [(3, [3, 4], [9, 10], [39]), (4, [3, 4], [3, 4], [39])],
        1,
    ),
    "what one writes was written before its run": (
        [(3, [3, 4], [9, 10], [39]), (4, [7, 8], [4, 11], [38]), (5, [7, 8], [9, 12], [38])],
        2,
    ),
    "one in between": (
        [
            (3, [3, 4], [9, 10], [39]),
            (4, [7, 8], [11, 12], [38]),
            (5, [3, 4], [8, 13], [39]),
            (6, [3, 4], [14, 15], [39]),
            (7, [3, 4], [14, 7], [39]),
        ],
        3,
    ),
}
SAVES = {
    "the same record": ([(1, [1, 2], [3, 4], [39]), (2, [5, 6], [7, 8], [39])], 2),
    "a record where another state was kept": (
        [(1, [1, 2], [3, 4], [39]), (2, [5, 6], [7, 8], [3])],
        2,
    ),
    "a record in a block that stays": ([(1, [1, 2], [1, 2], [39]), (2, [5, 6], [5, 6], [2])], 1),
    "a state where another one's record was": (
        [(1, [1, 2], [3, 4], [39]), (2, [5, 6], [7, 39], [38])],
        2,
    ),
    "a state where another one is": ([(1, [1, 2], [5, 4], [39]), (2, [5, 6], [7, 8], [38])], 2),
    "what is kept of one is of another one": (
        [(1, [1, 2], [3, 4], [39]), (2, [39, 3], [7, 8], [38])],
        2,
    ),
    "one state twice": ([(1, [1, 2], [3, 4], [39]), (1, [1, 2], [7, 8], [38])], 1),
}


@pytest.mark.parametrize(("copies", "runs"), RESTORES.values(), ids=RESTORES)
def test_restores_that_meet_are_made_one_after_the_other(copies, runs):
    restores = [copy_of(*parts) for parts in copies]
    assert len(pack(restores, NUM_BLOCKS, saves=False).runs) == runs
    check(ONE_BLOCK, SAVED, restores)


@pytest.mark.parametrize(("copies", "runs"), SAVES.values(), ids=SAVES)
def test_saves_that_meet_are_made_one_after_the_other(copies, runs):
    saves = [copy_of(*parts) for parts in copies]
    assert len(pack(saves, NUM_BLOCKS, saves=True).runs) == runs
    check(ONE_BLOCK, saves)


def draw(rng, free, count):
    return rng.choice(sorted(free), count, replace=False).tolist()


def draw_saves(rng):
    """Between ten blocks or forty, so that many meet or few."""
    blocks = set(range(1, (12, NUM_BLOCKS)[rng.integers(2)]))
    for s in rng.permutation(NUM_STATES)[: rng.integers(1, 7)].tolist():
        source = draw(rng, blocks, rng.integers(1, 5))
        others = blocks - {*source}
        target = source if rng.random() < 0.3 else draw(rng, others, len(source))
        yield copy_of(s, source, target, draw(rng, others - {*target}, 1))


def draw_restores(rng, saved):
    """Of states that are in place as long as their records are."""
    count = rng.integers(1, 8)
    chosen = [saved[i] for i in rng.integers(0, len(saved), count)]
    blocks = set(range(1, (16, NUM_BLOCKS)[rng.integers(2)]))
    for i, (_, (_, source, record), _) in enumerate(chosen):
        still = {b for other in chosen[i:] for b in other.blocks[2].tolist()}
        others = blocks - {*source.tolist()} - still
        stays = rng.random() < 0.3
        target = source if stays else draw(rng, others, len(source))
        again = rng.integers(-1, 20).item()
        yield copy_of(rng.integers(1, NUM_STATES).item(), source, target, record, again)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_copies_a_step_has_they_are_as_good_as_one_after_the_other(seed):
    rng = np.random.default_rng(seed)
    if seed % 2:
        return check(ONE_BLOCK, list(draw_saves(rng)), seed=seed)
    saved = [copy_of(i, [1, 2, 3][: i % 3 + 1], [4 * i, 4 * i + 1, 4 * i + 2][: i % 3 + 1],
                     [4 * i + 3]) for i in range(1, 4)]  # fmt: skip
    check(ONE_BLOCK, saved, list(draw_restores(rng, saved)), seed)


def test_random_copies_meet_and_do_not_meet():
    runs = []
    for seed in range(1, 40, 2):
        saves = list(draw_saves(np.random.default_rng(seed)))
        runs.append((len(pack(saves, NUM_BLOCKS, saves=True).runs), len(saves)))
    assert any(n == 1 < of for n, of in runs) and any(1 < n < of for n, of in runs), runs


@pytest.mark.parametrize("number", [1, 3, 8])
def test_a_step_launches_as_much_for_many_copies_as_for_one(number, monkeypatch):
    arena = Arena(ONE_BLOCK, TritonSnapshots)
    saves = [copy_of(i, [4 * i], [4 * i + 1], [4 * i + 2]) for i in range(1, number + 1)]
    restores = [copy_of(i, [5], [4 * i + 3], [6]) for i in range(1, number + 1)]
    names = watch_launches(monkeypatch)
    meta = replace(NULL_STEP, saves=tuple(saves), restores=tuple(restores))
    apply_message(arena.state, arena.snapshots, meta)
    assert names == 2 * LAUNCHES
    apply_message(arena.state, arena.snapshots, NULL_STEP)
    assert names == 2 * LAUNCHES
