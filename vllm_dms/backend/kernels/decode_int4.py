"""The inner loop of decode attention over 4-bit pages.

A word has one channel of each of the four groups, so that a tile of words is four tiles of
channels: nothing is moved between threads. A nibble becomes a float16 by placing it in a mantissa:
of K in that of 1024, where it counts 1 or, unshifted, 16, of V in that of 64, where it counts 1.
Scales and centers of K go to the scores, which are fewer than K's channels; V is multiplied out, so
that its four products share the weights.
"""

import triton
import triton.language as tl

from vllm_dms.backend.kernels.common import INTERPRETED, NO_SCORE
from vllm_dms.backend.kernels.page_table import tile_leaf, tile_pages
from vllm_dms.backend.kernels.pages_int4 import (
    group_center,
    group_scale,
    hadamard,
    int4_scales,
    int4_words,
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
def value_factors(word):
    """int16 scales of V -> float16 s, and s * (center - 71.5): V is the one times 64 + n, and the
    other."""
    if INTERPRETED:
        word = word.to(tl.int32)
        scale = group_scale(word, tl.float16)
        return scale, (group_center(word) - 71.5).to(tl.float16) * scale
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 scale, center, quarter, start;
            mov.b32 quarter, 0x34003400;
            mov.b32 start, 0xdd3edd3e;
            and.b32 scale, $2, 0x7fc07fc0;
            lop3.b32 center, $2, 0x003f003f, 0x64006400, 0xea;
            fma.rn.f16x2 center, center, quarter, start;
            mul.f16x2 $1, center, scale;
            mov.b32 $0, scale;
            }""",
            "=&r,=&r,r",
            [word],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def widen_values(words, sa, sb, sc, sd, pa, pb, pc, pd):
    """int16 [W, N] with nibbles a, b, c, d, and `value_factors` [1, N] of each -> float16 V. In the
    upper half of a byte a nibble counts 1 in the mantissa of 64."""
    if INTERPRETED:
        n = words.to(tl.int32)
        a, b = (n & 15).to(tl.float32) + 64.0, ((n >> 4) & 15).to(tl.float32) + 64.0
        c, d = ((n >> 8) & 15).to(tl.float32) + 64.0, ((n >> 12) & 15).to(tl.float32) + 64.0
        return (
            (a * sa + pa).to(tl.float16), (b * sb + pb).to(tl.float16),
            (c * sc + pc).to(tl.float16), (d * sd + pd).to(tl.float16),
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 n;
            shl.b32 n, $4, 4;
            lop3.b32 n, n, 0x00f000f0, 0x54005400, 0xea;
            fma.rn.f16x2 $0, n, $5, $9;
            lop3.b32 n, $4, 0x00f000f0, 0x54005400, 0xea;
            fma.rn.f16x2 $1, n, $6, $10;
            shr.u32 n, $4, 4;
            lop3.b32 n, n, 0x00f000f0, 0x54005400, 0xea;
            fma.rn.f16x2 $2, n, $7, $11;
            shr.u32 n, $4, 8;
            lop3.b32 n, n, 0x00f000f0, 0x54005400, 0xea;
            fma.rn.f16x2 $3, n, $8, $12;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, sa, sb, sc, sd, pa, pb, pc, pd],
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
def key_factors(words):
    """Two groups' scales of K in an int32 -> float32 scales, and centers less 7.5."""
    if INTERPRETED:
        a, b = group_center(words) - 7.5, group_center(words >> 16) - 7.5
        return group_scale(words, tl.float32), group_scale(words >> 16, tl.float32), a, b
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 scale, center, quarter, start;
            .reg .f16 low, high;
            mov.b32 quarter, 0x34003400;
            mov.b32 start, 0xdc3edc3e;
            and.b32 scale, $4, 0x7fc07fc0;
            lop3.b32 center, $4, 0x003f003f, 0x64006400, 0xea;
            fma.rn.f16x2 center, center, quarter, start;
            mov.b32 {low, high}, scale;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
            mov.b32 {low, high}, center;
            cvt.f32.f16 $2, low;
            cvt.f32.f16 $3, high;
            }""",
            "=&f,=&f,=&f,=&f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def score_group(scores, k, q, scale, center, sums, bias):
    """Add the scores of a group: k [N, W] above 1024, q [W, M]; `key_factors` [N]; ``sums`` [M] of
    what a step counts in q's columns, ``bias`` [N, M] what 1024 makes of them."""
    part = tl.dot(k, q, bias) + center[:, None] * sums[None, :]
    return scores + part * scale[:, None]


