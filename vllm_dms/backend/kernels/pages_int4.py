"""Slots of 4-bit pages: written, and read back to vectors. `arena.storage.Int4Storage` says what
the bits mean; groups of W = D / 4 channels are a dimension of their own here, [N, 4, W].
"""

import triton
import triton.language as tl

from vllm_dms.arena.storage import Int4Storage
from vllm_dms.backend.kernels.common import round_mantissa

MAX_KEY_SCALE = tl.constexpr(Int4Storage.MAX_KEY_SCALE)
MAX_VALUE_SCALE = tl.constexpr(Int4Storage.MAX_VALUE_SCALE)
MAX_CENTER = tl.constexpr(float(Int4Storage.MAX_CENTER))  # in quarters of a step
WHOLE = tl.constexpr(12582912.0)  # added to a float32 and taken off, it leaves a whole number


@triton.jit
def int4_scales(state, page, slot, geo):
    """Where the scales of slots are: 4 words of K, then 4 of V."""
    scales = state.scales.to(tl.pointer_type(tl.int16), bitcast=True)
    return scales + page.to(tl.int64) * geo.PAGE_SCALES + slot % geo.P * geo.SCALES


@triton.jit
def int4_words(state, page, slot, geo):
    """Where word 0 of K of slots is; V is P * WIDTH / 2 words further."""
    words = state.pages.to(tl.pointer_type(tl.int16), bitcast=True)
    return words + (page.to(tl.int64) * geo.PAGE + slot % geo.P * geo.WIDTH) // 2


@triton.jit
def rotate(x, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """`nibbles.rotate` of each W of x [N, D]: the same sums."""
    for i in tl.static_range(10):
        if (1 << i) < W:
            x = butterfly(x, N, D, 1 << i)
    return x


@triton.jit
def butterfly(x, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Sums and differences of elements that are HALF apart."""
    pairs = tl.reshape(x, [N, D // (2 * HALF), 2, HALF])
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [N, D])


@triton.jit
def round_scale(wide, finite, MOST: tl.constexpr):
    """`nibbles.round_scale` [N, 4], and which of them are numbers; what is none counts as 1."""
    unit: tl.constexpr = 32.0  # the float32 whose step is that of the smallest scales
    smallest: tl.constexpr = 2.0**-18
    small = tl.maximum(wide + unit - unit, smallest)
    scale = tl.where(wide < 2.0**-14, small, round_mantissa(wide, 19))
    finite = finite & (scale <= MOST)
    return tl.where(finite, scale, 1.0), finite


@triton.jit
def is_finite(x):
    """[N, 4]: of each group of x [N, 4, W]. Triton's max and min drop NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2) < 0x7F800000


@triton.jit
def reciprocal(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def pack_words(n, finite):
    """Words [N, W] of whole numbers [N, 4, W], of which those beyond 0 and 15 count as these."""
    n = tl.minimum(tl.maximum(n, 0.0), 15.0)
    n = tl.where(finite[:, :, None], n, 0.0).to(tl.int32)
    return tl.sum(n << (4 * tl.arange(0, 4))[None, :, None], 1).to(tl.int16)


@triton.jit
def quantize_groups(x, MOST: tl.constexpr):
    """x [N, 4, W] -> words [N, W], scales int16 [N, 4] of at most MOST."""
    low, high = tl.min(x, 2), tl.max(x, 2)
    middle = (low + high) * 0.5
    wide = tl.maximum((high - low) * (1 / 15), tl.abs(middle) * (4 / MAX_CENTER))
    scale, finite = round_scale(wide, is_finite(x), MOST)
    r = reciprocal(scale)
    center = tl.where(finite, middle * r * 4.0 + WHOLE - WHOLE, 0.0)
    center = tl.minimum(tl.maximum(center, -MAX_CENTER), MAX_CENTER)
    n = x * r[:, :, None] - (center * 0.25)[:, :, None] + 7.5 + WHOLE - WHOLE
    bits = tl.where(finite, scale.to(tl.float16).to(tl.int16, bitcast=True), 0x7FC0)
    return pack_words(n, finite), bits | (center.to(tl.int16) + 32)


@triton.jit
def write_int4_slots(state, geo, page, slot, k, v, mask):
    """`write_slots` of 4-bit pages."""
    N: tl.constexpr = k.shape[0]
    W: tl.constexpr = geo.D // 4
    tl.static_assert(geo.D == geo.D_PAD)
    k = rotate(k.to(tl.float32), N, geo.D, W)
    k, k_scales = quantize_groups(tl.reshape(k, [N, 4, W]), MAX_KEY_SCALE)
    v, v_scales = quantize_groups(tl.reshape(v.to(tl.float32), [N, 4, W]), MAX_VALUE_SCALE)
    ptr = int4_words(state, page, slot, geo)[:, None] + tl.arange(0, W)[None, :]
    tl.store(ptr, k, mask=mask[:, None])
    tl.store(ptr + geo.P * geo.WIDTH // 2, v, mask=mask[:, None])
    groups = tl.arange(0, 4)[None, :]
    scales = int4_scales(state, page, slot, geo)[:, None] + groups
    tl.store(scales, k_scales, mask=mask[:, None])
    tl.store(scales + 4, v_scales, mask=mask[:, None])


@triton.jit
def group_scale(word, dtype: tl.constexpr):
    """The scale in a word of 16 bits, whatever is above these."""
    return (word & 0x7FC0).to(tl.int16).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def group_center(word):
    """The center in a word of 16 bits, in steps."""
    return ((word & 0x3F) - 32).to(tl.float32) * 0.25


@triton.jit
def hadamard(W: tl.constexpr, dtype: tl.constexpr):
    """[W, W] that `rotate` multiplies with."""
    common = tl.arange(0, W)[:, None] & tl.arange(0, W)[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return (1 - 2 * (common & 1)).to(dtype)


@triton.jit
def load_int4_slots(state, page, slot, mask, dtype: tl.constexpr, geo):
    """`load_slots` of 4-bit pages; 0 where masked."""
    N: tl.constexpr = slot.shape[0]
    W: tl.constexpr = geo.D // 4
    groups = tl.arange(0, 4)[None, :]
    nibbles = (4 * tl.arange(0, 4))[None, :, None]
    ptr = int4_words(state, page, slot, geo)[:, None] + tl.arange(0, W)[None, :]
    k = tl.load(ptr, mask=mask[:, None], other=0).to(tl.int32)
    v = tl.load(ptr + geo.P * geo.WIDTH // 2, mask=mask[:, None], other=0).to(tl.int32)
    scales = int4_scales(state, page, slot, geo)[:, None] + groups
    k_word = tl.load(scales, mask=mask[:, None], other=0).to(tl.int32)
    v_word = tl.load(scales + 4, mask=mask[:, None], other=0).to(tl.int32)

    n = ((k[:, None, :] >> nibbles) & 15).to(tl.float32)
    k = (n - 7.5 + group_center(k_word)[:, :, None]).to(dtype)  # exact in any dtype
    k = tl.dot(tl.reshape(k, [4 * N, W]), hadamard(W, dtype), input_precision="ieee")
    k = tl.reshape(k, [N, 4, W]) * (group_scale(k_word, tl.float32) * (1 / W))[:, :, None]
    n = ((v[:, None, :] >> nibbles) & 15).to(tl.float32)
    v = (n - 7.5 + group_center(v_word)[:, :, None]) * group_scale(v_word, tl.float32)[:, :, None]
    return tl.reshape(k, [N, geo.D]).to(dtype), tl.reshape(v, [N, geo.D]).to(dtype)
