"""Medium causal convolution in Triton as a banded block-Toeplitz product on tensor cores, depthwise and grouped.

Time is cut into chunks of C tokens. In a chunk, y = sum_m T_m x_m, where x_m is the chunk m before this one and
T_m[i, j] = k[i - j + m C] holds the taps between them; ceil((L - 1) / C) + 1 bands cover every tap. The columns of the product
are all chunks of all channels of all samples that share a filter, so that a depthwise filter still gives a matrix product.
The taps are gathered on chip: T_m never exists in memory.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
References: the two-band product of StripedHyena 2, arXiv:2503.01868; any number of bands, lags and lengths here.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.environment import is_interpreted

Precision = Literal["fp16", "tf32", "bf16x3", "ieee"]
"""fp16: halves scaled by powers of two per column and band. tf32: 10 bits, the range of float32. bf16x3: three products of
bfloat16 halves, about 16 bits. ieee: float32 (float64) multiply-adds, no tensor cores. All add up in float32 (float64)."""


class Blocks(NamedTuple):
    """Tokens of a chunk, columns of a tile, and how a program runs."""

    C: int
    BN: int
    num_warps: int
    num_stages: int


CONV_BLOCKS = {
    "fp16": (Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 2)),
    "tf32": (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "bf16x3": (Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    "ieee": (Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
}
FILTER_BLOCKS = {
    "fp16": (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "tf32": (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "bf16x3": (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "ieee": (Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
}
"""By precision, for 16-bit tensors and for wider ones: what compiles for sm_80 and sm_90 with no spills, or the fewest."""

MOST_PROGRAMS = 4096
"""Of the filter gradient: with fewer filters and bands than this, the columns are split, and their sums added up in order.
A split is a power of two of tiles, a constant of the kernel: few variants, whatever the length."""


@triton.jit
def _fp16_scale(b_max):
    """The power of two below b_max, held within 2^-60 ... 2^60, so that the product of two is finite and not zero."""
    b_bits = b_max.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(b_bits, (127 - 60) << 23), (127 + 60) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(b_power):
    """1 / b_power for a power of two, exactly."""
    return ((254 << 23) - b_power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _dot(b_a, b_b, PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ b from operands in ACC; fp16 operands are scaled by the caller."""
    if PRECISION == "fp16":
        b_sum = tl.dot(b_a.to(tl.float16), b_b.to(tl.float16))
    elif PRECISION == "tf32":
        b_sum = tl.dot(b_a, b_b, input_precision="tf32")
    elif PRECISION == "bf16x3":
        b_a_high = b_a.to(tl.bfloat16)
        b_b_high = b_b.to(tl.bfloat16)
        b_a_low = (b_a - b_a_high.to(tl.float32)).to(tl.bfloat16)
        b_b_low = (b_b - b_b_high.to(tl.float32)).to(tl.bfloat16)
        if INTERPRETED:  # products of bfloat16 are wrong there, casts are right
            b_a_high = b_a_high.to(tl.float32)
            b_b_high = b_b_high.to(tl.float32)
            b_a_low = b_a_low.to(tl.float32)
            b_b_low = b_b_low.to(tl.float32)
        b_sum = tl.dot(b_a_high, b_b_high, tl.dot(b_a_high, b_b_low, tl.dot(b_a_low, b_b_high)))
    else:
        b_sum = tl.dot(b_a, b_b, input_precision="ieee", out_dtype=ACC)
    return b_sum


