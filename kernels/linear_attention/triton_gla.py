"""Gated linear attention in Triton, forward: one gate for each key channel.

A chunk of C tokens is cut into blocks of BC. The scores A_ij = scale sum_K q_i k_j exp(g_{j+1} + .. + g_i) of a block of rows
with the tokens before it are one product: of q decayed from the block's start, and k decayed up to it. Those inside the block
are made column by column, from right to left: one gate more is multiplied in at each step. Then

    o = (scale q exp(into)) h + A v,        and in the backward  dv = A^T do + (k exp(out)) dh'.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
Reference: Yang et al. 2023, arXiv:2312.06635.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

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
)

BLOCK = 16
"""Tokens of a block inside a chunk."""
SCORE_BLOCKS = {"ieee": Blocks(64, 0, 4), "tf32": Blocks(64, 0, 4), "float64": Blocks(32, 0, 4)}
OUTPUT_BLOCKS = {"ieee": Blocks(32, 64, 8), "tf32": Blocks(32, 64, 8), "float64": Blocks(32, 32, 4)}


@triton.jit
def gla_scores_kernel(
    q, k, g, scores, ends, offsets, documents, scale,
    q_sb, q_st, q_sh, q_sk, k_sb, k_st, k_sh, k_sk, g_sb, g_st, g_sh, g_sk, per_sample, T, H, K,
    PRECISION: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BC rows of the lower triangle of a chunk's scores; zeros above it. scores [B, T, H, C]."""
    i_p = tl.program_id(0)
    i_r = i_p % (C // BC)
    i_h = tl.cast(i_p // (C // BC) % H, tl.int64)
    i_b, i_t, end = locate(i_p // (C // BC) // H, ends, offsets, documents, per_sample, T, C)
    first = i_t + i_r * BC
    if first >= end:
        return
    p_q = q + i_b * q_sb + i_h * q_sh
    p_k = k + i_b * k_sb + i_h * k_sh
    p_g = g + i_b * g_sb + i_h * g_sh
    o_c = tl.arange(0, C)
    o_i = tl.arange(0, BC)
    o_row = first + o_i
    o_t = i_t + o_c
    m_before = o_c < i_r * BC
    b_a = tl.zeros([BC, C], dtype=ACC)
    b_own = tl.zeros([BC, BC], dtype=ACC)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_tile(p_q, o_row, o_k, o_row < end, K, q_st, q_sk, ACC) * scale
        if i_r > 0:
            b_into = tl.exp(tl.cumsum(load_tile(p_g, o_row, o_k, o_row < end, K, g_st, g_sk, ACC), axis=0))
            b_g = load_tile(p_g, o_t + 1, o_k, o_c + 1 < i_r * BC, K, g_st, g_sk, ACC)
            b_k = load_tile(p_k, o_t, o_k, m_before, K, k_st, k_sk, ACC)
            b_k *= tl.exp(tl.cumsum(b_g, axis=0, reverse=True))
            b_a += dot(b_q * b_into, tl.trans(b_k), PRECISION, ACC)
        b_between = tl.zeros([BC, BK], dtype=ACC) + 1.0
        p_gate = p_g + o_k.to(tl.int64) * g_sk + (first + 1) * g_st
        p_key = p_k + o_k.to(tl.int64) * k_sk + first * k_st
        for i in range(BC):
            j = BC - 1 - i
            if j < BC - 1:
                b_g = tl.load(p_gate + j * g_st, mask=o_k < tl.where(first + j + 1 < end, K, 0), other=0).to(ACC)
                b_between = tl.where((o_i > j)[:, None], b_between * tl.exp(b_g)[None, :], b_between)
            b_k = tl.load(p_key + j * k_st, mask=o_k < tl.where(first + j < end, K, 0), other=0).to(ACC)
            b_column = tl.sum(b_q * b_between * b_k[None, :], axis=1)
            b_own += tl.where((o_i[:, None] >= j) & (o_i[None, :] == j), b_column[:, None], 0.0)
    p_row = scores + ((i_b * T + o_row) * H + i_h)[:, None] * C
    m_row = (o_row < end)[:, None]
    m_other = m_before | (o_c >= (i_r + 1) * BC)
    tl.store(p_row + o_c[None, :], b_a, mask=m_row & m_other[None, :])
    tl.store(p_row + i_r * BC + o_i[None, :], b_own, mask=m_row)


@triton.jit
def gla_output_kernel(
    x, g, y, scores, states, out, ends, offsets, documents, scale,
    x_sb, x_st, x_sh, x_sk, g_sb, g_st, g_sh, g_sk, y_sb, y_st, y_sh, y_sv, per_sample, T, H, K, V,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o from x = q, y = v and the states; REVERSE: dv from x = k, y = do and the states' gradients. A chunk, BV channels."""
    i_p = tl.program_id(0)
    num_v = tl.cdiv(V, BV)
    o_v = i_p % num_v * BV + tl.arange(0, BV)
    i_h = tl.cast(i_p // num_v % H, tl.int64)
    i_c = i_p // num_v // H
    i_b, i_t, end = locate(i_c, ends, offsets, documents, per_sample, T, C)
    if i_t >= end:
        return
    p_x = x + i_b * x_sb + i_h * x_sh
    p_g = g + i_b * g_sb + i_h * g_sh
    p_states = states + (tl.cast(i_c, tl.int64) * H + i_h) * K * V
    o_c = tl.arange(0, C)
    o_t = i_t + o_c
    m_t = o_t < end
    b_o = tl.zeros([C, BV], dtype=ACC)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        if REVERSE:
            b_g = load_tile(p_g, o_t + 1, o_k, (o_t + 1 < end) & (o_c + 1 < C), K, g_st, g_sk, ACC)
            b_factor = tl.exp(tl.cumsum(b_g, axis=0, reverse=True))
        else:
            b_g = load_tile(p_g, o_t, o_k, m_t, K, g_st, g_sk, ACC)
            b_factor = tl.exp(tl.cumsum(b_g, axis=0)) * scale
        b_x = load_tile(p_x, o_t, o_k, m_t, K, x_st, x_sk, ACC) * b_factor
        b_h = load_tile(p_states, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_o += dot(b_x, b_h, PRECISION, ACC)
    o_row = (i_b * T + o_t) * H + i_h
    m_scores = m_t[:, None] & (o_c >= 0)[None, :]
    b_a = tl.load(scores + o_row[:, None] * C + o_c[None, :], mask=m_scores, other=0)
    b_y = load_tile(y + i_b * y_sb + i_h * y_sh, o_t, o_v, m_t, V, y_st, y_sv, ACC)
    if REVERSE:
        b_a = tl.trans(b_a)
    b_o += dot(b_a, b_y, PRECISION, ACC)
    m_o = m_t[:, None] & (o_v < V)[None, :]
    tl.store(out + o_row[:, None] * V + o_v[None, :], b_o.to(out.dtype.element_ty), mask=m_o)


def chunk_scores(q: Tensor, k: Tensor, g: Tensor, chunks: Chunks, scale: float, precision: Precision) -> Tensor:
    """[B, T, H, C]: each token's scores with the tokens of its chunk, in float32 (float64)."""
    B, T, H, K = q.shape
    dtype, acc = accumulator(q.dtype)
    blocks = pick(SCORE_BLOCKS, precision, q.dtype, K, 1)
    scores = torch.empty(B, T, H, CHUNK, dtype=dtype, device=q.device)
    gla_scores_kernel[(chunks.total * H * (CHUNK // BLOCK),)](
        q, k, g, scores, chunks.ends, chunks.offsets, chunks.documents, scale,
        *q.stride(), *k.stride(), *g.stride(), chunks.per_sample, T, H, K,
        PRECISION=precision, ACC=acc, C=CHUNK, BC=BLOCK, BK=blocks.BK, num_warps=blocks.num_warps,
    )  # fmt: skip
    return scores


def outputs(
    x: Tensor,
    g: Tensor,
    y: Tensor,
    scores: Tensor,
    states: Tensor,
    chunks: Chunks,
    scale: float,
    precision: Precision,
    dtype: torch.dtype,
    reverse: bool = False,
) -> Tensor:
    """o [B, T, H, V] from q, v and the states before the chunks; with reverse dv from k, do and the gradients after them."""
    B, T, H, K = x.shape
    V = y.shape[3]
    blocks = pick(OUTPUT_BLOCKS, precision, x.dtype, K, V)
    out = torch.empty(B, T, H, V, dtype=dtype, device=x.device)
    gla_output_kernel[(chunks.total * H * triton.cdiv(V, blocks.BV),)](
        x, g, y, scores, states, out, chunks.ends, chunks.offsets, chunks.documents, scale,
        *x.stride(), *g.stride(), *y.stride(), chunks.per_sample, T, H, K, V,
        REVERSE=reverse, PRECISION=precision, ACC=accumulator(x.dtype)[1],
        C=CHUNK, BK=blocks.BK, BV=blocks.BV, num_warps=blocks.num_warps,
    )  # fmt: skip
    return out


def check_arguments(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gates: tuple[int, ...],
    states: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    precision: str,
) -> None:
    """ValueError unless shapes, dtypes and the precision agree; g must be [*gates] if there is one."""
    B, T, H, K = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"k": (k, (B, T, H, K)), "g": (g, gates)}
    wanted["v"] = (v, (B, T, H, v.shape[-1]))
    wanted |= {what: (state, (N, H, K, v.shape[-1])) for what, state in states.items()}
    for what, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: {what} must be {list(shape)}; got {list(x.shape)}.")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"{name}: with cu_seqlens the batch must be 1; got {B}.")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"{name}: precision must be 'ieee' or 'tf32'; got {precision!r}.")
    double = [x.dtype == torch.float64 for x in (q, k, v)]
    if any(double) and (not all(double) or precision != "ieee"):
        raise ValueError(
            f"{name}: float64 needs q, k and v in float64 and precision 'ieee'; got {q.dtype}, {precision!r}."
        )


def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """o_t = scale q_t S_t with S_t = exp(g_t) S_{t-1} + k_t v_t^T, and the final states.

    Shapes:   q, k, g [B, T, H, K], v [B, T, H, V], any strides; initial_state [N, H, K, V]; cu_seqlens [N + 1] with B = 1,
              ascending from 0 to T, documents of no tokens allowed; N = B without it. Returns o [B, T, H, V], contiguous,
              and the final states [N, H, K, V].
    Dtypes:   q, k, v any float, all three float64 or none; g any float. Sums and states in float32 (float64 for float64), the
              carry over chunks in float64; o in v.dtype. 'tf32' loses nothing that 16-bit inputs have.
    Traffic:  q, k, g three times, v twice, per tile of the other; writes and reads [T, H, C] scores and T / C states.
    Exact to: reference.gla within 1e-12 (float64), 1e-5 ('ieee'), 1e-3 ('tf32'). Any gate <= 0, -inf too.
    Raises:   ValueError if shapes, dtypes or the precision disagree.
    References: Yang et al. 2023, arXiv:2312.06635.
    """
    states_of = {"initial_state": initial_state}
    check_arguments("gla_forward", q, k, v, g, tuple(q.shape), states_of, cu_seqlens, precision)
    if q.numel() == 0 or v.numel() == 0:
        return torch.zeros(v.shape, dtype=v.dtype, device=v.device), empty_state(q, v, initial_state, cu_seqlens)
    chunks = make_chunks(q, cu_seqlens)
    states, final = scan_states(k, g, v, initial_state, chunks, scale, precision)
    scores = chunk_scores(q, k, g, chunks, scale, precision)
    return outputs(q, g, v, scores, states, chunks, scale, precision, v.dtype), final


def empty_state(q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The state that leaves a sequence of no elements: the one that came."""
    dtype = accumulator(q.dtype)[0]
    if state is not None:
        return state.to(dtype, copy=True)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(N, *q.shape[2:], v.shape[3], dtype=dtype, device=q.device)
