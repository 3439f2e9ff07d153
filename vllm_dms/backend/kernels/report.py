"""The end of a step: how many pages each request holds and may need, in one launch."""

import torch
import triton
import triton.language as tl

from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.backend.state import ArenaState


@triton.jit
def report_kernel(
    pages_used_ptr,
    live_ptr,
    out_ptr,
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


def launch_report(state: ArenaState, out: torch.Tensor) -> None:
    """`ops.report` as a kernel; ``out`` int32 [num_states, REPORT_HORIZON + 2], contiguous."""
    layout = state.layout
    assert out.shape == (state.num_states, REPORT_HORIZON + 2), out.shape
    assert out.is_contiguous() and state.live.is_contiguous()
    report_kernel[(state.num_states,)](
        state.pages_used,
        state.live,
        out,
        ROWS=layout.num_rows,
        ROWS_PAD=triton.next_power_of_2(layout.num_rows),
        P=layout.page_size,
        HORIZON=REPORT_HORIZON,
    )
