"""Causal attention with a gate per key, forward and backward, without a mask: Triton kernels.

    scores[i, j] = q[i] . k[j] * D ** -0.5 + (log_keep[j] if i - j > W else 0),  j <= i

A block of queries splits its keys into two runs: far keys, all of which are out of the window of
all its queries, and near ones, which need the mask of the window's and the diagonal's edge.
Gradients take two passes, one over blocks of queries (dq) and one over blocks of keys (dk, dv,
d log_keep). Each sum has one owner that adds in a fixed order, so results are the same bits every
time.

Layouts: q, out and their gradients (B, T, Hq, D), k and v (B, T, H, D), contiguous; by query head
lse and delta (B, Hq, T), by KV head gate (B, H, T), in fp32. Scores, gate and lse are in units of
log 2, for exp2.
"""

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-1e30)  # below any score, and finite: a difference of two is no NaN
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base, start, stride, end, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """[ROWS, D_PAD] from row `start`; WHOLE: every row is below `end`, and D is D_PAD."""
    offs = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, D_PAD)[None, :]
    ptr = base + tl.full((), start, tl.int64) * stride + (offs * stride + offs_d)
    if WHOLE:
        return tl.load(ptr)
    return tl.load(ptr, mask=(start + offs < end) & (offs_d < D), other=0.0)


@triton.jit
def load_values(
    base, start, end, fill: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """[ROWS] of one number a row"""
    offs = start + tl.arange(0, ROWS)
    if WHOLE:
        return tl.load(base + offs)
    return tl.load(base + offs, mask=offs < end, other=fill)


@triton.jit
def store_rows(
    base, start, stride, end, x, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, D_PAD)[None, :]
    ptr = base + tl.full((), start, tl.int64) * stride + (offs * stride + offs_d)
    x = x.to(base.dtype.element_ty)
    if WHOLE:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, mask=(start + offs < end) & (offs_d < D))


@triton.jit
def gated(scores, gate, age, window, NEAR: tl.constexpr):
    """scores, gate and age = i - j, broadcast alike. Far keys are all gated, near ones by age."""
    if not NEAR:
        return scores + gate
    scores = tl.where(age > window, scores + gate, scores)
    return tl.where(age >= 0, scores, float("-inf"))


