"""Slots in pages: where they are, and how each format of `arena.storage` writes, moves and reads
them. What a format means is said there, in PyTorch; `decode`, `decode_fp8` and
`decode_int4` have an inner loop for each.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import INTERPRETED, round_mantissa
from vllm_dms.backend.kernels.pages_int4 import load_int4_slots, write_int4_slots


@triton.jit
def slot_offset(page, slot, geo):
    """Where K of a slot is, in elements of ``pages``; V is P * WIDTH further."""
    return page.to(tl.int64) * geo.PAGE + slot % geo.P * geo.WIDTH


@triton.jit
def scale_offset(page, slot, geo):
    """Where K's scales of a slot are, in elements of ``scales``; V's are right behind them."""
    return page.to(tl.int64) * geo.PAGE_SCALES + slot % geo.P * geo.SCALES


@triton.jit
def narrow(x):
    """float32 -> e4m3, rounded to nearest even, beyond 448 to 448. One instruction of a GPU; the
    interpreter truncates, and makes 384 of NaN."""
    if INTERPRETED:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
        # Below 2**-6 e4m3 is a grid of step 2**-9, which is float32's step at 24576.
        x = tl.where(tl.abs(x) < 0.015625, x + 24576.0 - 24576.0, round_mantissa(x, 20))
        bits = tl.where(x != x, 0x7F, x.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
        return bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def quantize(x):
    """x [N, D_PAD] -> e4m3 [N, D_PAD] and float32 scales [N] that bfloat16 holds exactly.

    NaN stays NaN, and makes all of its vector NaN: Triton's max, minimum and maximum drop it.
    """
    x = x.to(tl.float32)
    # As integers magnitudes have the same order, with NaN the largest.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    scale = round_mantissa(tl.div_rn(largest, 448.0), 16)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)  # bfloat16's smallest normal
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return narrow(x * reciprocal[:, None]), scale


@triton.jit
def widen(x, dtype: tl.constexpr):
    """e4m3 -> dtype, exactly. The interpreter's own cast makes 480 of NaN."""
    wide = x.to(dtype)
    if INTERPRETED:
        wide = tl.where((x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), wide)
    return wide


@triton.jit
def write_slots(state, geo, page, slot, k, v, mask):
    """Store k and v [N, D_PAD] in the slots [N], each in its page [N]."""
    if geo.STORAGE == "int4":
        write_int4_slots(state, geo, page, slot, k, v, mask)
    else:
        write_channels(state, geo, page, slot, k, v, mask)


@triton.jit
def write_channels(state, geo, page, slot, k, v, mask):
    """`write_slots` where a channel is an element."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    ptr = state.pages + slot_offset(page, slot, geo)[:, None] + offs_d
    mask_d = mask[:, None] & (offs_d < geo.D)
    if geo.STORAGE == "fp8":
        k, k_scale = quantize(k)
        v, v_scale = quantize(v)
        scale_ptr = state.scales + scale_offset(page, slot, geo)
        tl.store(scale_ptr, k_scale.to(tl.bfloat16), mask=mask)
        tl.store(scale_ptr + 1, v_scale.to(tl.bfloat16), mask=mask)
    else:
        tl.static_assert(geo.STORAGE == "model")
    tl.store(ptr, k, mask=mask_d)
    tl.store(ptr + geo.P * geo.WIDTH, v, mask=mask_d)


@triton.jit
def copy_slots(state, geo, src_page, src, dst_page, dst, mask):
    """Copy slots as stored: values move with their scales, never rounded twice."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    src_ptr = state.pages + slot_offset(src_page, src, geo)[:, None] + offs_d
    dst_ptr = state.pages + slot_offset(dst_page, dst, geo)[:, None] + offs_d
    mask_d = mask[:, None] & (offs_d < geo.WIDTH)
    k = tl.load(src_ptr, mask=mask_d)
    v = tl.load(src_ptr + geo.P * geo.WIDTH, mask=mask_d)
    if geo.SCALES > 0:
        offs_s = tl.arange(0, geo.SCALES_PAD)[None, :]
        mask_s = mask[:, None] & (offs_s < geo.SCALES)
        src_scale = state.scales + scale_offset(src_page, src, geo)[:, None] + offs_s
        dst_scale = state.scales + scale_offset(dst_page, dst, geo)[:, None] + offs_s
        tl.store(dst_scale, tl.load(src_scale, mask=mask_s), mask=mask_s)
    tl.store(dst_ptr, k, mask=mask_d)
    tl.store(dst_ptr + geo.P * geo.WIDTH, v, mask=mask_d)


@triton.jit
def load_slots(state, page, slot, mask, dtype: tl.constexpr, geo, MASKED: tl.constexpr):
    """K and V [N, D_PAD] of slots [N] in dtype, with their scales. Unless MASKED, slots that do not
    count hold numbers as well."""
    if geo.STORAGE == "int4":
        k, v = load_int4_slots(state, page, slot, mask, dtype, geo)
    else:
        k, v = load_channels(state, page, slot, mask, dtype, geo, MASKED)
    return k, v


@triton.jit
def load_channels(state, page, slot, mask, dtype: tl.constexpr, geo, MASKED: tl.constexpr):
    """`load_slots` where a channel is an element."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    ptr = state.pages + slot_offset(page, slot, geo)[:, None] + offs_d
    if MASKED:
        mask_d = mask[:, None] & (offs_d < geo.D)
        k = tl.load(ptr, mask=mask_d, other=0.0)
        v = tl.load(ptr + geo.P * geo.WIDTH, mask=mask_d, other=0.0)
    elif geo.D < geo.D_PAD:
        k = tl.load(ptr, mask=offs_d < geo.D, other=0.0)
        v = tl.load(ptr + geo.P * geo.WIDTH, mask=offs_d < geo.D, other=0.0)
    else:
        k = tl.load(ptr)
        v = tl.load(ptr + geo.P * geo.WIDTH)
    if geo.STORAGE == "fp8":
        scale_ptr = state.scales + scale_offset(page, slot, geo)
        k_scale = tl.load(scale_ptr, mask=mask, other=0.0).to(tl.float32)
        v_scale = tl.load(scale_ptr + 1, mask=mask, other=0.0).to(tl.float32)
        k = widen(k, tl.float32) * k_scale[:, None]
        v = widen(v, tl.float32) * v_scale[:, None]
    else:
        tl.static_assert(geo.STORAGE == "model")
    return k.to(dtype), v.to(dtype)
