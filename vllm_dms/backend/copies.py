"""A step's copies in one array for the device, and which of them can be made at once.

Copies take effect one after the other, in the order in which they were decided: in a full pool a
block may be read for one and written by the next. A *run* is as many as can be made at once with
the same result: none writes what another one reads or writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_dms.arena.messages import Copy

HEADER = 4  # columns of a copy, before its record


class PackedCopies(NamedTuple):
    """n restores or n saves, of T blocks together."""

    # int32: source [T], target [T] and which copy they are of [T]; then, of each copy,
    # [n, HEADER + record_blocks]: its first block, how many it has, state index, again, record
    lists: np.ndarray
    first: list[int]  # [n + 1]: the first block of each copy, and T
    runs: list[tuple[int, int]]  # of copies, half-open


class Accesses(NamedTuple):
    """Resources [k], and the copies [k] that read or write them. Resources are numbered, with B
    blocks in the arena: blocks [0, B), their entries in ``places`` of the copying kernels [B, 2 B),
    states from 2 B on."""

    resources: np.ndarray
    copies: np.ndarray


def pack(copies: Sequence[Copy], num_blocks: int, saves: bool) -> PackedCopies:
    """``num_blocks``: of the arena. Copies have at least one block."""
    n = len(copies)
    source, target, record = (np.concatenate([c.blocks[i] for c in copies]) for i in range(3))
    counts = np.array([len(copy.blocks[0]) for copy in copies])
    first = np.zeros(n + 1, dtype=np.intp)
    counts.cumsum(out=first[1:])
    copy_of = np.arange(n).repeat(counts)
    columns = np.empty((n, HEADER + len(record) // n), dtype=np.int32)
    columns[:, 0], columns[:, 1] = first[:-1], counts
    columns[:, 2] = [copy.state for copy in copies]
    columns[:, 3] = [copy.again for copy in copies]
    columns[:, HEADER:] = record.reshape(n, -1)
    lists = np.concatenate((source, target, copy_of.astype(np.int32), columns.ravel()))
    place = np.arange(len(source)) - first[:-1].repeat(counts)
    source, target = source.astype(np.intp), target.astype(np.intp)
    reads, writes = find_accesses(source, target, copy_of, place, columns, num_blocks, saves)
    return PackedCopies(lists, first.tolist(), find_runs(reads, writes, n))


def find_accesses(
    source: np.ndarray,
    target: np.ndarray,
    copy_of: np.ndarray,
    place: np.ndarray,
    columns: np.ndarray,
    num_blocks: int,
    saves: bool,
) -> tuple[list[Accesses], list[Accesses]]:
    """What is read and what is written. A block that stays where it is, is neither; an entry in
    ``places`` is written by copies only that disagree on it."""
    copies, record = np.arange(len(columns)), columns[:, HEADER:]
    records = Accesses(record.ravel(), copies.repeat(record.shape[1]))
    moves = source != target
    mover = copy_of[moves]
    reads, writes = [Accesses(source[moves], mover)], [Accesses(target[moves], mover)]
    (writes if saves else reads).append(records)
    if not saves:
        writes.append(Accesses(2 * num_blocks + columns[:, 2], copies))
    # Copies of the same source note the same.
    noted = np.empty(num_blocks, dtype=np.intp)
    noted[source] = place
    differs = noted[source] != place
    if differs.any():
        several = np.isin(source, source[differs])
        writes.append(Accesses(num_blocks + source[several], copy_of[several]))
    return reads, writes


def find_runs(
    reads: list[Accesses], writes: list[Accesses], num_copies: int
) -> list[tuple[int, int]]:
    """The fewest runs of so many copies, in their order."""
    size = 1 + max(part.resources.max(initial=0) for part in (*reads, *writes))
    written = np.zeros(size, dtype=bool)
    for part in writes:
        written[part.resources] = True
    once = np.count_nonzero(written) == sum(len(part.resources) for part in writes)
    if once and not any(written[part.resources].any() for part in reads):
        return [(0, num_copies)]
    last_read, last_written = np.full((2, size), -1)  # by which copy
    starts = [0]
    both = zip(by_copy(reads, num_copies), by_copy(writes, num_copies), strict=True)
    for copy, (own_reads, own_writes) in enumerate(both):
        before = (last_written[own_reads], last_written[own_writes], last_read[own_writes])
        if max(copies.max(initial=-1) for copies in before) >= starts[-1]:
            starts.append(copy)
        last_read[own_reads] = last_written[own_writes] = copy
    return list(zip(starts, [*starts[1:], num_copies], strict=True))


def by_copy(accesses: list[Accesses], num_copies: int) -> list[np.ndarray]:
    """The resources of each copy."""
    resources, copies = map(np.concatenate, zip(*accesses, strict=True))
    order = copies.argsort(kind="stable")
    return np.split(resources[order], np.searchsorted(copies[order], np.arange(1, num_copies)))
