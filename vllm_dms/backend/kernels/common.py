"""What the kernels share: the state as they see it, addresses of slots, decisions, FP8.

Names: T query tokens, H KV heads, G query heads per KV head, D channels, P slots per page, R ring
slots (window + 1). A *row* is one (state, layer, head): the slots that one KV head attends to.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Triton's interpreter rounds otherwise than a GPU, and has no inline assembly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NO_SCORE = tl.constexpr(-1.0e30)  # finite, so that exp2 of a difference is never NaN


class Geometry(NamedTuple):
    """Sizes fixed for a worker, all ``tl.constexpr``: one compilation each."""

    L: Any
    H: Any
    D: Any
    D_PAD: Any  # D rounded up to a power of two
    P: Any
    R: Any
    MAX_PAGES: Any  # page table entries of a row
    MAX_BLOCKS: Any  # block row entries of a state
    PAGES_PER_BLOCK: Any
    MAX_REQS: Any  # of a batch, rounded up to a power of two
    QUANTIZED: Any


class StateArgs(NamedTuple):
    """Pointers of `ArenaState`. A page is K[P, D], V[P, D], scales[P, 2]."""

    pages: Any  # K of page 0, in the storage dtype
    scales: Any  # k_scale of page 0, bfloat16; None unless QUANTIZED
    state_of_block: Any
    block_rows: Any
    pages_used: Any
    live: Any
    page_table: Any
    evict_ring: Any


class BatchArgs(NamedTuple):
    """Pointers of `Batch`."""

    block_table: Any
    block_table_stride: Any
    query_start: Any
    seq_lens: Any


@triton.jit
def load_request(state, batch, b):
    """Request ``b``: its first token, its query tokens m, tokens n stored before, its state."""
    start = tl.load(batch.query_start + b)
    m = tl.load(batch.query_start + b + 1) - start
    n = tl.load(batch.seq_lens + b) - m
    block = tl.load(batch.block_table + b.to(tl.int64) * batch.block_table_stride)
    return start, m, n, tl.load(state.state_of_block + block)


@triton.jit
def find_request(batch, block, num_reqs, geo, BLOCK: tl.constexpr):
    """The request that block ``block`` of a grid over tokens serves, and its first token there.

    Request b owns the blocks from query_start[b] // BLOCK + b on: always enough for its tokens,
    and num_tokens // BLOCK + num_reqs in all, which the host knows.
    """
    b = tl.arange(0, geo.MAX_REQS)
    start = tl.load(batch.query_start + b, mask=b < num_reqs, other=1 << 30)
    found = tl.sum((start // BLOCK + b <= block).to(tl.int32), 0) - 1
    start = tl.load(batch.query_start + found)
    return found, (block - start // BLOCK - found) * BLOCK


@triton.jit
def row_index(s, layer, h, geo):
    return (s.to(tl.int64) * geo.L + layer) * geo.H + h


@triton.jit
def page_of(state, geo, row, slot, mask):
    """Page ids of slots of a row; 0 where masked."""
    return tl.load(state.page_table + row * geo.MAX_PAGES + slot // geo.P, mask=mask, other=0)


@triton.jit
def tile_pages(state, row, tile, geo, BLOCK_N: tl.constexpr):
    """The page of a tile of BLOCK_N slots, or the page of each of its slots. Any number, not to be
    followed, where the row holds no such slots."""
    if BLOCK_N <= geo.P:
        return page_of(state, geo, row, tile * BLOCK_N, tile * BLOCK_N < geo.MAX_PAGES * geo.P)
    else:
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        return page_of(state, geo, row, slot, slot < geo.MAX_PAGES * geo.P)


@triton.jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """In a kernel launched while the one before it still runs (`launch_pdl`): until that one is
    done, and with it all before it, since none lets the next one start earlier than this."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next_kernel(OVERLAP: tl.constexpr):
    """Let the next kernel start up to its `wait_for_previous_kernel`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def slot_offset(page, slot, geo):
    """Where K of a slot is, in elements of ``pages``; V is P * D further."""
    elements: tl.constexpr = geo.P * (2 * geo.D + (4 if geo.QUANTIZED else 0))
    return page.to(tl.int64) * elements + slot % geo.P * geo.D


@triton.jit
def scale_offset(page, slot, geo):
    """Where k_scale of a slot is, in elements of ``scales``; v_scale is the next."""
    return page.to(tl.int64) * (geo.P * (geo.D + 2)) + slot % geo.P * 2


@triton.jit
def round_mantissa(x, BITS: tl.constexpr):
    """float32 rounded to nearest even without its last BITS mantissa bits. By hand, because
    Triton's interpreter truncates in the casts to bfloat16 and FP8."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)
    return (bits & -(1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def decide(alpha, scale, offset):
    """`reference.decide`: rounded to alpha's dtype after each step. float32 needs a launch with
    enable_fp_fusion=False, or the two steps become one."""
    x = alpha.to(tl.float32) * scale
    if alpha.dtype == tl.float16:
        return (x.to(tl.float16).to(tl.float32) - offset).to(tl.float16) > 0
    elif alpha.dtype == tl.bfloat16:
        # bfloat16 has float32's range, so the second rounding cannot change the sign.
        return round_mantissa(x, 16) - offset > 0
    else:
        return x - offset > 0


@triton.jit
def quantize(x):
    """x [N, D_PAD] -> e4m3 [N, D_PAD] and float32 scales [N] that bfloat16 holds exactly."""
    x = x.to(tl.float32)
    scale = round_mantissa(tl.div_rn(tl.max(tl.abs(x), 1), 448.0), 16)
    scale = tl.where(scale == 0, 1.0, scale)
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    # Below 2**-6 e4m3 is a grid of step 2**-9, which is float32's step at 24576.
    x = tl.where(tl.abs(x) < 0.015625, x + 24576.0 - 24576.0, round_mantissa(x, 20))
    return x.to(tl.float8e4nv), scale


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
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    ptr = state.pages + slot_offset(page, slot, geo)[:, None] + offs_d
    mask_d = mask[:, None] & (offs_d < geo.D)
    if geo.QUANTIZED:
        k, k_scale = quantize(k)
        v, v_scale = quantize(v)
        scale_ptr = state.scales + scale_offset(page, slot, geo)
        tl.store(scale_ptr, k_scale.to(tl.bfloat16), mask=mask)
        tl.store(scale_ptr + 1, v_scale.to(tl.bfloat16), mask=mask)
    tl.store(ptr, k, mask=mask_d)
    tl.store(ptr + geo.P * geo.D, v, mask=mask_d)


@triton.jit
def copy_slots(state, geo, src_page, src, dst_page, dst, mask):
    """Copy slots as stored: FP8 values move with their scales, never rounded twice."""
    offs_d = tl.arange(0, geo.D_PAD)[None, :]
    src_ptr = state.pages + slot_offset(src_page, src, geo)[:, None] + offs_d
    dst_ptr = state.pages + slot_offset(dst_page, dst, geo)[:, None] + offs_d
    mask_d = mask[:, None] & (offs_d < geo.D)
    k = tl.load(src_ptr, mask=mask_d)
    v = tl.load(src_ptr + geo.P * geo.D, mask=mask_d)
    if geo.QUANTIZED:
        src_scale = state.scales + scale_offset(src_page, src, geo)
        dst_scale = state.scales + scale_offset(dst_page, dst, geo)
        k_scale = tl.load(src_scale, mask=mask)
        v_scale = tl.load(src_scale + 1, mask=mask)
        tl.store(dst_scale, k_scale, mask=mask)
        tl.store(dst_scale + 1, v_scale, mask=mask)
    tl.store(dst_ptr, k, mask=mask_d)
    tl.store(dst_ptr + geo.P * geo.D, v, mask=mask_d)
