"""Gated linear attention with one gate a head, in Triton: gates of each token, a fixed decay (retention), or none.

The decays between the tokens of a chunk are a matrix E_ij = exp(g_{j+1} + .. + g_i), j <= i, made of sums over these very
gates: one cumulative sum of a matrix whose column j starts after token j. Then

    o  = scale (exp(into) (q h) + (q k^T * E) v)               dv = exp(out) (k dh') + scale (q k^T * E)^T do
    dq = scale exp(into) (do h^T) + dS k,  dk = exp(out) (v dh'^T) + dS^T q,  dS = scale (do v^T * E)
    dg_t = sum_{j < t <= i} dS_ij q_i k_j  and the same for the terms through the states: no difference of sums.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
References: Dao and Gu 2024, arXiv:2405.21060; Sun et al. 2023, arXiv:2307.08621.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.linear_attention.triton_gla import check_arguments, empty_state
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

OUTPUT_BLOCKS = {"ieee": Blocks(32, 64, 8), "tf32": Blocks(32, 64, 8), "float64": Blocks(32, 32, 4)}
GRADIENT_BLOCKS = {"ieee": Blocks(32, 32, 8), "tf32": Blocks(32, 64, 8), "float64": Blocks(32, 32, 8)}


@triton.jit
def _decays(g, i_b, i_h, i_t, end, g_sb, g_st, g_sh, ACC: tl.constexpr, C: tl.constexpr):
    """exp of the sums of gates into each token [C], out of it [C], of the chunk, and between two tokens [C, C]."""
    o_c = tl.arange(0, C)
    o_lag = o_c[:, None] - o_c[None, :]
    left = tl.minimum(end - i_t, C).to(tl.int32)
    if g is None:
        b_into = tl.zeros([C], dtype=ACC) + 1.0
        b_out = b_into
        b_total = tl.sum(tl.where(o_c == 0, b_into, 0.0), axis=0)
        b_between = tl.zeros([C, C], dtype=ACC) + 1.0
    elif g_st is None:  # a fixed decay; a lag of 0 never meets a decay of -inf
        b_g = tl.load(g + i_h * g_sh).to(ACC)
        o_left = left - 1 - o_c
        b_into = tl.exp(b_g * (o_c + 1).to(ACC))
        b_out = tl.exp(tl.where(o_left > 0, b_g * tl.maximum(o_left, 1).to(ACC), 0.0))
        b_total = tl.exp(b_g * left.to(ACC))
        b_between = tl.exp(tl.where(o_lag > 0, b_g * tl.maximum(o_lag, 1).to(ACC), 0.0))
    else:
        p_g = g + i_b * g_sb + i_h * g_sh + (i_t + o_c) * g_st
        b_g = tl.load(p_g, mask=o_c < left, other=0).to(ACC)
        b_next = tl.load(p_g + g_st, mask=o_c + 1 < left, other=0).to(ACC)
        b_into = tl.exp(tl.cumsum(b_g, axis=0))
        b_out = tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
        b_total = tl.exp(tl.sum(b_g, axis=0))
        b_between = tl.exp(tl.cumsum(tl.where(o_lag > 0, b_g[:, None], 0.0), axis=0))
    return b_into, b_out, b_total, tl.where(o_lag >= 0, b_between, 0.0)


@triton.jit
def simple_gla_output_kernel(
    q, k, g, y, states, out, ends, offsets, documents, scale,
    q_sb, q_st, q_sh, q_sk, k_sb, k_st, k_sh, k_sk, g_sb, g_st, g_sh, y_sb, y_st, y_sh, y_sv, per_sample, T, H, K, V,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o from y = v and the states; REVERSE: dv from y = do and the states' gradients. One chunk, BV channels."""
    i_p = tl.program_id(0)
    num_v = tl.cdiv(V, BV)
    o_v = i_p % num_v * BV + tl.arange(0, BV)
    i_h = tl.cast(i_p // num_v % H, tl.int64)
    i_c = i_p // num_v // H
    i_b, i_t, end = locate(i_c, ends, offsets, documents, per_sample, T, C)
    if i_t >= end:
        return
    o_t = i_t + tl.arange(0, C)
    m_t = o_t < end
    p_states = states + (tl.cast(i_c, tl.int64) * H + i_h) * K * V
    b_a = tl.zeros([C, C], dtype=ACC)
    b_o = tl.zeros([C, BV], dtype=ACC)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_tile(q + i_b * q_sb + i_h * q_sh, o_t, o_k, m_t, K, q_st, q_sk, ACC)
        b_k = load_tile(k + i_b * k_sb + i_h * k_sh, o_t, o_k, m_t, K, k_st, k_sk, ACC)
        b_h = load_tile(p_states, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_a += dot(b_q, tl.trans(b_k), PRECISION, ACC)
        b_o += dot(b_k if REVERSE else b_q, b_h, PRECISION, ACC)
    b_into, b_out, _, b_between = _decays(g, i_b, i_h, i_t, end, g_sb, g_st, g_sh, ACC, C)
    b_a *= b_between * scale
    b_y = load_tile(y + i_b * y_sb + i_h * y_sh, o_t, o_v, m_t, V, y_st, y_sv, ACC)
    if REVERSE:
        b_o = b_o * b_out[:, None] + dot(tl.trans(b_a), b_y, PRECISION, ACC)
    else:
        b_o = b_o * (b_into * scale)[:, None] + dot(b_a, b_y, PRECISION, ACC)
    o_out = ((i_b * T + o_t) * H + i_h)[:, None] * V + o_v[None, :]
    tl.store(out + o_out, b_o.to(out.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])


@triton.jit
def simple_gla_gradients_kernel(
    do, q, k, v, g, states, d_states, dq, dk, part_g, ends, offsets, documents, scale,
    do_sb, do_st, do_sh, do_sv, q_sb, q_st, q_sh, q_sk, k_sb, k_st, k_sh, k_sk, v_sb, v_st, v_sh, v_sv,
    g_sb, g_st, g_sh, per_sample, B, T, H, K, V, num_chunks,
    PRECISION: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq and dk of one chunk, BK channels, and what they add to dg: part_g [K tiles, B, T, H], or [K tiles, chunks, H]."""
    i_p = tl.program_id(0)
    num_k = tl.cdiv(K, BK)
    i_k = tl.cast(i_p % num_k, tl.int64)
    o_k = i_p % num_k * BK + tl.arange(0, BK)
    i_h = tl.cast(i_p // num_k % H, tl.int64)
    i_c = tl.cast(i_p // num_k // H, tl.int64)
    i_b, i_t, end = locate(i_c, ends, offsets, documents, per_sample, T, C)
    if i_t >= end:
        return
    o_c = tl.arange(0, C)
    o_t = i_t + o_c
    m_t = o_t < end
    i_s = (i_c * H + i_h) * K * V
    b_ds = tl.zeros([C, C], dtype=ACC)
    b_dq = tl.zeros([C, BK], dtype=ACC)
    b_dk = tl.zeros([C, BK], dtype=ACC)
    b_pairs = tl.zeros([BK], dtype=ACC)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_h = load_tile(states + i_s, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_dh = load_tile(d_states + i_s, o_k, o_v, o_k < K, V, V, 1, ACC)
        b_pairs += tl.sum(b_h * b_dh, axis=1)
        b_do = load_tile(do + i_b * do_sb + i_h * do_sh, o_t, o_v, m_t, V, do_st, do_sv, ACC)
        b_v = load_tile(v + i_b * v_sb + i_h * v_sh, o_t, o_v, m_t, V, v_st, v_sv, ACC)
        b_ds += dot(b_do, tl.trans(b_v), PRECISION, ACC)
        b_dq += dot(b_do, tl.trans(b_h), PRECISION, ACC)
        b_dk += dot(b_v, tl.trans(b_dh), PRECISION, ACC)
    b_into, b_out, b_total, b_between = _decays(g, i_b, i_h, i_t, end, g_sb, g_st, g_sh, ACC, C)
    b_ds *= b_between * scale
    b_dq *= (b_into * scale)[:, None]
    b_dk *= b_out[:, None]
    b_q = load_tile(q + i_b * q_sb + i_h * q_sh, o_t, o_k, m_t, K, q_st, q_sk, ACC)
    b_k = load_tile(k + i_b * k_sb + i_h * k_sh, o_t, o_k, m_t, K, k_st, k_sk, ACC)
    if g is not None:
        b_p = b_ds * dot(b_q, tl.trans(b_k), PRECISION, ACC)
        b_past = tl.sum(b_q * b_dq, axis=1)  # of the tokens before the chunk
        b_later = tl.sum(b_k * b_dk, axis=1)  # of those after it
        b_around = tl.sum(b_pairs, axis=0) * b_total
        o_lag = o_c[:, None] - o_c[None, :]
        if g_st is None:
            left = tl.minimum(end - i_t, C).to(tl.int32)
            b_dg = tl.sum(tl.sum(b_p * o_lag.to(ACC), axis=1), axis=0) + b_around * left.to(ACC)
            b_dg += tl.sum(b_past * (o_c + 1).to(ACC) + b_later * (left - 1 - o_c).to(ACC), axis=0)
            tl.store(part_g + (i_k * num_chunks + i_c) * H + i_h, b_dg)
        else:
            b_p = tl.cumsum(b_p, axis=0, reverse=True) + b_later[None, :]
            b_dg = tl.sum(tl.where(o_lag > 0, b_p, 0.0), axis=1) + tl.cumsum(b_past, axis=0, reverse=True) + b_around
            tl.store(part_g + ((i_k * B + i_b) * T + o_t) * H + i_h, b_dg, mask=m_t)
    b_dq += dot(b_ds, b_k, PRECISION, ACC)
    b_dk += dot(tl.trans(b_ds), b_q, PRECISION, ACC)
    o_out = ((i_b * T + o_t) * H + i_h)[:, None] * K + o_k[None, :]
    m_out = m_t[:, None] & (o_k < K)[None, :]
    tl.store(dq + o_out, b_dq.to(dq.dtype.element_ty), mask=m_out)
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_out)


def _spread(g: Tensor | None, q: Tensor) -> Tensor:
    """A view [B, T, H, 1] of the gates."""
    B, T, H, _ = q.shape
    if g is None:
        return torch.zeros(1, dtype=accumulator(q.dtype)[0], device=q.device).expand(B, T, H, 1)
    return g[..., None] if g.ndim == 3 else g[:, None].expand(B, T, H, 1)


def _strides(g: Tensor | None) -> tuple[int | None, ...]:
    """Of batch, time and heads; a fixed decay has none in time."""
    return (0, 0, 0) if g is None else g.stride() if g.ndim == 3 else (0, None, g.stride(0))


def _outputs(
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    y: Tensor,
    states: Tensor,
    chunks: Chunks,
    scale: float,
    precision: Precision,
    dtype: torch.dtype,
    reverse: bool = False,
) -> Tensor:
    """o [B, T, H, V] from v and the states before the chunks; with reverse dv from do and the gradients after them."""
    B, T, H, K = q.shape
    V = y.shape[3]
    blocks = pick(OUTPUT_BLOCKS, precision, q.dtype, K, V)
    out = torch.empty(B, T, H, V, dtype=dtype, device=q.device)
    simple_gla_output_kernel[(chunks.total * H * triton.cdiv(V, blocks.BV),)](
        q, k, g, y, states, out, chunks.ends, chunks.offsets, chunks.documents, scale,
        *q.stride(), *k.stride(), *_strides(g), *y.stride(), chunks.per_sample, T, H, K, V,
        REVERSE=reverse, PRECISION=precision, ACC=accumulator(q.dtype)[1],
        C=CHUNK, BK=blocks.BK, BV=blocks.BV, num_warps=blocks.num_warps,
    )  # fmt: skip
    return out


def _gates_shape(g: Tensor | None, q: Tensor) -> tuple[int, ...]:
    return tuple(q.shape[2:3]) if g is not None and g.ndim == 1 else tuple(q.shape[:3])


def simple_gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """o_t = scale q_t S_t with S_t = exp(g_t) S_{t-1} + k_t v_t^T, and the final states; one gate a head.

    Shapes:   q, k [B, T, H, K], v [B, T, H, V], g [B, T, H], [H] or None, any strides; initial_state [N, H, K, V]; cu_seqlens
              [N + 1] with B = 1, ascending from 0 to T, documents of no tokens allowed; N = B without it. Returns
              o [B, T, H, V], contiguous, and the final states [N, H, K, V].
    Dtypes:   q, k, v any float, all three float64 or none; g any float. Sums and states in float32 (float64 for float64), the
              carry over chunks in float64; o in v.dtype. 'tf32' loses nothing that 16-bit inputs have.
    Traffic:  q and k once or twice per tile of V, v once per tile of K and once more; writes and reads T / C states.
    Exact to: reference.simple_gla within 1e-12 (float64), 1e-5 ('ieee'), 1e-3 ('tf32'). Any gate <= 0, -inf too.
    Raises:   ValueError if shapes, dtypes or the precision disagree.
    References: Dao and Gu 2024, arXiv:2405.21060; Sun et al. 2023, arXiv:2307.08621.
    """
    states_of = {"initial_state": initial_state}
    check_arguments("simple_gla_forward", q, k, v, g, _gates_shape(g, q), states_of, cu_seqlens, precision)
    if q.numel() == 0 or v.numel() == 0:
        return torch.zeros(v.shape, dtype=v.dtype, device=v.device), empty_state(q, v, initial_state, cu_seqlens)
    chunks = make_chunks(q, cu_seqlens)
    states, final = scan_states(k, _spread(g, q), v, initial_state, chunks, scale, precision)
    return _outputs(q, k, g, v, states, chunks, scale, precision, v.dtype), final


def simple_gla_backward(
    do: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients (dq, dk, dv, dg or None, d_initial_state) of `simple_gla_forward`, contiguous, in the dtypes of their tensors.

    Shapes:   do [B, T, H, V], any strides; d_final_state [N, H, K, V] or None; the others as in the forward. d_initial_state
              [N, H, K, V] is always returned, in float32 (float64).
    Dtypes:   as the forward.
    Traffic:  the forward's states once more, and their gradients of the same size; do and v once per tile of K, q and k once
              per tile of V. The tiles of K (and for a fixed decay the chunks) leave their parts of dg, which torch adds up in a
              fixed order: bitwise the same on every run.
    Gates:    dg = 0 where g = -inf.
    Exact to: autograd through reference.simple_gla within 1e-12 (float64), 1e-5 ('ieee'), 1e-3 ('tf32').
    Raises:   ValueError if shapes, dtypes or the precision disagree.
    References: Dao and Gu 2024, arXiv:2405.21060; Sun et al. 2023, arXiv:2307.08621.
    """
    name = "simple_gla_backward"
    states_of = {"initial_state": initial_state, "d_final_state": d_final_state}
    check_arguments(name, q, k, v, g, _gates_shape(g, q), states_of, cu_seqlens, precision)
    if do.shape != v.shape:
        raise ValueError(f"{name}: do must be {list(v.shape)}; got {list(do.shape)}.")
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.numel() == 0 or v.numel() == 0:
        dg = None if g is None else torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        return dq.zero_(), dk.zero_(), torch.zeros_like(v), dg, empty_state(q, v, d_final_state, cu_seqlens)
    chunks = make_chunks(q, cu_seqlens)
    d_states, d_initial = scan_states(q, _spread(g, q), do, d_final_state, chunks, scale, precision, reverse=True)
    dv = _outputs(q, k, g, do, d_states, chunks, scale, precision, v.dtype, reverse=True)
    states, _ = scan_states(k, _spread(g, q), v, initial_state, chunks, scale, precision)
    B, T, H, K = q.shape
    blocks = pick(GRADIENT_BLOCKS, precision, q.dtype, K, v.shape[3])
    tiles = triton.cdiv(K, blocks.BK)
    part_g = None if g is None else _parts(g, q, tiles, chunks)
    simple_gla_gradients_kernel[(chunks.total * H * tiles,)](
        do, q, k, v, g, states, d_states, dq, dk, part_g, chunks.ends, chunks.offsets, chunks.documents, scale,
        *do.stride(), *q.stride(), *k.stride(), *v.stride(), *_strides(g),
        chunks.per_sample, B, T, H, K, v.shape[3], chunks.total,
        PRECISION=precision, ACC=accumulator(q.dtype)[1],
        C=CHUNK, BK=blocks.BK, BV=blocks.BV, num_warps=blocks.num_warps,
    )  # fmt: skip
    if g is None or part_g is None:
        return dq, dk, dv, None, d_initial
    if g.ndim == 1:
        return dq, dk, dv, part_g.sum(dim=(0, 1), dtype=torch.float64).to(g.dtype), d_initial
    return dq, dk, dv, part_g.sum(dim=0).to(g.dtype), d_initial


def _parts(g: Tensor, q: Tensor, tiles: int, chunks: Chunks) -> Tensor:
    """Room for the parts of dg, in float32 (float64); chunks too many leave theirs 0."""
    B, T, H, _ = q.shape
    dtype = accumulator(q.dtype)[0]
    if g.ndim == 1:
        return torch.zeros(tiles, chunks.total, H, dtype=dtype, device=q.device)
    return torch.empty(tiles, B, T, H, dtype=dtype, device=q.device)
