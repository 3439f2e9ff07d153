"""The inner loop of decode attention over 4-bit pages.

A word has one channel of each of the four groups, so that a tile of words is four tiles of
channels, each with a product and a scale of its own: nothing is moved between threads. A nibble
becomes a float16 by placing it in the mantissa of 1024, where it counts 1 or, unshifted, 16.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import INTERPRETED, NO_SCORE
from vllm_dms.backend.kernels.page_table import tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages_int4 import (
    hadamard,
    int4_scales,
    int4_words,
    key_scale,
    value_scale,
)

# The largest weight is 2 to this power, or the smallest ones would be lost in float16.
WEIGHT_BITS = tl.constexpr(12.0)


@triton.jit
def widen_keys(words):
    """int16 with nibbles a, b, c, d from the lowest -> float16 1024 + a, 1024 + 16 b, 1024 + c,
    1024 + 16 d."""
    if INTERPRETED:
        n = words.to(tl.int32)
        a, b = n & 15, n & 240
        c, d = (n >> 8) & 15, (n >> 8) & 240
        return (
            (a + 1024).to(tl.float16), (b + 1024).to(tl.float16),
            (c + 1024).to(tl.float16), (d + 1024).to(tl.float16),
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high;
            shr.u32 high, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def widen_values(words):
    """The same, less 8 and 16 times 8: what V's nibbles stand for."""
    if INTERPRETED:
        a, b, c, d = widen_keys(words)
        return a - 1032.0, b - 1152.0, c - 1032.0, d - 1152.0
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high, n, one, sixteen;
            mov.b32 one, 0x64086408;
            mov.b32 sixteen, 0x64806480;
            shr.u32 high, $4, 8;
            lop3.b32 n, $4, 0x000f000f, 0x64006400, 0xea;
            sub.f16x2 $0, n, one;
            lop3.b32 n, $4, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 $1, n, sixteen;
            lop3.b32 n, high, 0x000f000f, 0x64006400, 0xea;
            sub.f16x2 $2, n, one;
            lop3.b32 n, high, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 $3, n, sixteen;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def split_groups(x, N: tl.constexpr, W: tl.constexpr):
    """x [N, 4 * W] -> four of [N, W]."""
    x = tl.permute(tl.reshape(x, [N, 2, 2, W]), (0, 3, 1, 2))
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def join_groups(a, b, c, d):
    """The inverse."""
    x = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(x, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def key_shift(word, COUNTS: tl.constexpr):
    """What K's nibbles count from, if a step counts COUNTS and they are on top of 1024."""
    biased = ((word & 0x7F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return biased * (0.25 * COUNTS) - (((1024 + 64) * 0.25 + 7.5) * COUNTS + 1024.0)


@triton.jit
def score_group(scores, k, q, sums, word, COUNTS: tl.constexpr):
    """Add the scores of a group: k [N, W] in which a step counts COUNTS, q [W, M] whose columns add
    up to ``sums``, word [N] with the scale and center of K."""
    scale = key_scale(word, tl.float32)
    scores += tl.dot(k, q) * scale[:, None]
    return scores + (scale * key_shift(word, COUNTS))[:, None] * sums[None, :]


@triton.jit
def largest_scale(scales):
    """The largest of V's four, NaN left out."""
    a, b = value_scale(scales, tl.float32), value_scale(scales >> 8, tl.float32)
    c, d = value_scale(scales >> 16, tl.float32), value_scale(scales >> 24, tl.float32)
    if INTERPRETED:  # whose maximum of a number and NaN is NaN
        a, b = tl.where(a == a, a, 0.0), tl.where(b == b, b, 0.0)
        c, d = tl.where(c == c, c, 0.0), tl.where(d == d, d, 0.0)
    return tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def add_group(acc, v, weights, byte, decay, per_unit):
    """acc [W, M] decayed, and v [W, N] with ``weights`` [N, M] times the scale in ``byte``."""
    weights = weights * (value_scale(byte, tl.float32) * per_unit)[:, None]
    return tl.dot(v, weights.to(tl.float16), acc * decay[None, :])


@triton.jit
def attend_row_int4(
    q, score_scale, state, row, live, page, leaf, first, end, geo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`attend_row` over 4-bit pages. Scales of K go to the scores and those of V to the weights,
    relative to the largest of V so far."""
    W: tl.constexpr = geo.D // 4
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 1)
    largest = tl.where(largest == 0, 1.0, largest)
    q = (q / largest[:, None]).to(tl.float16)
    q = tl.dot(hadamard(W, tl.float16), tl.trans(tl.reshape(q, [4 * BLOCK_M, W])))
    q_scale = largest * (score_scale / W)
    q = tl.reshape(tl.trans(q.to(tl.float16)), [BLOCK_M, 4 * W])
    qa, qb, qc, qd = split_groups(q, BLOCK_M, W)
    qb, qd = qb * (1 / 16), qd * (1 / 16)
    qa, qb, qc, qd = tl.trans(qa), tl.trans(qb), tl.trans(qc), tl.trans(qd)
    sum_a, sum_b = tl.sum(qa.to(tl.float32), 0), tl.sum(qb.to(tl.float32), 0)
    sum_c, sum_d = tl.sum(qc.to(tl.float32), 0), tl.sum(qd.to(tl.float32), 0)
    offs_n = tl.arange(0, BLOCK_N)
    offs_w = tl.arange(0, W)[None, :]
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([W, BLOCK_M], tl.float32)
    b, c, d = a, a, a
    unit = 1.0e-30  # a, b, c and d count in units of this scale
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        mask_w = mask[:, None] & (offs_w < W)
        ptr = int4_words(state, page, slot, geo)[:, None] + offs_w
        scales = int4_scales(state, page, slot, geo).to(tl.pointer_type(tl.int32), bitcast=True)
        ab = tl.load(scales, mask=mask, other=0)
        cd = tl.load(scales + 1, mask=mask, other=0)
        v_scales = tl.load(scales + 2, mask=mask, other=0)
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, leaf, tile + 1, geo, BLOCK_N)
        leaf = tile_leaf(state, row, tile + 2, geo, BLOCK_N)
        ka, kb, kc, kd = widen_keys(tl.load(ptr, mask=mask_w, other=0))
        scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        scores = score_group(scores, ka, qa, sum_a, ab, 1)
        scores = score_group(scores, kb, qb, sum_b, ab >> 16, 16)
        scores = score_group(scores, kc, qc, sum_c, cd, 1)
        scores = score_group(scores, kd, qd, sum_d, cd >> 16, 16) * q_scale[None, :]
        scores = tl.where(mask[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0) - WEIGHT_BITS)
        weights = tl.exp2(scores - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
        new_unit = tl.maximum(unit, tl.max(largest_scale(v_scales), 0))
        per_unit = 1.0 / new_unit
        decay *= unit * per_unit
        unit = new_unit
        # Loaded as a transpose: transposed later, it would not be prefetched.
        v_ptr = tl.trans(ptr + geo.P * geo.WIDTH // 2)
        va, vb, vc, vd = widen_values(tl.load(v_ptr, mask=tl.trans(mask_w), other=0))
        a = add_group(a, va, weights, v_scales, decay, per_unit)
        b = add_group(b, vb, weights, v_scales >> 8, decay, per_unit)
        c = add_group(c, vc, weights, v_scales >> 16, decay, per_unit)
        d = add_group(d, vd, weights, v_scales >> 24, decay, per_unit)
    acc = join_groups(tl.trans(a), tl.trans(b) * (1 / 16), tl.trans(c), tl.trans(d) * (1 / 16))
    return acc * unit, top, total
