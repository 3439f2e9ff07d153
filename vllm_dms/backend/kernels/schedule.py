"""Who does what in decode attention.

Rows are cut into tiles of BLOCK_N slots. All tiles of a layer, row after row, are shared out evenly
to a fixed number of programs, whatever the lengths of the rows: each takes num_tiles // PROGRAMS in
succession, and the first num_tiles % PROGRAMS of them one more.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.backend.kernels.common import row_index
from vllm_dms.backend.kernels.tuning import Tuning


class Schedule(NamedTuple):
    """Decode rows of a step, in order, and what programs tell each other.

    N is the bound max_num_seqs * H on rows, PROGRAMS the number of programs. A program leaves at
    most two partial results: 2p of a row that it joins midway, 2p + 1 of one that it starts.
    """

    row_query: Any  # int32 [N]: query token * H + head
    row_state: Any  # int32 [N]: state index
    row_tile: Any  # int32 [L, N + 1]: tiles before each row; after the last: of all
    num_tiles: Any  # int32 [L]: of all rows
    begin: Any  # int32 [L, PROGRAMS, BEGIN_FIELDS]: all that a program needs to know to begin
    partial: Any  # float32 [2 * PROGRAMS, G, D]: sum of weighted values
    partial_max: Any  # float32 [2 * PROGRAMS, G]: largest score, base 2
    partial_sum: Any  # float32 [2 * PROGRAMS, G]: sum of weights
    done: Any  # int32 [PROGRAMS]: parts that are there of a shared row, by its first program
    N: Any
    PROGRAMS: Any


# First tile of a program, the tile after its last; of the row of its first tile: the row's place
# among the rows, its first tile, the tile after its last, row_query, row_state; if the program is
# the row's second, the row's last program, else 0. One sector of memory.
BEGIN_FIELDS = tl.constexpr(8)


def allocate_schedule(
    layout: ArenaLayout,
    max_num_seqs: int,
    num_query_heads: int,
    tuning: Tuning,
    device: torch.device,
) -> Schedule:
    group, rest = divmod(num_query_heads, layout.num_kv_heads)
    if rest:
        raise ValueError(
            f"{num_query_heads} query heads over {layout.num_kv_heads} KV heads, but the kernels "
            "expect the same number of query heads for each KV head"
        )
    rows = max_num_seqs * layout.num_kv_heads
    sms = 4  # under the interpreter
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    programs = tuning.programs or tuning.programs_per_sm * sms

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    parts = (2 * programs, group)
    return Schedule(
        row_query=zeros(rows),
        row_state=zeros(rows),
        row_tile=zeros(layout.num_layers, rows + 1),
        num_tiles=zeros(layout.num_layers),
        begin=zeros(layout.num_layers, programs, BEGIN_FIELDS.value),
        partial=zeros(*parts, layout.head_dim, dtype=torch.float32),
        partial_max=zeros(*parts, dtype=torch.float32),
        partial_sum=zeros(*parts, dtype=torch.float32),
        done=zeros(programs),
        N=rows,
        PROGRAMS=programs,
    )


@triton.jit
def first_tile(p, num_tiles, PROGRAMS):
    """Of program p; of program p + 1 it is the tile after p's last."""
    return p * (num_tiles // PROGRAMS) + tl.minimum(p, num_tiles % PROGRAMS)


@triton.jit
def program_of(tile, num_tiles, PROGRAMS):
    share, wider = num_tiles // PROGRAMS, num_tiles % PROGRAMS
    others = tile - wider * (share + 1)
    return tl.where(others < 0, tile // (share + 1), wider + others // tl.maximum(share, 1))


@triton.jit
def partial_of(p, begins):
    """Where program p leaves its part of a row that it ``begins`` or joins midway."""
    return 2 * p + begins.to(tl.int32)


@triton.jit
def list_requests(
    state, requests, block_table, stride_block_table, query_start, seq_lens, num_reqs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the kernels of every layer ask of a request, side by side."""
    for b0 in range(0, num_reqs, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        mask = b < num_reqs
        start = tl.load(query_start + b, mask=mask, other=0)
        m = tl.load(query_start + b + 1, mask=mask, other=0) - start
        n = tl.load(seq_lens + b, mask=mask, other=0) - m
        block = tl.load(block_table + b.to(tl.int64) * stride_block_table, mask=mask, other=0)
        tl.store(requests.start + b, start, mask=mask)
        tl.store(requests.tokens + b, m, mask=mask)
        tl.store(requests.stored + b, n, mask=mask)
        s = tl.load(state.state_of_block + block, mask=mask, other=0)
        tl.store(requests.state + b, s, mask=mask)


@triton.jit(
    do_not_specialize=["block_table", "stride_block_table", "query_start", "seq_lens", "num_reqs"]
)
def schedule_kernel(
    block_table,
    stride_block_table,
    query_start,
    seq_lens,
    num_reqs,
    state,
    requests,
    schedule,
    geo,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PROGRAMS_PAD: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (L): fill `Schedule` for every layer of a step, and `Requests`. Before any layer's
    `store`: rows count one slot more than they hold."""
    layer = tl.program_id(0)
    if layer == 0:
        list_requests(
            state, requests, block_table, stride_block_table, query_start, seq_lens, num_reqs,
            BLOCK_ROWS,
        )  # fmt: skip
    row_tile = schedule.row_tile + layer * (schedule.N + 1)
    num_rows = 0
    num_tiles = 0
    for r0 in range(0, num_reqs * geo.H, BLOCK_ROWS):
        r = r0 + tl.arange(0, BLOCK_ROWS)
        b, h = r // geo.H, r % geo.H
        mask = b < num_reqs
        start = tl.load(query_start + b, mask=mask, other=0)
        m = tl.load(query_start + b + 1, mask=mask, other=0) - start
        mask = mask & (m == 1)
        n = tl.load(seq_lens + b, mask=mask, other=1) - 1
        block_ptr = block_table + b.to(tl.int64) * stride_block_table
        s = tl.load(
            state.state_of_block + tl.load(block_ptr, mask=mask, other=0), mask=mask, other=0
        )
        live = tl.load(state.live + row_index(s, layer, h, geo), mask=mask, other=0)
        live = tl.where((n == 0) | (s == 0), 0, live)
        tiles = tl.where(mask, tl.cdiv(live + 1, BLOCK_N), 0)

        i = num_rows + tl.cumsum(mask.to(tl.int32), 0) - 1
        tl.store(row_tile + i, num_tiles + tl.cumsum(tiles, 0) - tiles, mask=mask)
        # The same from every layer: each reads its own below.
        tl.store(schedule.row_query + i, start * geo.H + h, mask=mask)
        tl.store(schedule.row_state + i, s, mask=mask)
        num_rows += tl.sum(mask.to(tl.int32), 0)
        num_tiles += tl.sum(tiles, 0)
    tl.store(row_tile + num_rows, num_tiles)
    tl.debug_barrier()

    # Every program's first row at once: the last row that does not begin after its first tile.
    p = tl.arange(0, PROGRAMS_PAD)
    tile = first_tile(p, num_tiles, schedule.PROGRAMS)
    low, high = p * 0, p * 0 + num_rows
    for _ in range(STEPS):
        middle = (low + high) // 2
        begin = tl.load(row_tile + middle, mask=low < high, other=0)
        low = tl.where((low < high) & (begin <= tile), middle + 1, low)
        high = tl.where((low < high) & (begin > tile), middle, high)
    i = low - 1
    stop = first_tile(p + 1, num_tiles, schedule.PROGRAMS)
    mask = p < schedule.PROGRAMS
    busy = mask & (tile < stop)  # so the row exists
    row_begin = tl.load(row_tile + i, mask=busy, other=0)
    row_end = tl.load(row_tile + i + 1, mask=busy, other=0)
    before = first_tile(p - 1, num_tiles, schedule.PROGRAMS)
    second = busy & (row_begin < tile) & (row_begin >= before)
    last = tl.where(second, program_of(row_end - 1, num_tiles, schedule.PROGRAMS), 0)
    out = schedule.begin + (layer * schedule.PROGRAMS + p) * BEGIN_FIELDS
    tl.store(out, tile, mask=mask)
    tl.store(out + 1, stop, mask=mask)
    tl.store(out + 2, i, mask=busy)
    # An idle program looks at the first tile of whatever row it had last: one that exists.
    tl.store(out + 3, tl.where(busy, row_begin, tile), mask=mask)
    tl.store(out + 4, row_end, mask=busy)
    tl.store(out + 5, tl.load(schedule.row_query + i, mask=busy), mask=busy)
    tl.store(out + 6, tl.load(schedule.row_state + i, mask=busy), mask=busy)
    tl.store(out + 7, last, mask=mask)
    tl.store(schedule.num_tiles + layer, num_tiles)