@triton.jit
def attend_row_int4(
    q, score_scale, state, row, live, page, leaf, first, end, geo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`attend_row` over 4-bit pages."""
    W: tl.constexpr = geo.D // 4
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 1)
    # One so small that its scale would be 0 made NaN of slots that are masked.
    largest = tl.where(largest < 1e-30, 1.0, largest)
    q = (q / largest[:, None]).to(tl.float16)
    q = tl.dot(hadamard(W, tl.float16), tl.trans(tl.reshape(q, [4 * BLOCK_M, W])))
    q_scale = largest * (score_scale / W)
    q = tl.reshape(tl.trans(q.to(tl.float16)), [BLOCK_M, 4 * W])
    qa, qb, qc, qd = split_groups(q, BLOCK_M, W)
    qb, qd = qb * (1 / 16), qd * (1 / 16)
    qa, qb, qc, qd = tl.trans(qa), tl.trans(qb), tl.trans(qc), tl.trans(qd)
    sum_a, sum_b = tl.sum(qa.to(tl.float32), 0), tl.sum(qb.to(tl.float32), 0)
    sum_c, sum_d = tl.sum(qc.to(tl.float32), 0), tl.sum(qd.to(tl.float32), 0)
    none = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    bias_a, bias_b = none - 1024.0 * sum_a[None, :], none - 1024.0 * sum_b[None, :]
    bias_c, bias_d = none - 1024.0 * sum_c[None, :], none - 1024.0 * sum_d[None, :]
    sum_b, sum_d = sum_b * 16.0, sum_d * 16.0
    offs_n = tl.arange(0, BLOCK_N)
    offs_w = tl.arange(0, W)[None, :]
    top = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    a = tl.zeros([W, BLOCK_M], tl.float32)
    b, c, d = a, a, a
    for tile in range(first, end):
        slot = tile * BLOCK_N + offs_n
        mask = slot < live
        mask_w = mask[:, None]
        ptr = int4_words(state, page, slot, geo)[:, None] + offs_w
        scales = int4_scales(state, page, slot, geo).to(tl.pointer_type(tl.int32), bitcast=True)
        ab = tl.load(scales, mask=mask, other=0)
        cd = tl.load(scales + 1, mask=mask, other=0)
        v_ab = tl.load(scales + 2, mask=mask, other=0)
        v_cd = tl.load(scales + 3, mask=mask, other=0)
        # One tile ahead: the compiler then prefetches K and V without waiting for a page.
        page = tile_pages(state, row, leaf, tile + 1, geo, BLOCK_N)
        leaf = tile_leaf(state, row, tile + 2, geo, BLOCK_N)
        ka, kb, kc, kd = widen_keys(tl.load(ptr, mask=mask_w, other=0))
        scale_a, scale_b, center_a, center_b = key_factors(ab)
        scale_c, scale_d, center_c, center_d = key_factors(cd)
        scores = score_group(none, ka, qa, scale_a, center_a, sum_a, bias_a)
        scores = score_group(scores, kb, qb, scale_b, center_b, sum_b, bias_b)
        scores = score_group(scores, kc, qc, scale_c, center_c, sum_c, bias_c)
        scores = score_group(scores, kd, qd, scale_d, center_d, sum_d, bias_d)
        scores = tl.where(mask[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0) * q_scale - WEIGHT_BITS)
        weights = tl.exp2(scores * q_scale[None, :] - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay[None, :] + weights
        top = new_top
        weights = weights.to(tl.float16)
        # Loaded as a transpose: transposed later, it would not be prefetched.
        v_ptr = tl.trans(ptr + geo.P * geo.WIDTH // 2)
        words = tl.load(v_ptr, mask=tl.trans(mask_w), other=0)
        sa, pa = value_factors(v_ab.to(tl.int16)[None, :])
        sb, pb = value_factors((v_ab >> 16).to(tl.int16)[None, :])
        sc, pc = value_factors(v_cd.to(tl.int16)[None, :])
        sd, pd = value_factors((v_cd >> 16).to(tl.int16)[None, :])
        va, vb, vc, vd = widen_values(words, sa, sb, sc, sd, pa, pb, pc, pd)
        a = tl.dot(va, weights, a * decay[None, :])
        b = tl.dot(vb, weights, b * decay[None, :])
        c = tl.dot(vc, weights, c * decay[None, :])
        d = tl.dot(vd, weights, d * decay[None, :])
    acc = join_groups(tl.trans(a), tl.trans(b), tl.trans(c), tl.trans(d))
    return acc, top, tl.sum(total, 0)