@triton.jit
def _columns(o_n, i_g, group_channels, num_chunks):
    """Column -> sample, channel, chunk; chunks are the fastest."""
    o_row = o_n // num_chunks
    i_b = (o_row // group_channels).to(tl.int64)
    i_d = (i_g * group_channels + o_row % group_channels).to(tl.int64)
    return i_b, i_d, o_n % num_chunks


@triton.jit
def _load(x, o_row, o_t, mask, x_st, ACC: tl.constexpr):
    return tl.load(x + o_row[:, None] + o_t.to(tl.int64) * x_st, mask=mask, other=0).to(ACC)


@triton.jit
def _load_gated(x, gate, past, o_x, o_gate, o_past, o_t, m_n, T, keep, x_st, gate_st, ACC: tl.constexpr):
    """gate * x at times o_t [BN, C]; the past, which is gated already, at times -keep <= o_t < 0."""
    m_t = m_n[:, None] & (o_t >= 0) & (o_t < T)
    b_x = _load(x, o_x, o_t, m_t, x_st, ACC)
    if gate is not None:
        b_x *= _load(gate, o_gate, o_t, m_t, gate_st, ACC)
    if past is not None:
        b_x += _load(past, o_past, o_t + keep, m_n[:, None] & (o_t < 0) & (o_t >= -keep), 1, ACC)
    return b_x


@triton.jit
def toeplitz_conv_kernel(
    x, gate, past, k, skip, out_gate, second_gate, out, second_out,
    x_sb, x_sd, x_st, gate_sb, gate_sd, gate_st, out_gate_sb, out_gate_sd, out_gate_st,
    second_gate_sb, second_gate_sd, second_gate_st,
    D, T, L, first, length, group_channels, num_chunks, num_columns, num_tiles,
    NUM_BANDS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    INTERPRETED: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of one filter: (k (*) gate x + skip gate x) at times first ... first + length - 1, causal or REVERSE.

    Written to out, times out_gate, and to second_out, times second_gate.
    """
    i_p = tl.program_id(0)
    i_g = i_p // num_tiles
    o_n = (i_p % num_tiles) * BN + tl.arange(0, BN)
    o_j = tl.arange(0, C)
    m_n = o_n < num_columns
    i_b, i_d, o_chunk = _columns(o_n, i_g, group_channels, num_chunks)
    o_x = i_b * x_sb + i_d * x_sd
    o_gate = i_b * gate_sb + i_d * gate_sd
    keep = L - 1
    o_past = (i_b * D + i_d) * keep
    p_k = k + tl.cast(i_g, tl.int64) * L
    o_lag = o_j[:, None] - o_j[None, :] if REVERSE else o_j[None, :] - o_j[:, None]
    o_window = tl.arange(0, 2 * C) - C
    b_y = tl.zeros([BN, C], dtype=ACC)
    for m in range(NUM_BANDS):
        o_t = (o_chunk + m if REVERSE else o_chunk - m)[:, None] * C + o_j[None, :] + first
        b_x = _load_gated(x, gate, past, o_x, o_gate, o_past, o_t, m_n, T, keep, x_st, gate_st, ACC)
        o_s = o_lag + m * C
        b_k = tl.load(p_k + o_s, mask=(o_s >= 0) & (o_s < L), other=0).to(ACC)
        if PRECISION == "fp16":
            o_s = o_window + m * C
            b_window = tl.load(p_k + o_s, mask=(o_s >= 0) & (o_s < L), other=0).to(ACC)
            b_k_scale = _fp16_scale(tl.max(tl.abs(b_window), axis=0))
            b_x_scale = _fp16_scale(tl.max(tl.abs(b_x), axis=1))
            b_x *= _inverse(b_x_scale)[:, None]
            b_product = _dot(b_x, b_k * _inverse(b_k_scale), PRECISION, ACC, INTERPRETED)
            b_y += b_product * (b_x_scale * b_k_scale)[:, None]
        else:
            b_y += _dot(b_x, b_k, PRECISION, ACC, INTERPRETED)
    o_o = o_chunk[:, None] * C + o_j[None, :]
    o_t = o_o + first
    m_o = m_n[:, None] & (o_o < length)
    if skip is not None:
        b_x = _load_gated(x, gate, None, o_x, o_gate, o_past, o_t, m_n, T, keep, x_st, gate_st, ACC)
        b_y += tl.load(skip + i_d, mask=m_n, other=0).to(ACC)[:, None] * b_x
    p_row = (i_b * D + i_d) * length
    if second_gate is not None:
        b_gate = _load(second_gate, i_b * second_gate_sb + i_d * second_gate_sd, o_t, m_o, second_gate_st, ACC)
        tl.store(second_out + p_row[:, None] + o_o, (b_gate * b_y).to(second_out.dtype.element_ty), mask=m_o)
    if out_gate is not None:
        b_y *= _load(out_gate, i_b * out_gate_sb + i_d * out_gate_sd, o_t, m_o, out_gate_st, ACC)
    tl.store(out + p_row[:, None] + o_o, b_y.to(out.dtype.element_ty), mask=m_o)


@triton.jit
def toeplitz_filter_bwd_kernel(
    dy, post_gate, x, pre_gate, past, partial,
    dy_sb, dy_sd, dy_st, post_gate_sb, post_gate_sd, post_gate_st, x_sb, x_sd, x_st, pre_gate_sb, pre_gate_sd, pre_gate_st,
    D, G, T, L, group_channels, num_chunks, num_columns,
    NUM_BANDS: tl.constexpr, SPLIT_TILES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    INTERPRETED: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dT_m = sum of (post dy) (pre x)^T over one split of the columns; its sums along diagonals: partial[split, g, m, 2, C].

    Row 0 has the lags m C + r (on and below the diagonal), row 1 the lags (m - 1) C + r (above it).
    """
    i_p = tl.program_id(0)
    i_m = i_p % NUM_BANDS
    i_g = (i_p // NUM_BANDS) % G
    i_s = (i_p // NUM_BANDS) // G
    o_j = tl.arange(0, C)
    keep = L - 1
    b_dt = tl.zeros([C, C], dtype=ACC)
    for i in range(SPLIT_TILES):
        o_n = (i_s * SPLIT_TILES + i) * BN + tl.arange(0, BN)
        m_n = o_n < num_columns
        i_b, i_d, o_chunk = _columns(o_n, i_g, group_channels, num_chunks)
        o_t = o_chunk[:, None] * C + o_j[None, :]
        o_dy = i_b * dy_sb + i_d * dy_sd
        o_post = i_b * post_gate_sb + i_d * post_gate_sd
        o_x = i_b * x_sb + i_d * x_sd
        o_pre = i_b * pre_gate_sb + i_d * pre_gate_sd
        o_past = (i_b * D + i_d) * keep
        b_dy = _load_gated(dy, post_gate, None, o_dy, o_post, o_past, o_t, m_n, T, keep, dy_st, post_gate_st, ACC)
        o_t -= i_m * C
        b_x = _load_gated(x, pre_gate, past, o_x, o_pre, o_past, o_t, m_n, T, keep, x_st, pre_gate_st, ACC)
        if PRECISION == "fp16":
            # each column by its own power of two; what the products need to be alike again goes to x, and is at most 1
            b_dy_scale = _fp16_scale(tl.max(tl.abs(b_dy), axis=1))
            b_x_scale = _fp16_scale(tl.max(tl.abs(b_x), axis=1))
            b_loudest = tl.max(b_dy_scale * b_x_scale, axis=0)
            b_dy *= _inverse(b_dy_scale)[:, None]
            b_x *= (_inverse(b_x_scale) * (b_dy_scale * b_x_scale * _inverse(b_loudest)))[:, None]
            b_dt += _dot(tl.trans(b_dy), b_x, PRECISION, ACC, INTERPRETED) * b_loudest
        else:
            b_dt += _dot(tl.trans(b_dy), b_x, PRECISION, ACC, INTERPRETED)
    o_lag = o_j[:, None] - o_j[None, :]
    b_diagonals = tl.gather(b_dt, (o_lag + C) % C, axis=1)  # [i, r] = dT[i, i - r]: lag r, or r - C above the diagonal
    p_partial = partial + ((tl.cast(i_s, tl.int64) * G + i_g) * NUM_BANDS + i_m) * (2 * C) + o_j
    tl.store(p_partial, tl.sum(tl.where(o_lag >= 0, b_diagonals, 0.0), axis=0))
    tl.store(p_partial + C, tl.sum(tl.where(o_lag < 0, b_diagonals, 0.0), axis=0))


def _check(name: str, x: Tensor, like: dict[str, Tensor | None], groups: int, length: int, precision: str) -> None:
    if precision not in CONV_BLOCKS:
        raise ValueError(f"{name}: precision must be one of {', '.join(CONV_BLOCKS)}; got {precision!r}.")
    if x.dtype == torch.float64 and precision != "ieee":
        raise ValueError(f"{name}: float64 is computed with precision 'ieee' only; got {precision!r}.")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{name}: the number of filters must divide D={x.shape[1]}; got {groups}.")
    if length < 1:
        raise ValueError(f"{name}: a filter must have a tap; got {length}.")
    shapes = {"past": (*x.shape[:2], length - 1), "skip": x.shape[1:2]}
    for what, tensor in like.items():
        shape = shapes.get(what, x.shape)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: {what} must be {list(shape)}; got {list(tensor.shape)}.")


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _dense(x: Tensor | None) -> Tensor | None:
    """Small parameters are read contiguously; an empty one is left out."""
    return x.contiguous() if x is not None and x.numel() > 0 else None


def _blocks(table: dict[str, tuple[Blocks, Blocks]], precision: Precision, *inputs: Tensor | None) -> Blocks:
    return table[precision][max(t.element_size() for t in inputs if t is not None) > 2]


def _launch(
    x: Tensor,
    gate: Tensor | None,
    past: Tensor | None,
    k: Tensor,
    skip: Tensor | None,
    out_gate: Tensor | None,
    out: Tensor,
    precision: Precision,
    first: int = 0,
    reverse: bool = False,
    second_gate: Tensor | None = None,
    second_out: Tensor | None = None,
) -> None:
    """out[.., o] = out_gate * (k (*) (gate x) + skip gate x) at time first + o; nothing for an empty `out`."""
    B, D, T = x.shape
    G, L = k.shape
    length = out.shape[2]
    if out.numel() == 0:
        return
    blocks = _blocks(CONV_BLOCKS, precision, x, gate, out_gate)
    C, BN = blocks.C, blocks.BN
    num_chunks = triton.cdiv(length, C)
    num_columns = B * (D // G) * num_chunks
    num_tiles = triton.cdiv(num_columns, BN)
    toeplitz_conv_kernel[(G * num_tiles,)](
        x, gate, _dense(past), k.contiguous(), _dense(skip), out_gate, second_gate, out, second_out,
        *x.stride(), *_strides(gate), *_strides(out_gate), *_strides(second_gate),
        D, T, L, first, length, D // G, num_chunks, num_columns, num_tiles,
        NUM_BANDS=triton.cdiv(L - 1, C) + 1, REVERSE=reverse, PRECISION=precision,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, INTERPRETED=is_interpreted(),
        C=C, BN=BN, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


def toeplitz_forward(
    x: Tensor,
    k: Tensor,
    past: Tensor | None,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    precision: Precision,
) -> Tensor:
    """y = post_gate * (k (*) (pre_gate * x) + skip * pre_gate * x), causal, in one pass over the bands of T(k).

    Shapes:   x, pre_gate, post_gate [B, D, T], any strides; k [G, L], G dividing D, channel d with filter d // (D / G);
              past [B, D, L-1], the gated inputs before the first token; skip [D]. Returns y [B, D, T], contiguous.
    Dtypes:   any float; float64 with 'ieee' only; sums in float32 (float64); y in x.dtype.
    Traffic:  y once; x and pre_gate once per band, all but the first time out of the second-level cache; k once a tile.
              2 C (ceil((L-1)/C) + 1) multiply-adds an element. Shared memory at most 82 KB, 74 KB for 16-bit tensors.
    Exact to: reference.long_conv within 1e-12 ('ieee', float64), 1e-5 (float32), 1e-4 ('bf16x3'), 2e-3 ('fp16', 'tf32').
              An infinity or NaN in x also reaches up to C - 1 tokens before it.
    Raises:   ValueError if shapes or the precision disagree.
    References: StripedHyena 2, arXiv:2503.01868.

    The gradient of post_gate is this function with dy in its place.
    """
    like = {"past": past, "skip": skip, "pre_gate": pre_gate, "post_gate": post_gate}
    _check("toeplitz_forward", x, like, k.shape[0], k.shape[1], precision)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, pre_gate, past, k, skip, post_gate, y, precision)
    return y


def toeplitz_input_gradient(
    dy: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    x: Tensor | None,
    precision: Precision,
    past: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dpre_gate, dpast) of `toeplitz_forward`: the anticausal product sum_s k[s] dz[t + s] + skip dz, dz = post_gate dy.

    Shapes:   dy, x and the gates [B, D, T], any strides; x is needed with a pre_gate only, whose gradient it scales.
              dpre_gate [B, D, T] or None without a pre_gate; dpast [B, D, L-1], or None unless `past`.
    Dtypes:   as the forward; results in dy.dtype.
    Traffic:  as the forward, dy in place of x; x and dpre_gate once. dpast reads only the first L - 1 tokens.
    Raises:   ValueError if shapes or the precision disagree, or x is missing.
    """
    name = "toeplitz_input_gradient"
    _check(
        name,
        dy,
        {"skip": skip, "pre_gate": pre_gate, "post_gate": post_gate, "x": x},
        k.shape[0],
        k.shape[1],
        precision,
    )
    if pre_gate is not None and x is None:
        raise ValueError(f"{name}: the gradient of pre_gate needs x; got None.")
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dpre = None if pre_gate is None else torch.empty_like(dx)
    second = x if pre_gate is not None else None
    _launch(dy, post_gate, None, k, skip, pre_gate, dx, precision, 0, True, second, dpre)
    if not past:
        return dx, dpre, None
    keep = k.shape[1] - 1
    dpast = torch.empty(*dy.shape[:2], keep, dtype=dy.dtype, device=dy.device)
    _launch(dy, post_gate, None, k, None, None, dpast, precision, -keep, True)
    return dx, dpre, dpast


def toeplitz_filter_gradient(
    dy: Tensor,
    x: Tensor,
    length: int,
    groups: int,
    past: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    precision: Precision,
) -> Tensor:
    """dk[g, j] = sum over samples, channels of group g and tokens of dz[t] xg[t - j]: dz = post_gate dy, xg = pre_gate x.

    Shapes:   dy, x and the gates [B, D, T], any strides; past [B, D, length-1]. Returns dk [groups, length].
    Dtypes:   as the forward; dk in float32 (float64).
    Traffic:  dy and x once per band, all but the first time out of the second-level cache. Each program adds up one band of
              one filter over one split of the columns, and leaves the 2 C sums along its diagonals, which torch adds in a
              fixed order: bitwise the same on every run. Shared memory at most 98 KB, 49 KB for 16-bit tensors.
    Raises:   ValueError if shapes or the precision disagree.
    References: StripedHyena 2, arXiv:2503.01868.

    The gradient of skip is this function with length 1 and a group for each channel; column 0 of dk if depthwise.
    """
    like = {"x": x, "past": past, "pre_gate": pre_gate, "post_gate": post_gate}
    _check("toeplitz_filter_gradient", dy, like, groups, length, precision)
    B, D, T = dy.shape
    sums = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if dy.numel() == 0:
        return torch.zeros(groups, length, dtype=sums, device=dy.device)
    blocks = _blocks(FILTER_BLOCKS, precision, dy, x, pre_gate, post_gate)
    C, BN = blocks.C, blocks.BN
    num_bands = triton.cdiv(length - 1, C) + 1
    num_chunks = triton.cdiv(T, C)
    num_columns = B * (D // groups) * num_chunks
    num_tiles = triton.cdiv(num_columns, BN)
    split_tiles = triton.next_power_of_2(triton.cdiv(num_tiles, triton.cdiv(MOST_PROGRAMS, groups * num_bands)))
    num_splits = triton.cdiv(num_tiles, split_tiles)
    partial = torch.empty(num_splits, groups, num_bands, 2, C, dtype=sums, device=dy.device)
    toeplitz_filter_bwd_kernel[(num_splits * groups * num_bands,)](
        dy, post_gate, x, pre_gate, _dense(past), partial,
        *dy.stride(), *_strides(post_gate), *x.stride(), *_strides(pre_gate),
        D, groups, T, length, D // groups, num_chunks, num_columns,
        NUM_BANDS=num_bands, SPLIT_TILES=split_tiles, PRECISION=precision,
        ACC=tl.float64 if dy.dtype == torch.float64 else tl.float32, INTERPRETED=is_interpreted(),
        C=C, BN=BN, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    total = partial.sum(dim=0)
    lags = total[:, :, 0]
    lags[:, :-1] += total[:, 1:, 1]
    return lags.reshape(groups, num_bands * C)[:, :length]
