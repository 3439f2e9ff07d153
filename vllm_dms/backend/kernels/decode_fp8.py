"""The inner loop of decode attention over FP8 pages.

FP8 reaches the tensor cores fast only as 16-bit words: a byte-wise transposed read of shared
memory would cost more than the bytes saved. So channels are read in pairs and widened in registers,
and even and odd channels go through products of their own.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import NO_SCORE, scale_offset, slot_offset, tile_pages

# Triton's interpreter has no inline assembly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
UNSCALE = tl.constexpr(256.0)  # what `widen_pairs` leaves out


@triton.jit
def widen_pairs(pairs):
    """int16 with two e4m3 numbers each -> float16 (low, high), each times 2**-8.

    Moved to where float16 has its exponent and mantissa, an e4m3 number is 2**8 too small, and
    exact: subnormals too.
    """
    if INTERPRETED:
        bits = pairs.to(tl.int32)
        low = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        high = (bits & 0x8000) | ((bits & 0x7F00) >> 1)
        low = low.to(tl.uint16).to(tl.float16, bitcast=True)
        high = high.to(tl.uint16).to(tl.float16, bitcast=True)
        return low, high
    else:
        # Two pairs to a register: bytes 0 and 2 are the low ones, 1 and 3 the high ones.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bits, sign;
            shl.b32 bits, $2, 8;
            and.b32 sign, bits, 0x80008000;
            shr.b32 bits, bits, 1;
            lop3.b32 $0, bits, 0x3f803f80, sign, 0xea;
            and.b32 sign, $2, 0x80008000;
            shr.b32 bits, $2, 1;
            lop3.b32 $1, bits, 0x3f803f80, sign, 0xea;
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
    q, q_scale, state, row, live, first, end, geo, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Online softmax of q [BLOCK_M, D_PAD] float16 over tiles [first, end) of a row.

    q_scale [BLOCK_M] turns a dot product into a base-2 score. k_scale goes to the scores and
    v_scale to the weights, relative to the largest v_scale so far.
    """
    q_even, q_odd = tl.split(tl.reshape(q, [BLOCK_M, geo.D_PAD // 2, 2]))
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, geo.D_PAD // 2)[None, :]
    pages = state.pages.to(tl.pointer_type(tl.int16), bitcast=True)
    scales = state.scales.to(tl.pointer_type(tl.int32), bitcast=True)
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    even = tl.zeros([BLOCK_M, geo.D_PAD // 2], tl.float32)
    odd = tl.zeros([BLOCK_M, geo.D_PAD // 2], tl.float32)
    unit = 1.0e-30  # even and odd count in units of this v_scale
    q_scale *= UNSCALE
    page = tile_pages(state, row, live, first, geo, BLOCK_N)
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        mask_d = mask[:, None] & (offs_d < geo.D // 2)
        ptr = pages + slot_offset(page, slot, geo)[:, None] // 2 + offs_d
        both = tl.load(scales + scale_offset(page, slot, geo) // 2, mask=mask, other=0)
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, live, tile + 1, geo, BLOCK_N)
        k_even, k_odd = widen_pairs(tl.trans(tl.load(ptr, mask=mask_d, other=0)))
        k_scale, v_scale = split_scales(both)
        scores = tl.dot(q_odd, k_odd, tl.dot(q_even, k_even))
        scores = scores * q_scale[:, None] * k_scale[None, :]
        scores = tl.where(mask[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        new_unit = tl.maximum(unit, tl.max(v_scale, 0))
        weights = (weights * (v_scale / new_unit)[None, :]).to(tl.float16)
        decay *= unit / new_unit
        unit = new_unit
        v_even, v_odd = widen_pairs(tl.load(ptr + geo.P * geo.D // 2, mask=mask_d, other=0))
        even = tl.dot(weights, v_even, even * decay[:, None])
        odd = tl.dot(weights, v_odd, odd * decay[:, None])
    return tl.interleave(even, odd) * (unit * UNSCALE), top, total
