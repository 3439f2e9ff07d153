"""The kernels of rotary: rows of [2 * HALF] channels, c paired with c + HALF, in fp32 between."""

import triton
import triton.language as tl


@triton.jit
def load_halves(base, row, mask, stride: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Rows [N] of two halves each -> fp32 [N, HALF_PAD], twice"""
    offs_d = tl.arange(0, HALF_PAD)[None, :]
    ptr = base + row[:, None] * stride + offs_d
    mask = mask[:, None] & (offs_d < HALF)
    first = tl.load(ptr, mask=mask, other=0.0)
    second = tl.load(ptr + HALF, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_halves(
    base, row, mask, first, second, stride: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, HALF_PAD)[None, :]
    ptr = base + row[:, None] * stride + offs_d
    mask = mask[:, None] & (offs_d < HALF)
    tl.store(ptr, first.to(base.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, second.to(base.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    x_ptr, unused_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, eps, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows); a row is one head of one token, [2 * HALF]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    a, b = load_halves(x_ptr, row, mask, 2 * HALF, HALF, HALF_PAD)
    if NORM:
        size = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps
        scale = tl.rsqrt(size)[:, None]
        dtype = x_ptr.dtype.element_ty
        zero = tl.zeros((1,), tl.int64)
        wa, wb = load_halves(weight_ptr, zero, zero == 0, 2 * HALF, HALF, HALF_PAD)
        a = ((a * scale).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32)
    cos_a, cos_b = load_halves(cos_ptr, row // heads, mask, 2 * HALF, HALF, HALF_PAD)
    sin_a, sin_b = load_halves(sin_ptr, row // heads, mask, 2 * HALF, HALF, HALF_PAD)
    first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    store_halves(out_ptr, row, mask, first, second, 2 * HALF, HALF, HALF_PAD)


@triton.jit
def rotate_gradient_kernel(
    x_ptr, d_out_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, rows, heads, eps, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows)"""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    da, db = load_halves(d_out_ptr, row, mask, 2 * HALF, HALF, HALF_PAD)
    cos_a, cos_b = load_halves(cos_ptr, row // heads, mask, 2 * HALF, HALF, HALF_PAD)
    sin_a, sin_b = load_halves(sin_ptr, row // heads, mask, 2 * HALF, HALF, HALF_PAD)
    da, db = da * cos_a + db * sin_b, db * cos_b - da * sin_a
    if NORM:
        a, b = load_halves(x_ptr, row, mask, 2 * HALF, HALF, HALF_PAD)
        size = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps
        scale = tl.rsqrt(size)[:, None]
        zero = tl.zeros((1,), tl.int64)
        wa, wb = load_halves(weight_ptr, zero, zero == 0, 2 * HALF, HALF, HALF_PAD)
        a, b, da, db = a * scale, b * scale, da * wa, db * wb
        # The norm takes away the gradient's part along x.
        along = ((tl.sum(a * da, 1) + tl.sum(b * db, 1)) / (2 * HALF))[:, None]
        da, db = (da - a * along) * scale, (db - b * along) * scale
    store_halves(dx_ptr, row, mask, da, db, 2 * HALF, HALF, HALF_PAD)