@triton.jit
def attend(
    q, acc, top, total, k_base, v_base, gate_base, m0, lo, hi, stride, end, scale, window,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [lo, hi) of a block of queries from m0."""
    D_PAD: tl.constexpr = q.shape[1]
    ages = m0 + tl.arange(0, BLOCK_M)[:, None] - tl.arange(0, BLOCK_N)[None, :]
    for n0 in range(lo, hi, BLOCK_N):
        k = load_rows(k_base, n0, stride, end, D, D_PAD, BLOCK_N, WHOLE)
        gate = load_values(gate_base, n0, end, 0.0, BLOCK_N, WHOLE)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
        scores = gated(scores, gate[None, :], ages - n0, window, NEAR)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        v = load_rows(v_base, n0, stride, end, D, D_PAD, BLOCK_N, WHOLE)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=EXACT)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, out_ptr, lse_ptr, tokens, kv_heads, group, scale, window,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, Hq, B), the last queries first: they see most."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // group
    stride_q, stride_k = kv_heads * group * D, kv_heads * D
    q_base = batch * tokens * stride_q + head * D
    k_base = batch * tokens * stride_k + kv_head * D
    q = load_rows(q_ptr + q_base, m0, stride_q, tokens, D, D_PAD, BLOCK_M, WHOLE)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    top = tl.full((BLOCK_M,), NO_SCORE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    gate_base = gate_ptr + (batch * kv_heads + kv_head) * tokens
    near = tl.maximum(m0 - window, 0) // BLOCK_N * BLOCK_N
    hi = tl.minimum(m0 + BLOCK_M, tokens)
    acc, top, total = attend(
        q, acc, top, total, k_ptr + k_base, v_ptr + k_base, gate_base, m0, 0, near, stride_k,
        tokens, scale, window, D, BLOCK_M, BLOCK_N, WHOLE, EXACT, False,
    )  # fmt: skip
    acc, top, total = attend(
        q, acc, top, total, k_ptr + k_base, v_ptr + k_base, gate_base, m0, near, hi, stride_k,
        tokens, scale, window, D, BLOCK_M, BLOCK_N, WHOLE, EXACT, True,
    )  # fmt: skip
    store_rows(
        out_ptr + q_base, m0, stride_q, tokens, acc / total[:, None], D, D_PAD, BLOCK_M, WHOLE
    )
    offs = m0 + tl.arange(0, BLOCK_M)
    lse_base = lse_ptr + (batch * kv_heads * group + head) * tokens
    tl.store(lse_base + offs, top + tl.log2(total), mask=offs < tokens)


@triton.jit
def query_gradients(
    dq, q, do, lse, delta, k_base, v_base, gate_base, m0, lo, hi, stride, end, scale, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """What keys [lo, hi) add to the gradient of a block of queries from m0."""
    BLOCK_M: tl.constexpr = q.shape[0]
    D_PAD: tl.constexpr = q.shape[1]
    ages = m0 + tl.arange(0, BLOCK_M)[:, None] - tl.arange(0, BLOCK_N)[None, :]
    for n0 in range(lo, hi, BLOCK_N):
        k = load_rows(k_base, n0, stride, end, D, D_PAD, BLOCK_N, WHOLE)
        v = load_rows(v_base, n0, stride, end, D, D_PAD, BLOCK_N, WHOLE)
        gate = load_values(gate_base, n0, end, 0.0, BLOCK_N, WHOLE)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
        scores = gated(scores, gate[None, :], ages - n0, window, NEAR)
        weights = tl.exp2(scores - lse[:, None])
        d_weights = tl.dot(do, tl.trans(v), input_precision=EXACT)
        d_scores = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=EXACT)
    return dq


@triton.jit(do_not_specialize=["window"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, tokens, kv_heads, group,
    scale, window, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, Hq, B), the last queries first."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // group
    stride_q, stride_k = kv_heads * group * D, kv_heads * D
    q_base = batch * tokens * stride_q + head * D
    k_base = batch * tokens * stride_k + kv_head * D
    q = load_rows(q_ptr + q_base, m0, stride_q, tokens, D, D_PAD, BLOCK_M, WHOLE)
    do = load_rows(do_ptr + q_base, m0, stride_q, tokens, D, D_PAD, BLOCK_M, WHOLE)
    row = (batch * kv_heads * group + head) * tokens
    lse = load_values(lse_ptr + row, m0, tokens, float("inf"), BLOCK_M, WHOLE)
    delta = load_values(delta_ptr + row, m0, tokens, 0.0, BLOCK_M, WHOLE)
    gate_base = gate_ptr + (batch * kv_heads + kv_head) * tokens
    near = tl.maximum(m0 - window, 0) // BLOCK_N * BLOCK_N
    hi = tl.minimum(m0 + BLOCK_M, tokens)
    dq = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    dq = query_gradients(
        dq, q, do, lse, delta, k_ptr + k_base, v_ptr + k_base, gate_base, m0, 0, near, stride_k,
        tokens, scale, window, D, BLOCK_N, WHOLE, EXACT, False,
    )  # fmt: skip
    dq = query_gradients(
        dq, q, do, lse, delta, k_ptr + k_base, v_ptr + k_base, gate_base, m0, near, hi, stride_k,
        tokens, scale, window, D, BLOCK_N, WHOLE, EXACT, True,
    )  # fmt: skip
    store_rows(dq_ptr + q_base, m0, stride_q, tokens, dq * (scale * LN2), D, D_PAD, BLOCK_M, WHOLE)


@triton.jit
def key_gradients(
    dk, dv, d_gate, k, v, gate, q_base, do_base, lse_base, delta_base, n0, lo, hi, stride, end,
    scale, window, D: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """What queries [lo, hi) of one head add to the gradients of a block of keys from n0. Scores
    are transposed, [BLOCK_N, BLOCK_M]: they stay in registers for both sums over queries."""
    BLOCK_N: tl.constexpr = k.shape[0]
    D_PAD: tl.constexpr = k.shape[1]
    ages = tl.arange(0, BLOCK_M)[None, :] - n0 - tl.arange(0, BLOCK_N)[:, None]
    for m0 in range(lo, hi, BLOCK_M):
        q = load_rows(q_base, m0, stride, end, D, D_PAD, BLOCK_M, WHOLE)
        # Queries past the end: infinitely far from any score.
        lse = load_values(lse_base, m0, end, float("inf"), BLOCK_M, WHOLE)
        scores = tl.dot(k, tl.trans(q), input_precision=EXACT) * scale
        scores = gated(scores, gate[:, None], ages + m0, window, NEAR)
        weights = tl.exp2(scores - lse[None, :])
        do = load_rows(do_base, m0, stride, end, D, D_PAD, BLOCK_M, WHOLE)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=EXACT)
        delta = load_values(delta_base, m0, end, 0.0, BLOCK_M, WHOLE)
        d_weights = tl.dot(v, tl.trans(do), input_precision=EXACT)
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=EXACT)
        if NEAR:
            d_gate += tl.sum(tl.where(ages + m0 > window, d_scores, 0.0), 1)
        else:
            d_gate += tl.sum(d_scores, 1)
    return dk, dv, d_gate


@triton.jit(do_not_specialize=["window"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, d_gate_ptr, tokens,
    kv_heads, group, scale, window, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, H, B), the first keys first: they are seen most."""
    n0 = tl.program_id(0) * BLOCK_N
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stride_q, stride_k = kv_heads * group * D, kv_heads * D
    k_base = batch * tokens * stride_k + kv_head * D
    k = load_rows(k_ptr + k_base, n0, stride_k, tokens, D, D_PAD, BLOCK_N, WHOLE)
    v = load_rows(v_ptr + k_base, n0, stride_k, tokens, D, D_PAD, BLOCK_N, WHOLE)
    row = (batch * kv_heads + kv_head) * tokens
    gate = load_values(gate_ptr + row, n0, tokens, 0.0, BLOCK_N, WHOLE)
    dk = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    d_gate = tl.zeros((BLOCK_N,), tl.float32)
    lo = n0 // BLOCK_M * BLOCK_M
    far = tl.minimum(tl.cdiv(n0 + BLOCK_N + window, BLOCK_M) * BLOCK_M, tokens)
    for member in range(group):
        head = kv_head * group + member
        q_base = batch * tokens * stride_q + head * D
        row_q = (batch * kv_heads * group + head) * tokens
        dk, dv, d_gate = key_gradients(
            dk, dv, d_gate, k, v, gate, q_ptr + q_base, do_ptr + q_base, lse_ptr + row_q,
            delta_ptr + row_q, n0, lo, far, stride_q, tokens, scale, window, D, BLOCK_M, WHOLE,
            EXACT, True,
        )  # fmt: skip
        dk, dv, d_gate = key_gradients(
            dk, dv, d_gate, k, v, gate, q_ptr + q_base, do_ptr + q_base, lse_ptr + row_q,
            delta_ptr + row_q, n0, far, tokens, stride_q, tokens, scale, window, D, BLOCK_M, WHOLE,
            EXACT, False,
        )  # fmt: skip
    store_rows(dk_ptr + k_base, n0, stride_k, tokens, dk * (scale * LN2), D, D_PAD, BLOCK_N, WHOLE)
    store_rows(dv_ptr + k_base, n0, stride_k, tokens, dv, D, D_PAD, BLOCK_N, WHOLE)
    offs = n0 + tl.arange(0, BLOCK_N)
    tl.store(d_gate_ptr + row + offs, d_gate, mask=offs < tokens)
