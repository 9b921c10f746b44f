"""Short depthwise causal convolution in Triton: bias, SiLU, past state and document boundaries in one pass.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 1024
"""Elements of x that one program works on: four a thread with eight warps, which hardly spill; with four they do."""
NUM_WARPS = 8
UNROLL = 4
"""Taps of one round of the loop over taps, so that their loads are in flight together."""


@triton.jit
def _tap(p_x, p_past, o_s, mask, x_st, W: tl.constexpr, ACC: tl.constexpr):
    """x[d, o_s], from the past where o_s < 0. p_x, p_past [BD, 1] rows; o_s [1, BT] >= 1 - W; mask [BD, BT]."""
    b_x = tl.load(p_x + o_s.to(tl.int64) * x_st, mask=mask & (o_s >= 0), other=0).to(ACC)
    if p_past is not None:
        b_x += tl.load(p_past + (o_s + (W - 1)), mask=mask & (o_s < 0), other=0).to(ACC)
    return b_x


@triton.jit
def _tile(num_t_tiles, num_d_tiles, D, T, BD: tl.constexpr, BT: tl.constexpr):
    """Program id -> sample, channels [BD, 1], tokens [1, BT], mask. Everything is on grid axis 0: the others end at 65535."""
    i_p = tl.program_id(0)
    i_t = i_p % num_t_tiles
    i_d = (i_p // num_t_tiles) % num_d_tiles
    i_b = (i_p // num_t_tiles) // num_d_tiles
    o_d = (i_d * BD + tl.arange(0, BD))[:, None]
    o_t = (i_t * BT + tl.arange(0, BT))[None, :]
    return tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), o_d.to(tl.int64), o_t, (o_d < D) & (o_t < T)


@triton.jit
def _preactivation(
    p_x, p_past, w, bias, b_position, o_d, o_t, m_tile, x_st, D,
    W: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """bias[d] + sum_s w[d, s] x[d, t - s] over the taps inside the document, [BD, BT]."""
    b_z = tl.zeros([BD, BT], dtype=ACC)
    for s in tl.range(0, W, loop_unroll_factor=UNROLL):
        m_tap = m_tile if b_position is None else m_tile & (b_position >= s)
        b_w = tl.load(w + o_d * W + s, mask=o_d < D, other=0).to(ACC)
        b_z += b_w * _tap(p_x, p_past, o_t - s, m_tap, x_st, W, ACC)
    if bias is not None:
        b_z += tl.load(bias + o_d, mask=o_d < D, other=0).to(ACC)
    return b_z


@triton.jit
def _sigmoid(b_z):
    """Without overflow on either side."""
    b_e = tl.exp(-tl.abs(b_z))
    return tl.where(b_z >= 0, 1.0, b_e) / (1 + b_e)


@triton.jit
def short_conv_fwd_kernel(
    x, w, bias, past, positions, y, x_sb, x_sd, x_st, num_t_tiles, num_d_tiles, D, T,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program: BD channels by BT tokens of one sample."""
    i_b, _, o_d, o_t, m_tile = _tile(num_t_tiles, num_d_tiles, D, T, BD, BT)
    p_x = x + i_b * x_sb + o_d * x_sd
    p_past = None if past is None else past + (i_b * D + o_d) * (W - 1)
    b_position = None if positions is None else tl.load(positions + o_t, mask=o_t < T, other=0)
    b_y = _preactivation(p_x, p_past, w, bias, b_position, o_d, o_t, m_tile, x_st, D, W, ACC, UNROLL, BD, BT)
    if SILU:
        b_y *= _sigmoid(b_y)
    tl.store(y + (i_b * D + o_d) * T + o_t, b_y.to(y.dtype.element_ty), mask=m_tile)


