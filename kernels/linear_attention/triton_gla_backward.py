"""Gated linear attention in Triton, backward: the states of the chunks and the scores are computed again.

With P_ij the product of a score and its gradient, for each key channel, the gradient of a gate sums the pairs that it lies
between: dg_t = sum_{j < t <= i} P_ij. Pairs of different chunks are sums of q dq over s >= t and of k dk over s < t of the
terms that go through the states, and decay sum_V h dh' of the pairs around the chunk. Pairs of different blocks of a chunk are
summed in the same way. Only for pairs inside a block of 16 tokens is the closed form sum_{s >= t} (q dq - k dk) taken, so
that what cancels is never larger than the products of one block.

Reference: Yang et al. 2023, arXiv:2312.06635.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.linear_attention.triton_gla import BLOCK, check_arguments, chunk_scores, empty_state, outputs
from seqengine.kernels.linear_attention.triton_states import (
    CHUNK,
    Blocks,
    Chunks,
    Precision,
    accumulator,
    dot,
    load_tile,
    locate,
    make_chunks,
    pick,
    scan_states,
    shift_down,
)

SCORE_GRADIENT_BLOCKS = {"ieee": Blocks(0, 64, 4), "tf32": Blocks(0, 64, 4), "float64": Blocks(0, 32, 4)}
INTRA_BLOCKS = {"ieee": Blocks(32, 0, 8), "tf32": Blocks(32, 0, 4), "float64": Blocks(32, 0, 4)}
INTER_BLOCKS = {"ieee": Blocks(64, 64, 8), "tf32": Blocks(64, 64, 8), "float64": Blocks(32, 32, 4)}


@triton.jit
def gla_score_gradients_kernel(
    do, v, d_scores, ends, offsets, documents, scale,
    do_sb, do_st, do_sh, do_sv, v_sb, v_st, v_sh, v_sv, per_sample, T, H, V,
    PRECISION: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """scale do v^T of one chunk: the gradient of q exp(..) k. d_scores [B, T, H, C]; above the diagonal it is not read."""
    i_p = tl.program_id(0)
    i_h = tl.cast(i_p % H, tl.int64)
    i_b, i_t, end = locate(i_p // H, ends, offsets, documents, per_sample, T, C)
    if i_t >= end:
        return
    o_c = tl.arange(0, C)
    o_t = i_t + o_c
    b_da = tl.zeros([C, C], dtype=ACC)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_tile(do + i_b * do_sb + i_h * do_sh, o_t, o_v, o_t < end, V, do_st, do_sv, ACC)
        b_v = load_tile(v + i_b * v_sb + i_h * v_sh, o_t, o_v, o_t < end, V, v_st, v_sv, ACC)
        b_da += dot(b_do, tl.trans(b_v), PRECISION, ACC)
    p_row = d_scores + ((i_b * T + o_t) * H + i_h)[:, None] * C
    tl.store(p_row + o_c[None, :], b_da * scale, mask=(o_t < end)[:, None] & (o_c >= 0)[None, :])


@triton.jit
def _inside(
    p_q, p_k, p_g, p_da, left, o_k, row, K, q_st, q_sk, k_st, k_sk, g_st, g_sk,
    ACC: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq and dk of the pairs j < i inside a block of `left` tokens or BC, [BC, BK]. All pointers are to its first token."""
    o_i = tl.arange(0, BC)
    p_q += o_k.to(tl.int64) * q_sk
    p_k += o_k.to(tl.int64) * k_sk
    p_g += o_k.to(tl.int64) * g_sk
    b_dq = tl.zeros([BC, BK], dtype=ACC)
    b_dk = tl.zeros([BC, BK], dtype=ACC)
    b_into = tl.zeros([BC, BK], dtype=ACC) + 1.0
    b_out = tl.zeros([BC, BK], dtype=ACC) + 1.0
    for i in range(1, BC):
        j = BC - 1 - i  # columns from right to left: decays from j into every token after it
        b_g = tl.load(p_g + (j + 1) * g_st, mask=o_k < tl.where(j + 1 < left, K, 0), other=0).to(ACC)
        b_k = tl.load(p_k + j * k_st, mask=o_k < tl.where(j < left, K, 0), other=0).to(ACC)
        b_da = tl.load(p_da + o_i * row + j, mask=(o_i > j) & (o_i < left), other=0)
        b_into = tl.where((o_i > j)[:, None], b_into * tl.exp(b_g)[None, :], b_into)
        b_dq += b_da[:, None] * b_into * b_k[None, :]
        b_g = tl.load(p_g + i * g_st, mask=o_k < tl.where(i < left, K, 0), other=0).to(
            ACC
        )  # rows from top to bottom: into i
        b_q = tl.load(p_q + i * q_st, mask=o_k < tl.where(i < left, K, 0), other=0).to(ACC)
        b_da = tl.load(p_da + i * row + o_i, mask=o_i < tl.where(i < left, i, 0), other=0)
        b_out = tl.where((o_i < i)[:, None], b_out * tl.exp(b_g)[None, :], b_out)
        b_dk += b_da[:, None] * b_out * b_q[None, :]
    return b_dq, b_dk


