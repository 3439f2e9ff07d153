"""The end of a step: how many pages each request holds and may need, in one launch."""

import triton
import triton.language as tl

from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.backend.kernels.launch import Launcher
from vllm_dms.backend.state import ArenaState


@triton.jit
def report_kernel(
    out_ptr,
    pages_used_ptr,
    live_ptr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    P: tl.constexpr,
    HORIZON: tl.constexpr,
):
    """Grid (num_states): one row of `ops.report` from one state's live slots [ROWS]."""
    s = tl.program_id(0)
    offs = tl.arange(0, ROWS_PAD)
    mask = offs < ROWS
    live = tl.load(live_ptr + s * ROWS + offs, mask=mask, other=0)
    pages = tl.cdiv(live, P)
    out_ptr += s * (HORIZON + 2)
    tl.store(out_ptr, tl.load(pages_used_ptr + s))
    for k in tl.static_range(1, HORIZON + 1):
        more = tl.where(mask, tl.cdiv(live + k, P) - pages, 0)
        tl.store(out_ptr + k, tl.sum(more, 0))
    tl.store(out_ptr + HORIZON + 1, tl.sum(live, 0))


def report_launcher(state: ArenaState) -> Launcher:
    """`ops.report` as a kernel, for every state of ``out`` int32 [num_states, REPORT_WIDTH]."""
    rows = state.layout.num_rows
    assert state.live.is_contiguous()
    return Launcher(
        report_kernel, state.pages_used, state.live, rows, triton.next_power_of_2(rows),
        state.layout.page_size, REPORT_HORIZON,
    )  # fmt: skip