@triton.jit
def short_conv_weight_bwd_kernel(
    dy, x, w, bias, past, positions, dz, partial, dy_sb, dy_sd, dy_st, x_sb, x_sd, x_st, num_t_tiles, num_d_tiles, D, T,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dz = dy silu'(z), written when SILU, and this tile's sums of dw and dbias: partial[b * num_t_tiles + i_t, d, W + 1]."""
    i_b, i_t, o_d, o_t, m_tile = _tile(num_t_tiles, num_d_tiles, D, T, BD, BT)
    p_x = x + i_b * x_sb + o_d * x_sd
    p_past = None if past is None else past + (i_b * D + o_d) * (W - 1)
    b_position = None if positions is None else tl.load(positions + o_t, mask=o_t < T, other=0)
    b_dz = tl.load(dy + i_b * dy_sb + o_d * dy_sd + o_t.to(tl.int64) * dy_st, mask=m_tile, other=0).to(ACC)
    if SILU:
        b_z = _preactivation(p_x, p_past, w, bias, b_position, o_d, o_t, m_tile, x_st, D, W, ACC, UNROLL, BD, BT)
        b_sigmoid = _sigmoid(b_z)
        b_dz *= b_sigmoid * (1 + b_z * (1 - b_sigmoid))
        tl.store(dz + (i_b * D + o_d) * T + o_t, b_dz.to(dz.dtype.element_ty), mask=m_tile)
    p_partial = partial + ((i_b * num_t_tiles + i_t) * D + o_d) * (W + 1)
    for s in tl.range(0, W, loop_unroll_factor=UNROLL):
        m_tap = m_tile if b_position is None else m_tile & (b_position >= s)
        b_dw = tl.sum(b_dz * _tap(p_x, p_past, o_t - s, m_tap, x_st, W, ACC), axis=1)
        tl.store(p_partial + s, b_dw[:, None], mask=o_d < D)
    if bias is not None:
        tl.store(p_partial + W, tl.sum(b_dz, axis=1)[:, None], mask=o_d < D)


@triton.jit
def short_conv_input_bwd_kernel(
    dz, w, positions, dx, dz_sb, dz_sd, dz_st, num_t_tiles, num_d_tiles, D, T, first, length,
    W: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dx[d, o] = sum_s w[d, s] dz[d, first + o + s], o < length: first = 0 for the input, -(W - 1) for the past."""
    i_b, _, o_d, o_t, m_tile = _tile(num_t_tiles, num_d_tiles, D, length, BD, BT)
    p_dz = dz + i_b * dz_sb + o_d * dz_sd
    b_dx = tl.zeros([BD, BT], dtype=ACC)
    for s in tl.range(0, W, loop_unroll_factor=UNROLL):
        o_s = o_t + (first + s)
        m_tap = m_tile & (o_s >= 0) & (o_s < T)
        if positions is not None:
            m_tap = m_tap & (tl.load(positions + o_s, mask=(o_s >= 0) & (o_s < T), other=-1) >= s)
        b_w = tl.load(w + o_d * W + s, mask=o_d < D, other=0).to(ACC)
        b_dx += b_w * tl.load(p_dz + o_s.to(tl.int64) * dz_st, mask=m_tap, other=0).to(ACC)
    tl.store(dx + (i_b * D + o_d) * length + o_t, b_dx.to(dx.dtype.element_ty), mask=m_tile)


def tile_shape(length: int, stride: int) -> tuple[int, int]:
    """(BD, BT) for rows of `length` tokens, `stride` elements apart: long along time, unless channels are the dense side."""
    longest = TILE_ELEMENTS if stride == 1 else TILE_ELEMENTS // 32
    BT = min(longest, max(16, triton.next_power_of_2(length)))
    return TILE_ELEMENTS // BT, BT


def _check(name: str, x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None, positions: Tensor | None) -> None:
    B, D, T = x.shape
    W = w.shape[1]
    wanted = {"w": (w, (D, W)), "bias": (bias, (D,)), "past": (past, (B, D, W - 1)), "positions": (positions, (T,))}
    for what, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: {what} must be {list(shape)}; got {list(tensor.shape)}.")
    if positions is not None and positions.dtype != torch.int32:
        raise ValueError(f"{name}: positions must be int32; got {positions.dtype}.")


def _dense(x: Tensor | None) -> Tensor | None:
    """Small parameters are read contiguously; an empty one is left out."""
    return x.contiguous() if x is not None and x.numel() > 0 else None


def short_conv_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool, positions: Tensor | None
) -> Tensor:
    """y[b, d, t] = act(bias[d] + sum_s w[d, s] x[b, d, t - s]), the taps with s > positions[t] left out.

    Shapes:   x [B, D, T], any strides; w [D, W]; bias [D]; past [B, D, W-1], the inputs before the first token;
              positions [T], int32, each token's index inside its document. Returns y [B, D, T], contiguous.
    Dtypes:   any float; sums in float64 for float64 and in float32 otherwise; y in x.dtype.
    Traffic:  x and y once. Taps beyond the first are served by the first-level cache. No shared memory.
    Raises:   ValueError if shapes disagree.
    """
    _check("short_conv_forward", x, w, bias, past, positions)
    B, D, T = x.shape
    W = w.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    BD, BT = tile_shape(T, x.stride(2))
    tiles = triton.cdiv(T, BT), triton.cdiv(D, BD)
    short_conv_fwd_kernel[(tiles[0] * tiles[1] * B,)](
        x, w.contiguous(), _dense(bias), _dense(past), _dense(positions), y, *x.stride(), *tiles, D, T,
        W=W, SILU=silu, ACC=_accumulator(x), UNROLL=min(UNROLL, W), BD=BD, BT=BT, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def short_conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    silu: bool,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients (dx, dw, dbias or None, dpast or None) of `short_conv_forward`, each in the dtype of its tensor.

    Shapes:   dy [B, D, T], any strides; the others as in the forward.
    Dtypes:   as the forward. With silu the gradient before the activation, dz, is kept in dy.dtype between two kernels.
    Traffic:  dy and x once, dx once; with silu also dz written and read. Sums of dw and dbias leave each tile as
              W + 1 numbers a channel, added up by torch in a fixed order: bitwise the same on every run. No shared memory
              but that of a sum over a tile.
    Raises:   ValueError if shapes disagree.
    """
    name = "short_conv_backward"
    _check(name, x, w, bias, past, positions)
    if dy.shape != x.shape:
        raise ValueError(f"{name}: dy must be {list(x.shape)}; got {list(dy.shape)}.")
    B, D, T = x.shape
    W = w.shape[1]
    if x.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (bias, past)]
        return torch.zeros_like(x), torch.zeros_like(w), zeros[0], zeros[1]
    BD, BT = tile_shape(T, x.stride(2))
    tiles = triton.cdiv(T, BT), triton.cdiv(D, BD)
    taps, kept, index, acc = w.contiguous(), _dense(past), _dense(positions), _accumulator(x)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(B * tiles[0], D, W + 1, dtype=sums, device=x.device)
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if silu else dy
    short_conv_weight_bwd_kernel[(tiles[0] * tiles[1] * B,)](
        dy, x, taps, _dense(bias), kept, index, dz if silu else None, partial,
        *dy.stride(), *x.stride(), *tiles, D, T,
        W=W, SILU=silu, ACC=acc, UNROLL=min(UNROLL, W), BD=BD, BT=BT, num_warps=NUM_WARPS,
    )  # fmt: skip
    dw = partial[..., :W].sum(dim=0).to(w.dtype)
    dbias = None if bias is None else partial[..., W].sum(dim=0).to(bias.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype, device=past.device)
    for out, first in ((dx, 0), (dpast, 1 - W)):
        if out is None or out.numel() == 0:
            continue
        length = out.shape[2]
        BD, BT = tile_shape(length, dz.stride(2))
        tiles = triton.cdiv(length, BT), triton.cdiv(D, BD)
        short_conv_input_bwd_kernel[(tiles[0] * tiles[1] * B,)](
            dz, taps, index, out, *dz.stride(), *tiles, D, T, first, length,
            W=W, ACC=acc, UNROLL=min(UNROLL, W), BD=BD, BT=BT, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, dw, dbias, dpast


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
