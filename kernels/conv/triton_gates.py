"""What stands around a cuFFT, each in one pass: gate, cast and padding before it; cut, gates and cast after it. In Triton.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048
"""Elements of one program: 16 a thread with four warps, in loads of 16 bytes."""


@triton.jit
def _row(i_row, D):
    """Sample and channel of a row, as int64 for the strides."""
    return tl.cast(i_row // D, tl.int64), tl.cast(i_row % D, tl.int64)


@triton.jit
def pad_gated_kernel(
    p_x, p_gate, p_past, p_out, x_sb, x_sd, x_st, gate_sb, gate_sd, gate_st, past_sb, past_sd, past_st,
    D, T, keep, size, num_tiles, ACC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One tile of one row of out [B D, size]: past, or zeros, for `keep` elements, then gate * x, then zeros."""
    i_row = tl.program_id(0) // num_tiles
    o_t = (tl.program_id(0) % num_tiles) * BT + tl.arange(0, BT)
    i_b, i_d = _row(i_row, D)
    o_x = o_t - keep
    m_x = (o_x >= 0) & (o_x < T)
    b_x = tl.load(p_x + i_b * x_sb + i_d * x_sd + o_x.to(tl.int64) * x_st, mask=m_x, other=0.0).to(ACC)
    if p_gate is not None:
        p_row = p_gate + i_b * gate_sb + i_d * gate_sd
        b_x *= tl.load(p_row + o_x.to(tl.int64) * gate_st, mask=m_x, other=0.0).to(ACC)
    if p_past is not None:
        p_row = p_past + i_b * past_sb + i_d * past_sd
        b_x += tl.load(p_row + o_t.to(tl.int64) * past_st, mask=o_t < keep, other=0.0).to(ACC)
    tl.store(p_out + tl.cast(i_row, tl.int64) * size + o_t, b_x, mask=o_t < size)


@triton.jit
def cut_gated_kernel(
    p_z, p_gate, p_y, p_second_gate, p_second_y, z_row, gate_sb, gate_sd, gate_st, y_sb, y_sd,
    second_sb, second_sd, second_st, second_y_sb, second_y_sd,
    D, T, first, num_tiles, ACC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One tile of gate * z[first : first + T] of one row, once for each gate."""
    i_row = tl.program_id(0) // num_tiles
    o_t = (tl.program_id(0) % num_tiles) * BT + tl.arange(0, BT)
    i_b, i_d = _row(i_row, D)
    m_t = o_t < T
    b_z = tl.load(p_z + tl.cast(i_row, tl.int64) * z_row + first + o_t, mask=m_t, other=0.0).to(ACC)
    b_y = b_z
    if p_gate is not None:
        b_y = b_z * tl.load(
            p_gate + i_b * gate_sb + i_d * gate_sd + o_t.to(tl.int64) * gate_st, mask=m_t, other=0.0
        ).to(ACC)
    tl.store(p_y + i_b * y_sb + i_d * y_sd + o_t, b_y.to(p_y.dtype.element_ty), mask=m_t)
    if p_second_y is not None:
        p_row = p_second_gate + i_b * second_sb + i_d * second_sd
        b_y = b_z * tl.load(p_row + o_t.to(tl.int64) * second_st, mask=m_t, other=0.0).to(ACC)
        p_row = p_second_y + i_b * second_y_sb + i_d * second_y_sd
        tl.store(p_row + o_t, b_y.to(p_second_y.dtype.element_ty), mask=m_t)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def pad_gated(x: Tensor, gate: Tensor | None, past: Tensor | None, keep: int, size: int, dtype: torch.dtype) -> Tensor:
    """[past or zeros, gate * x, zeros] of `size` elements a row, ready for a transform.

    Shapes:   x, gate [B, D, T], past [B, D, keep], any strides; returns [B, D, size], contiguous; size >= keep + T.
    Dtypes:   any float; returns `dtype`, float32 or float64.
    Traffic:  each input once, the output once.
    """
    B, D, T = x.shape
    out = torch.empty(B, D, size, dtype=dtype, device=x.device)
    if out.numel():
        tiles = triton.cdiv(size, TILE_ELEMENTS)
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(x):
            pad_gated_kernel[(B * D * tiles,)](
                x, gate, past if keep else None, out, *x.stride(), *_strides(gate), *_strides(past),
                D, T, keep, size, tiles, ACC=acc, BT=TILE_ELEMENTS, num_warps=4,
            )  # fmt: skip
    return out


def cut_gated(
    z: Tensor,
    first: int,
    gate: Tensor | None,
    y: Tensor,
    second_gate: Tensor | None = None,
    second_y: Tensor | None = None,
) -> None:
    """y = gate * z[..., first : first + T], and second_y = second_gate * that, cast to what y and second_y are.

    Shapes:   z [B, D, n] with rows of elements next to each other and equally far apart; gates [B, D, T], any strides;
              y, second_y [B, D, T], dense along T, written.
    Traffic:  z and gates once, y and second_y once.
    """
    B, D, T = y.shape
    if y.numel() == 0:
        return
    if z.stride(2) != 1 or z.stride(0) != D * z.stride(1):
        z = z.contiguous()
    tiles = triton.cdiv(T, TILE_ELEMENTS)
    acc = tl.float64 if z.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(z):
        cut_gated_kernel[(B * D * tiles,)](
            z, gate, y, second_gate, second_y, z.stride(1), *_strides(gate), *y.stride()[:2],
            *_strides(second_gate), *_strides(second_y)[:2],
            D, T, first, tiles, ACC=acc, BT=TILE_ELEMENTS, num_warps=4,
        )  # fmt: skip
