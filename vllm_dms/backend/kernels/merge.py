"""Rows of decode attention that several programs share: from their partial results to the output.

Where rows have few parts (MERGES), by the program of theirs that is done last; where they have
many, by a kernel of its own, which reads them at once. Always in the same order.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import NO_SCORE, wait_for_previous_kernel
from vllm_dms.backend.kernels.schedule import BEGIN_FIELDS, partial_of, program_of


@triton.jit
def head_offset(token_head, stride, geo, G: tl.constexpr):
    """Where the query heads of a row begin, in elements of query or output."""
    token, h = (token_head // geo.H).to(tl.int64), token_head % geo.H
    return token * stride + h * G * geo.D


@triton.jit
def store_partial(schedule, p, begins, acc, top, total, geo, G: tl.constexpr, ROWS: tl.constexpr):
    """Leave program p's part of a row that it ``begins`` or joins midway."""
    i = partial_of(p, begins)
    offs_g = tl.arange(0, ROWS)
    offs_d = tl.arange(0, geo.D_PAD)
    mask = (offs_g < G)[:, None] & (offs_d < geo.D)[None, :]
    tl.store(schedule.partial_max + i * G + offs_g, top, mask=offs_g < G)
    tl.store(schedule.partial_sum + i * G + offs_g, total, mask=offs_g < G)
    offs = (i * G + offs_g)[:, None] * geo.D + offs_d[None, :]
    tl.store(schedule.partial + offs, acc, mask=mask)


@triton.jit
def merge_parts(
    schedule, first, last, out_ptr, geo, G: tl.constexpr, G_PAD: tl.constexpr, PARTS: tl.constexpr
):
    """Put a row's output together from the parts of programs [first, last], PARTS at a time."""
    offs_g = tl.arange(0, G_PAD)
    offs_d = tl.arange(0, geo.D_PAD)
    mask_g = offs_g < G
    mask = mask_g[:, None] & (offs_d < geo.D)[None, :]
    offs = offs_g[:, None] * geo.D + offs_d[None, :]
    top = tl.full([G_PAD], NO_SCORE, tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, geo.D_PAD], tl.float32)
    for part in range(first, last + 1, PARTS):
        parts = part + tl.arange(0, PARTS)
        there = parts <= last
        i = partial_of(parts, parts == first) * G
        mask_i = there[:, None] & mask_g[None, :]
        tops = tl.load(
            schedule.partial_max + i[:, None] + offs_g[None, :], mask=mask_i, other=NO_SCORE
        )
        sums = tl.load(schedule.partial_sum + i[:, None] + offs_g[None, :], mask=mask_i, other=0.0)
        values = tl.load(
            schedule.partial + i[:, None, None] * geo.D + offs[None, :, :],
            mask=there[:, None, None] & mask[None, :, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(sums * weights, 0)
        acc = acc * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    tl.store(out_ptr + offs, acc / tl.where(total == 0, 1.0, total)[:, None], mask=mask)


@triton.jit
def finish_row(
    schedule, num_tiles, row_begin, row_end, out_ptr, geo,
    G: tl.constexpr, G_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """After `store_partial`: the last of a row's programs to come here merges their parts."""
    first = program_of(row_begin, num_tiles, schedule.PROGRAMS)
    last = program_of(row_end - 1, num_tiles, schedule.PROGRAMS)
    # What all threads of this program wrote is there before one of them says so, and what others
    # wrote before they said so is seen by all threads that read after it.
    tl.debug_barrier()
    done = tl.atomic_add(schedule.done + first, 1, sem="acq_rel")
    if done == last - first:
        tl.store(schedule.done + first, 0)  # for the next layer
        merge_parts(schedule, first, last, out_ptr, geo, G, G_PAD, PARTS)


@triton.jit(do_not_specialize=["layer"])
def merge_kernel(
    output_ptr,
    stride_output,
    layer,
    schedule,
    geo,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (PROGRAMS, G): one query head of the row that program p joins as its second program."""
    p, g = tl.program_id(0), tl.program_id(1)
    begin = schedule.begin + (layer * schedule.PROGRAMS + p) * BEGIN_FIELDS
    last = tl.load(begin + 7)
    token_head = tl.load(begin + 5)
    # Out of the way of programs that have work. Program 0 never has: it stays, so that this kernel
    # does not end before the one that it follows.
    if (last == 0) & (p > 0):
        return
    wait_for_previous_kernel(OVERLAP)
    if p == 0:
        return
    offs_d = tl.arange(0, geo.D_PAD)
    mask_d = offs_d < geo.D
    first = p - 1
    top = NO_SCORE
    total = 0.0
    acc = tl.zeros([geo.D_PAD], tl.float32)
    for part in range(first, last + 1, BLOCK):
        parts = part + tl.arange(0, BLOCK)
        mask = parts <= last
        i = partial_of(parts, parts == first) * G + g
        tops = tl.load(schedule.partial_max + i, mask=mask, other=NO_SCORE)
        sums = tl.load(schedule.partial_sum + i, mask=mask, other=0.0)
        values = tl.load(
            schedule.partial + i[:, None] * geo.D + offs_d[None, :],
            mask=mask[:, None] & mask_d[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(sums * weights, 0)
        acc = acc * decay + tl.sum(values * weights[:, None], 0)
        top = new_top
    out_ptr = output_ptr + head_offset(token_head, stride_output, geo, G) + g * geo.D
    tl.store(out_ptr + offs_d, acc / tl.where(total == 0, 1.0, total), mask=mask_d)
