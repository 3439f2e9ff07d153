"""The inner loop of decode attention over FP8 pages.

FP8 reaches the tensor cores fast only as 16-bit words: a byte-wise transposed read of shared
memory would cost more than the bytes saved. So channels are read in pairs and widened in registers,
and even and odd channels go through products of their own.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import INTERPRETED, NO_SCORE
from vllm_dms.backend.kernels.page_table import tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages import scale_offset, slot_offset, widen


@triton.jit
def widen_pairs(pairs):
    """int16 with two e4m3 numbers each -> float16 (low, high)."""
    if INTERPRETED:
        low = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        high = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return widen(low, tl.float16), widen(high, tl.float16)
    else:
        # Two pairs to a register: first gathered, low and high ones, then widened.
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 gathered;
            prmt.b32 gathered, $2, 0, 0x3120;
            mov.b32 {low, high}, gathered;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def split_scales(both):
    """int32 with bfloat16 k_scale in its low and v_scale in its high half -> both in float32."""
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def attend_row_fp8(
    q, score_scale, state, row, live, page, leaf, first, end, geo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`attend_row` over FP8 pages. k_scale goes to the scores and v_scale to the weights, relative
    to the largest v_scale so far."""
    # q is scaled to fit the range of float16, into which FP8 widens without loss.
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 1)
    # One so small that its scale would be 0 made NaN of slots that are masked.
    largest = tl.where(largest < 1e-30, 1.0, largest)
    q = (q / largest[:, None]).to(tl.float16)
    q_scale = largest * score_scale
    q_even, q_odd = tl.split(tl.reshape(q, [BLOCK_M, geo.D_PAD // 2, 2]))
    q_even, q_odd = tl.trans(q_even), tl.trans(q_odd)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, geo.D_PAD // 2)[None, :]
    pages = state.pages.to(tl.pointer_type(tl.int16), bitcast=True)
    scales = state.scales.to(tl.pointer_type(tl.int32), bitcast=True)
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    even = tl.zeros([geo.D_PAD // 2, BLOCK_M], tl.float32)
    odd = tl.zeros([geo.D_PAD // 2, BLOCK_M], tl.float32)
    unit = 1.0e-30  # even and odd count in units of this v_scale
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        mask_d = mask[:, None] & (offs_d < geo.D // 2)
        ptr = pages + slot_offset(page, slot, geo)[:, None] // 2 + offs_d
        both = tl.load(scales + scale_offset(page, slot, geo) // 2, mask=mask, other=0)
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, leaf, tile + 1, geo, BLOCK_N)
        leaf = tile_leaf(state, row, tile + 2, geo, BLOCK_N)
        k_even, k_odd = widen_pairs(tl.load(ptr, mask=mask_d, other=0))
        k_scale, v_scale = split_scales(both)
        scores = tl.dot(k_odd, q_odd, tl.dot(k_even, q_even)) * k_scale[:, None]
        scores = tl.where(mask[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0) * q_scale)
        weights = tl.exp2(scores * q_scale[None, :] - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay[None, :] + weights
        top = new_top
        new_unit = tl.maximum(unit, tl.max(v_scale, 0))
        per_unit = 1.0 / new_unit
        weights = (weights * (v_scale * per_unit)[:, None]).to(tl.float16)
        decay *= unit * per_unit
        unit = new_unit
        # Loaded as a transpose: transposed later, it would not be prefetched.
        v_ptr = tl.trans(ptr + geo.P * geo.WIDTH // 2)
        v_even, v_odd = widen_pairs(tl.load(v_ptr, mask=tl.trans(mask_d), other=0))
        even = tl.dot(v_even, weights, even * decay[None, :])
        odd = tl.dot(v_odd, weights, odd * decay[None, :])
    return tl.interleave(tl.trans(even), tl.trans(odd)) * unit, top, tl.sum(total, 0)
