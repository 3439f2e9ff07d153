"""What the kernels share: the state as they see it, requests, rows, launches, decisions.

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
    MAX_PAGES: Any  # of a row
    LEAF: Any  # pages that a row lists itself, and that each of its leaves lists
    MAX_LEAVES: Any  # of a row
    TABLE: Any  # page table entries of a row: LEAF pages, MAX_LEAVES leaves
    LEAVES_PER_BLOCK: Any
    MAX_BLOCKS: Any  # block row entries of a state
    PAGES_PER_BLOCK: Any
    MAX_REQS: Any  # of a batch, rounded up to a power of two
    STORAGE: Any  # `Storage.name`
    WIDTH: Any  # of a vector's values, in elements
    PAGE: Any  # of a page, in elements of its values
    SCALES: Any  # of a slot
    SCALES_PAD: Any  # SCALES rounded up to a power of two
    PAGE_SCALES: Any  # of a page, in elements of its scales


class StateArgs(NamedTuple):
    """Pointers of `ArenaState`. A page is K[P, WIDTH], V[P, WIDTH], scales[P, SCALES]."""

    pages: Any  # K of page 0, in the storage's dtype
    scales: Any  # of page 0, bfloat16 or what stands in its place
    state_of_block: Any
    block_rows: Any
    pages_used: Any
    leaves_used: Any
    live: Any
    page_table: Any
    leaves: Any
    evict_ring: Any


class Requests(NamedTuple):
    """Pointers to int32 [MAX_REQS] each: a step's requests, from `Batch` (`schedule_kernel`)."""

    start: Any  # first query token
    tokens: Any  # query tokens, m
    stored: Any  # tokens stored before, n
    state: Any


@triton.jit
def load_request(requests, b):
    """Request ``b``: its first token, its query tokens m, tokens n stored before, its state."""
    start, m = tl.load(requests.start + b), tl.load(requests.tokens + b)
    return start, m, tl.load(requests.stored + b), tl.load(requests.state + b)


@triton.jit
def find_request(requests, block, num_reqs, geo, BLOCK: tl.constexpr):
    """The request that block ``block`` of a grid over tokens serves, and its first token there.

    Request b owns the blocks from start[b] // BLOCK + b on: always enough for its tokens, and
    num_tokens // BLOCK + num_reqs in all, which the host knows.
    """
    b = tl.arange(0, geo.MAX_REQS)
    start = tl.load(requests.start + b, mask=b < num_reqs, other=1 << 30)
    found = tl.sum((start // BLOCK + b <= block).to(tl.int32), 0) - 1
    start = tl.load(requests.start + found)
    return found, (block - start // BLOCK - found) * BLOCK


@triton.jit
def row_index(s, layer, h, geo):
    return (s.to(tl.int64) * geo.L + layer) * geo.H + h


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
def round_mantissa(x, BITS: tl.constexpr):
    """float32 rounded to nearest even without its last BITS mantissa bits. By hand, because
    Triton's interpreter truncates in the casts to bfloat16 and FP8."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)
    rounded = (bits & -(1 << BITS)).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)  # a carry may make anything of NaN


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