@triton.jit
def gla_intra_bwd_kernel(
    q, k, g, d_scores, dq, dk, dg, ends, offsets, documents,
    q_sb, q_st, q_sh, q_sk, k_sb, k_st, k_sh, k_sk, g_sb, g_st, g_sh, g_sk, per_sample, T, H, K,
    PRECISION: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients from the scores of a chunk, for one block of it and BK channels, written to dq, dk, dg [B, T, H, K]."""
    i_p = tl.program_id(0)
    num_k = tl.cdiv(K, BK)
    i_r = i_p % (C // BC)
    o_k = i_p // (C // BC) % num_k * BK + tl.arange(0, BK)
    i_h = tl.cast(i_p // (C // BC) // num_k % H, tl.int64)
    i_b, i_t, end = locate(i_p // (C // BC) // num_k // H, ends, offsets, documents, per_sample, T, C)
    first = i_t + i_r * BC
    if first >= end:
        return
    p_q = q + i_b * q_sb + i_h * q_sh
    p_k = k + i_b * k_sb + i_h * k_sh
    p_g = g + i_b * g_sb + i_h * g_sh
    p_da = d_scores + ((i_b * T + i_t) * H + i_h) * C
    row = tl.cast(H, tl.int64) * C
    o_i = tl.arange(0, BC)
    o_c = tl.arange(0, C)
    o_row = first + o_i
    o_t = i_t + o_c
    m_row = o_row < end
    m_before = o_c < i_r * BC
    m_after = (o_c >= (i_r + 1) * BC) & (o_t < end)
    b_q = load_tile(p_q, o_row, o_k, m_row, K, q_st, q_sk, ACC)
    b_k = load_tile(p_k, o_row, o_k, m_row, K, k_st, k_sk, ACC)
    b_g = load_tile(p_g, o_row, o_k, m_row, K, g_st, g_sk, ACC)
    p_own = p_da + i_r * BC * (row + 1)
    b_dq, b_dk = _inside(
        p_q + first * q_st, p_k + first * k_st, p_g + first * g_st, p_own, end - first, o_k, row,
        K, q_st, q_sk, k_st, k_sk, g_st, g_sk, ACC, BC, BK,
    )  # fmt: skip
    b_dg = tl.cumsum(b_q * b_dq - b_k * b_dk, axis=0, reverse=True)
    b_diagonal = tl.load(p_own + o_i * (row + 1), mask=m_row, other=0).to(ACC)[:, None]
    b_dq += b_diagonal * b_k
    b_dk += b_diagonal * b_q
    b_past = tl.zeros([C, BK], dtype=ACC)
    if i_r > 0:  # rows of this block with the tokens before it
        b_next = load_tile(p_g, o_t + 1, o_k, o_c + 1 < i_r * BC, K, g_st, g_sk, ACC)
        b_past = load_tile(p_k, o_t, o_k, m_before, K, k_st, k_sk, ACC)
        b_past *= tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
        p_rows = p_da + (i_r * BC + o_i)[:, None] * row + o_c[None, :]
        b_da = tl.load(p_rows, mask=m_row[:, None] & m_before[None, :], other=0).to(ACC)
        b_new = tl.exp(tl.cumsum(b_g, axis=0)) * dot(b_da, b_past, PRECISION, ACC)
        b_dg += tl.cumsum(b_q * b_new, axis=0, reverse=True)
        b_dq += b_new
    if (i_r + 1 < C // BC) & (first + BC < end):  # the tokens after this block with its columns
        b_later = tl.exp(tl.cumsum(load_tile(p_g, o_t, o_k, m_after, K, g_st, g_sk, ACC), axis=0))
        b_later *= load_tile(p_q, o_t, o_k, m_after, K, q_st, q_sk, ACC)
        p_columns = p_da + o_c[None, :] * row + (i_r * BC + o_i)[:, None]
        b_da = tl.load(p_columns, mask=m_after[None, :] & m_row[:, None], other=0).to(ACC)
        b_next = load_tile(p_g, o_row + 1, o_k, (o_i + 1 < BC) & (o_row + 1 < end), K, g_st, g_sk, ACC)
        b_new = tl.exp(tl.cumsum(b_next, axis=0, reverse=True)) * dot(b_da, b_later, PRECISION, ACC)
        b_dg += shift_down(tl.cumsum(b_k * b_new, axis=0), BC, BK)
        b_dk += b_new
        if i_r > 0:  # the tokens after this block with those before it
            p_across = p_da + o_c[:, None] * row + o_c[None, :]
            b_across = tl.load(p_across, mask=m_after[:, None] & m_before[None, :], other=0).to(ACC)
            b_sum = tl.sum(b_later * dot(b_across, b_past, PRECISION, ACC), axis=0) * tl.exp(tl.sum(b_g, axis=0))
            b_dg += b_sum[None, :]
    o_out = ((i_b * T + o_row) * H + i_h)[:, None] * K + o_k[None, :]
    m_out = m_row[:, None] & (o_k < K)[None, :]
    tl.store(dq + o_out, b_dq, mask=m_out)
    tl.store(dk + o_out, b_dk, mask=m_out)
    tl.store(dg + o_out, b_dg, mask=m_out)


@triton.jit
def gla_inter_bwd_kernel(
    do, q, k, v, g, states, d_states, part_q, part_k, part_g, dq, dk, dg, ends, offsets, documents, scale,
    do_sb, do_st, do_sh, do_sv, q_sb, q_st, q_sh, q_sk, k_sb, k_st, k_sh, k_sk, v_sb, v_st, v_sh, v_sv,
    g_sb, g_st, g_sh, g_sk, per_sample, T, H, K, V,
    PRECISION: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients through the states, for a chunk and BK channels, added to those from its scores."""
    i_p = tl.program_id(0)
    num_k = tl.cdiv(K, BK)
    o_k = i_p % num_k * BK + tl.arange(0, BK)
    i_h = tl.cast(i_p // num_k % H, tl.int64)
    i_c = i_p // num_k // H
    i_b, i_t, end = locate(i_c, ends, offsets, documents, per_sample, T, C)
    if i_t >= end:
        return
    o_c = tl.arange(0, C)
    o_t = i_t + o_c
    m_t = o_t < end
    i_s = (tl.cast(i_c, tl.int64) * H + i_h) * K * V
    b_dq = tl.zeros([C, BK], dtype=ACC)
    b_dk = tl.zeros([C, BK], dtype=ACC)
    b_dg = tl.zeros([BK], dtype=ACC)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_h = load_tile(states + i_s, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_dh = load_tile(d_states + i_s, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_dg += tl.sum(b_h * b_dh, axis=1)
        b_do = load_tile(do + i_b * do_sb + i_h * do_sh, o_t, o_v, m_t, V, do_st, do_sv, ACC)
        b_dq += dot(b_do, tl.trans(b_h), PRECISION, ACC)
        b_v = load_tile(v + i_b * v_sb + i_h * v_sh, o_t, o_v, m_t, V, v_st, v_sv, ACC)
        b_dk += dot(b_v, tl.trans(b_dh), PRECISION, ACC)
    p_g = g + i_b * g_sb + i_h * g_sh
    b_g = load_tile(p_g, o_t, o_k, m_t, K, g_st, g_sk, ACC)
    b_next = load_tile(p_g, o_t + 1, o_k, (o_t + 1 < end) & (o_c + 1 < C), K, g_st, g_sk, ACC)
    b_dq *= tl.exp(tl.cumsum(b_g, axis=0)) * scale
    b_dk *= tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
    b_q = load_tile(q + i_b * q_sb + i_h * q_sh, o_t, o_k, m_t, K, q_st, q_sk, ACC)
    b_k = load_tile(k + i_b * k_sb + i_h * k_sh, o_t, o_k, m_t, K, k_st, k_sk, ACC)
    b_sum = tl.cumsum(b_q * b_dq, axis=0, reverse=True) + shift_down(tl.cumsum(b_k * b_dk, axis=0), C, BK)
    b_sum += (b_dg * tl.exp(tl.sum(b_g, axis=0)))[None, :]
    o_out = ((i_b * T + o_t) * H + i_h)[:, None] * K + o_k[None, :]
    m_out = m_t[:, None] & (o_k < K)[None, :]
    b_dq += tl.load(part_q + o_out, mask=m_out, other=0)
    b_dk += tl.load(part_k + o_out, mask=m_out, other=0)
    b_sum += tl.load(part_g + o_out, mask=m_out, other=0)
    tl.store(dq + o_out, b_dq.to(dq.dtype.element_ty), mask=m_out)
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_out)
    tl.store(dg + o_out, tl.where(b_g == float("-inf"), 0.0, b_sum).to(dg.dtype.element_ty), mask=m_out)


def _score_gradients(do: Tensor, v: Tensor, chunks: Chunks, scale: float, precision: Precision) -> Tensor:
    """scale do v^T of the pairs of each chunk, [B, T, H, C], in float32 (float64)."""
    B, T, H, V = v.shape
    dtype, acc = accumulator(v.dtype)
    blocks = pick(SCORE_GRADIENT_BLOCKS, precision, v.dtype, 1, V)
    d_scores = torch.empty(B, T, H, CHUNK, dtype=dtype, device=v.device)
    gla_score_gradients_kernel[(chunks.total * H,)](
        do, v, d_scores, chunks.ends, chunks.offsets, chunks.documents, scale,
        *do.stride(), *v.stride(), chunks.per_sample, T, H, V,
        PRECISION=precision, ACC=acc, C=CHUNK, BV=blocks.BV, num_warps=blocks.num_warps,
    )  # fmt: skip
    return d_scores


def _intra_gradients(
    q: Tensor, k: Tensor, g: Tensor, d_scores: Tensor, chunks: Chunks, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """What dq, dk and dg get from the scores of the chunks, in float32 (float64)."""
    _, T, H, K = q.shape
    blocks = pick(INTRA_BLOCKS, precision, q.dtype, K, 1)
    dq, dk, dg = (torch.empty(q.shape, dtype=d_scores.dtype, device=q.device) for _ in range(3))
    gla_intra_bwd_kernel[(chunks.total * H * triton.cdiv(K, blocks.BK) * (CHUNK // BLOCK),)](
        q, k, g, d_scores, dq, dk, dg, chunks.ends, chunks.offsets, chunks.documents,
        *q.stride(), *k.stride(), *g.stride(), chunks.per_sample, T, H, K,
        PRECISION=precision, ACC=accumulator(q.dtype)[1], C=CHUNK, BC=BLOCK, BK=blocks.BK, num_warps=blocks.num_warps,
    )  # fmt: skip
    return dq, dk, dg


def gla_backward(
    do: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dg, d_initial_state) of `gla_forward`, contiguous, each in the dtype of its tensor.

    Shapes:   do [B, T, H, V], any strides; d_final_state [N, H, K, V] or None; the others as in the forward. d_initial_state
              [N, H, K, V] is always returned, in float32 (float64).
    Dtypes:   as the forward.
    Traffic:  the forward's states and scores once more, states and score gradients of the same sizes, and three tensors of
              q's size in float32. No atomics: bitwise the same on every run.
    Gates:    dg = 0 where g = -inf.
    Exact to: autograd through reference.gla within 1e-12 (float64), 1e-5 ('ieee'), 1e-3 ('tf32').
    Raises:   ValueError if shapes, dtypes or the precision disagree.
    References: Yang et al. 2023, arXiv:2312.06635.
    """
    name = "gla_backward"
    states_of = {"initial_state": initial_state, "d_final_state": d_final_state}
    check_arguments(name, q, k, v, g, tuple(q.shape), states_of, cu_seqlens, precision)
    if do.shape != v.shape:
        raise ValueError(f"{name}: do must be {list(v.shape)}; got {list(do.shape)}.")
    if q.numel() == 0 or v.numel() == 0:
        dq, dk, dv, dg = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g))
        return dq, dk, dv, dg, empty_state(q, v, d_final_state, cu_seqlens)
    chunks = make_chunks(q, cu_seqlens)
    d_states, d_initial = scan_states(q, g, do, d_final_state, chunks, scale, precision, reverse=True)
    scores = chunk_scores(q, k, g, chunks, scale, precision)
    dv = outputs(k, g, do, scores, d_states, chunks, scale, precision, v.dtype, reverse=True)
    del scores
    states, _ = scan_states(k, g, v, initial_state, chunks, scale, precision)
    parts = _intra_gradients(q, k, g, _score_gradients(do, v, chunks, scale, precision), chunks, precision)
    dq, dk, dg = (
        part if part.dtype == x.dtype else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, x in zip(parts, (q, k, g))
    )
    _, T, H, K = q.shape
    blocks = pick(INTER_BLOCKS, precision, q.dtype, K, v.shape[3])
    gla_inter_bwd_kernel[(chunks.total * H * triton.cdiv(K, blocks.BK),)](
        do, q, k, v, g, states, d_states, *parts, dq, dk, dg, chunks.ends, chunks.offsets, chunks.documents, scale,
        *do.stride(), *q.stride(), *k.stride(), *v.stride(), *g.stride(), chunks.per_sample, T, H, K, v.shape[3],
        PRECISION=precision, ACC=accumulator(q.dtype)[1],
        C=CHUNK, BK=blocks.BK, BV=blocks.BV, num_warps=blocks.num_warps,
    )  # fmt: skip
    return dq, dk, dv, dg, d_initial
