"""FFT convolution of long sequences in two levels: an outer DFT as a matrix product, the fused 4096-point transform within.

With M = 4096, N = N1 M, n = n1 M + m, k = k1 + N1 k2 and w_J = exp(-2 pi i / J):

    A[k1, m] = w * sum_n1 w_N1^(n1 k1) x[n1, m]                    outer kernel, a [N1/2 + 1, rows] matrix; w = w_N^(m k1)
    Z[k1, m] = conj(w) * inverse_M(K[k1] * transform_M(A[k1]))     inner kernel, one program per k1
    y[n1, m] = 1/N Re sum_k1 v[k1] conj(w_N1)^(n1 k1) Z[k1, m]     outer kernel, v = 1, 2, ..., 2, 1

Only the rows n1 that hold the sequence enter, and because x and the filter are real, row N1 - k1 is the conjugate of row k1:
half of the rows k1 suffice, and nothing is computed twice. The inner spectra stay in the order of `triton_monarch`.

In fp16 the rows of A and Z are float16; every sequence is first brought to [1, 2) by a power of two, and the outer sums are
divided by 2^h about sqrt(N1). Otherwise they are float32. Normal noise, relative L2 error against float64, measured in the
interpreter and an emulation of bfloat16 (its TF32 is float32): ieee 3.3e-7, bf16x3 7.1e-6, fp16 6.7e-4.

References: FlashFFTConv, Fu et al. 2023, arXiv:2311.05908 (an outer butterfly over complex rows, without the half spectrum).
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.conv.triton_monarch import (
    FilterSpectrum,
    Precision,
    check_precision,
    dot,
    inverse_transform,
    load_gated,
    num_warps,
    permute_spectrum,
    rows,
    store_row,
    strides,
    tables,
    transform,
)
from seqengine.kernels.environment import is_interpreted

INNER, SIDE = 4096, 64
COLUMNS = 64
"""Columns m of one program of the outer products."""
CHUNK = 8192
"""Elements of one program of the search for the largest element."""
SPECTRUM_ELEMENTS = 1 << 26
"""Points of the filter transforms that torch.fft does at once: a bound on memory."""


@triton.jit
def row_max_kernel(p_u, p_pre, p_max, D, T, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, CHUNK: tl.constexpr):
    """Largest |pre * u| of one chunk of one row; grid [B * D * chunks]."""
    i_chunks = tl.cdiv(T, CHUNK)
    i_r = tl.program_id(0) // i_chunks
    o_t = (tl.program_id(0) % i_chunks) * CHUNK + tl.arange(0, CHUNK)
    b_x = load_gated(p_u, p_pre, i_r // D, i_r % D, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, o_t < T)
    tl.store(p_max + tl.program_id(0), tl.max(tl.abs(b_x)))


@triton.jit
def load_twiddle(p_twiddle, o_k1, o_m, K1, m_k1, SIDE: tl.constexpr):
    """w_N^(m k1) as the product of those of the multiple of SIDE in m and of the rest: the tables stay small."""
    p_high = p_twiddle + o_k1 * SIDE + o_m // SIDE
    p_low = p_twiddle + (2 * K1 + o_k1) * SIDE + o_m % SIDE
    b_hr = tl.load(p_high, mask=m_k1, other=0.0)
    b_hi = tl.load(p_high + K1 * SIDE, mask=m_k1, other=0.0)
    b_lr = tl.load(p_low, mask=m_k1, other=0.0)
    b_li = tl.load(p_low + K1 * SIDE, mask=m_k1, other=0.0)
    return b_hr * b_lr - b_hi * b_li, b_hr * b_li + b_hi * b_lr


@triton.jit
def outer_fwd_kernel(
    p_u, p_pre, p_scale, p_table, p_twiddle, p_ar, p_ai, D, T, R, K1,
    u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, FACTOR,
    M: tl.constexpr, SIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A[k1, m] * FACTOR / scale of BK rows and BM columns of one sequence; grid [B * D * M / BM * ceil(K1 / BK)]."""
    i_blocks = tl.cdiv(K1, BK)
    i_k = tl.program_id(0) % i_blocks
    i_m = (tl.program_id(0) // i_blocks) % (M // BM)
    i_r = tl.program_id(0) // (i_blocks * (M // BM))
    o_m = i_m * BM + tl.arange(0, BM)
    o_k = i_k * BK + tl.arange(0, BK)
    if p_scale is not None:
        b_inverse = 1.0 / tl.load(p_scale + i_r)
    b_ar = tl.zeros((BK, BM), dtype=tl.float32)
    b_ai = tl.zeros((BK, BM), dtype=tl.float32)
    for i_n in range(0, R, BR):
        o_n = i_n + tl.arange(0, BR)
        o_t = o_n[:, None] * M + o_m[None, :]
        b_x = load_gated(
            p_u, p_pre, i_r // D, i_r % D, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d,
            o_t, (o_n[:, None] < R) & (o_t < T),
        )  # fmt: skip
        if p_scale is not None:
            b_x *= b_inverse
        m_f = (o_k[:, None] < K1) & (o_n[None, :] < R)
        p_f = p_table + o_k[:, None] * R + o_n[None, :]
        b_ar = dot(tl.load(p_f, mask=m_f, other=0.0), b_x, b_ar, PRECISION, UPCAST)
        b_ai = dot(tl.load(p_f + K1 * R, mask=m_f, other=0.0), b_x, b_ai, PRECISION, UPCAST)
    o_a = (tl.cast(i_r, tl.int64) * K1 + o_k[:, None]) * M + o_m[None, :]
    m_a = o_k[:, None] < K1
    b_tr, b_ti = load_twiddle(p_twiddle, o_k[:, None], o_m[None, :], K1, m_a, SIDE)
    b_ar *= FACTOR
    b_ai *= FACTOR
    tl.store(p_ar + o_a, (b_ar * b_tr - b_ai * b_ti).to(p_ar.dtype.element_ty), mask=m_a)
    tl.store(p_ai + o_a, (b_ar * b_ti + b_ai * b_tr).to(p_ai.dtype.element_ty), mask=m_a)


@triton.jit
def outer_inverse_kernel(
    p_zr, p_zi, p_u, p_pre, p_post, p_skip, p_scale, p_kscale, p_table, p_y, D, T, R, K1,
    u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d, FACTOR,
    M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """post * (FACTOR * scale * kscale * sum_k1 + skip * pre * u), BR rows n1 and BM columns of one sequence."""
    i_blocks = tl.cdiv(R, BR)
    i_n = tl.program_id(0) % i_blocks
    i_m = (tl.program_id(0) // i_blocks) % (M // BM)
    i_r = tl.program_id(0) // (i_blocks * (M // BM))
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BR + tl.arange(0, BR)
    b_y = tl.zeros((BR, BM), dtype=tl.float32)
    for i_k in range(0, K1, BK):
        o_k = i_k + tl.arange(0, BK)
        o_z = (tl.cast(i_r, tl.int64) * K1 + o_k[:, None]) * M + o_m[None, :]
        m_z = o_k[:, None] < K1
        m_f = (o_n[:, None] < R) & (o_k[None, :] < K1)
        p_f = p_table + o_n[:, None] * K1 + o_k[None, :]
        b_zr = tl.load(p_zr + o_z, mask=m_z, other=0.0)
        b_zi = tl.load(p_zi + o_z, mask=m_z, other=0.0)
        b_y = dot(tl.load(p_f, mask=m_f, other=0.0), b_zr, b_y, PRECISION, UPCAST)
        b_y = dot(tl.load(p_f + K1 * R, mask=m_f, other=0.0), b_zi, b_y, PRECISION, UPCAST)
    b_y *= FACTOR * tl.load(p_kscale + i_r % D)
    if p_scale is not None:
        b_y *= tl.load(p_scale + i_r)
    o_t = o_n[:, None] * M + o_m[None, :]
    m_t = (o_n[:, None] < R) & (o_t < T)
    store_row(
        b_y, p_y, p_u, p_pre, p_post, p_skip, i_r // D, i_r % D, D, T,
        u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d, o_t, m_t,
    )  # fmt: skip


@triton.jit
def inner_fwd_kernel(
    p_ar, p_ai, p_kr, p_ki, p_twiddle, p_tables, B, D, K1,
    SIDE: tl.constexpr, CONJ: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Row A[k1] becomes Z[k1], in place; grid [D * K1 * B], the sequences that share a row of the filter next to each other."""
    i_b = tl.program_id(0) % B
    i_k1 = (tl.program_id(0) // B) % K1
    i_d = tl.program_id(0) // (B * K1)
    o_s = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    o_a = ((tl.cast(i_b, tl.int64) * D + i_d) * K1 + i_k1) * (SIDE * SIDE) + o_s
    b_xr, b_xi = transform(
        tl.load(p_ar + o_a), tl.load(p_ai + o_a), p_tables, SIDE, SIDE, SIDE, PRECISION, UPCAST
    )  # fmt: skip
    o_k = (tl.cast(i_d, tl.int64) * K1 + i_k1) * (SIDE * SIDE) + o_s
    b_kr = tl.load(p_kr + o_k).to(tl.float32)
    b_ki = tl.load(p_ki + o_k).to(tl.float32)
    if CONJ:
        b_ki = -b_ki
    b_yr = b_xr * b_kr - b_xi * b_ki
    b_yi = b_xr * b_ki + b_xi * b_kr
    tl.debug_barrier()  # tables and twiddles are loaded again, not kept in registers
    b_yr, b_yi = inverse_transform(b_yr, b_yi, p_tables, SIDE, SIDE, SIDE, PRECISION, UPCAST)
    b_tr, b_ti = load_twiddle(p_twiddle, i_k1, o_s, K1, o_s >= 0, SIDE)
    tl.store(p_ar + o_a, (b_yr * b_tr + b_yi * b_ti).to(p_ar.dtype.element_ty))
    tl.store(p_ai + o_a, (b_yi * b_tr - b_yr * b_ti).to(p_ai.dtype.element_ty))


@triton.jit
def inner_filter_bwd_kernel(
    p_xr, p_xi, p_gr, p_gi, p_xscale, p_gscale, p_tables, p_dkr, p_dki, B, D, K1,
    SIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum over the batch of conj(X[k1]) G[k1]; grid [D * K1]. X waits for G in place of its row, the sums in p_dkr, p_dki."""
    i_k1 = tl.program_id(0) % K1
    i_d = tl.program_id(0) // K1
    o_s = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    o_k = tl.cast(tl.program_id(0), tl.int64) * (SIDE * SIDE) + o_s
    for i_b in range(B):
        i_r = tl.cast(i_b, tl.int64) * D + i_d
        o_a = (i_r * K1 + i_k1) * (SIDE * SIDE) + o_s
        b_xr, b_xi = transform(
            tl.load(p_xr + o_a), tl.load(p_xi + o_a), p_tables, SIDE, SIDE, SIDE, PRECISION, UPCAST
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(p_xr + o_a, b_xr.to(p_xr.dtype.element_ty))
        tl.store(p_xi + o_a, b_xi.to(p_xi.dtype.element_ty))
        tl.debug_barrier()
        b_gr, b_gi = transform(
            tl.load(p_gr + o_a), tl.load(p_gi + o_a), p_tables, SIDE, SIDE, SIDE, PRECISION, UPCAST
        )  # fmt: skip
        b_xr = tl.load(p_xr + o_a).to(tl.float32)
        b_xi = tl.load(p_xi + o_a).to(tl.float32)
        b_dkr = b_xr * b_gr + b_xi * b_gi
        b_dki = b_xr * b_gi - b_xi * b_gr
        if p_xscale is not None:
            b_dkr = b_dkr * tl.load(p_xscale + i_r) * tl.load(p_gscale + i_r)
            b_dki = b_dki * tl.load(p_xscale + i_r) * tl.load(p_gscale + i_r)
        if i_b > 0:
            b_dkr += tl.load(p_dkr + o_k)
            b_dki += tl.load(p_dki + o_k)
        tl.store(p_dkr + o_k, b_dkr)
        tl.store(p_dki + o_k, b_dki)


def outer_size(T: int, L: int) -> int:
    """N1: the smallest power of two >= 2 with N1 * 4096 >= T + min(L, T) - 1."""
    return max(2, 1 << (-(-(T + max(1, min(L, T)) - 1) // INNER) - 1).bit_length())


@lru_cache(maxsize=64)
def outer_tables(N1: int, R: int, precision: Precision, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Forward [2, N1/2+1, R] cos, -sin; inverse [2, R, N1/2+1] v cos, -v sin; twiddle vectors [2, 2, N1/2+1, 64] float32."""
    K1 = N1 // 2 + 1
    k1 = torch.arange(K1)
    dtype = torch.float16 if precision == "fp16" else torch.float32

    def wave(steps: Tensor, order: int) -> Tensor:
        angles = (torch.outer(k1, steps) % order).double() * (2 * torch.pi / order)
        return torch.stack([angles.cos(), -angles.sin()])

    forward = wave(torch.arange(R), N1)
    weight = torch.where((k1 == 0) | (k1 == N1 // 2), 1.0, 2.0).double()
    inverse = (forward * weight[:, None]).transpose(1, 2).contiguous()
    twiddle = torch.stack([wave(torch.arange(SIDE) * step, N1 * INNER) for step in (SIDE, 1)])
    return forward.to(device, dtype), inverse.to(device, dtype), twiddle.to(device, torch.float32)


def two_level_spectrum(k: Tensor, N1: int, precision: Precision) -> FilterSpectrum:
    """Spectrum of k [D, L <= N1 * 4096], rows k1 <= N1/2: real, imag [D, N1/2+1, 64, 64], scale [D]; torch.fft in float32."""
    N = N1 * INNER
    blocks = []
    for part in k.split(max(1, SPECTRUM_ELEMENTS // N)):
        half = torch.fft.fft(part.float(), n=N).unflatten(-1, (INNER, N1))[..., : N1 // 2 + 1]
        blocks.append(permute_spectrum(half.transpose(-1, -2), SIDE, SIDE, precision))
    return FilterSpectrum(*(torch.cat(parts) for parts in zip(*blocks)))


def _block(size: int) -> int:
    return min(64, max(16, 1 << (size - 1).bit_length()))


def _outer_warps(precision: Precision) -> int:
    return 8 if precision == "ieee" else 4


def _half(N1: int) -> int:
    """h: the outer sums are divided by 2^h >= sqrt(N1)."""
    return N1.bit_length() // 2


def _outer(u: Tensor, pre: Tensor | None, N1: int, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """A / 2^h / scale [2, B, D, N1/2+1, 4096] and scale [B, D], which is None unless fp16."""
    B, D, T = u.shape
    R, K1 = -(-T // INNER), N1 // 2 + 1
    scale = None
    if precision == "fp16":
        chunks = -(-T // CHUNK)
        largest = torch.empty(B * D, chunks, dtype=torch.float32, device=u.device)
        row_max_kernel[(B * D * chunks,)](u, pre, largest, D, T, *strides(u, pre), CHUNK=CHUNK)
        scale = (largest.amax(1).view(torch.int32) & 0x7F800000).clamp(0x00800000, 0x7E800000).view(torch.float32)
    a = torch.empty(2, B, D, K1, INNER, dtype=torch.float16 if precision == "fp16" else torch.float32, device=u.device)
    BK, BR = _block(K1), _block(R)
    table, _, twiddle = outer_tables(N1, R, precision, u.device)
    outer_fwd_kernel[(B * D * (INNER // COLUMNS) * -(-K1 // BK),)](
        u, pre, scale, table, twiddle, a[0], a[1], D, T, R, K1, *strides(u, pre), 0.5 ** _half(N1),
        M=INNER, SIDE=SIDE, BM=COLUMNS, BK=BK, BR=BR, PRECISION=precision, UPCAST=is_interpreted(),
        num_warps=_outer_warps(precision),
    )  # fmt: skip
    return a, scale


def _convolve(
    u: Tensor, k: Tensor, skip: Tensor | None, pre: Tensor | None, post: Tensor | None, precision: Precision, conj: bool
) -> Tensor:
    check_precision("two_level", precision)
    B, D, T = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    N1 = outer_size(T, k.shape[-1])
    R, K1 = -(-T // INNER), N1 // 2 + 1
    spectrum = two_level_spectrum(k[:, :T], N1, precision)
    u, pre, post = rows(u), None if pre is None else rows(pre), None if post is None else rows(post)
    _, table, twiddle = outer_tables(N1, R, precision, u.device)
    BK, BR = _block(K1), _block(R)
    with torch.cuda.device_of(u):
        a, scale = _outer(u, pre, N1, precision)
        inner_fwd_kernel[(D * K1 * B,)](
            a[0], a[1], spectrum.real, spectrum.imag, twiddle, tables(SIDE, SIDE, precision, u.device), B, D, K1,
            SIDE=SIDE, CONJ=conj, PRECISION=precision, UPCAST=is_interpreted(),
            num_warps=num_warps(INNER, precision), num_stages=1,
        )  # fmt: skip
        outer_inverse_kernel[(B * D * (INNER // COLUMNS) * -(-R // BR),)](
            a[0], a[1], u, pre, post, skip, scale, spectrum.scale, table, y, D, T, R, K1, *strides(u, pre, post),
            2.0 ** _half(N1) / N1, M=INNER, BM=COLUMNS, BK=BK, BR=BR, PRECISION=precision, UPCAST=is_interpreted(),
            num_warps=_outer_warps(precision),
        )  # fmt: skip
    return y


def two_level_forward(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """y = post_gate * (k (*) x + skip * x), x = pre_gate * u, for any T and L.

    Shapes:   u, gates [B, D, T], any strides; k [D, L]; skip [D]; returns y [B, D, T], contiguous.
    Dtypes:   u, gates float32, bfloat16, float16; y in u.dtype.
    Traffic:  u and pre_gate once, once more with a skip and once more in fp16; post_gate and y once; A and Z written and read,
              16 bytes per element of the padded half in fp16, else 32; the filter's spectrum once per channel.
    """
    return _convolve(u, k, skip, pre_gate, post_gate, precision, conj=False)


def two_level_input_gradient(
    dy: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """du = pre_gate * (corr(g, k) + skip * g), g = post_gate * dy, corr(g, k)[t] = sum_s k[s] g[t + s].

    Shapes, dtypes, traffic and gates as in two_level_forward. Without pre_gate it is the gradient of x = pre_gate * u.
    """
    return _convolve(dy, k, skip, post_gate, pre_gate, precision, conj=True)


def two_level_filter_gradient(
    dy: Tensor, u: Tensor, L: int, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """dk[d, s] = sum over b, t of (post_gate * dy)[t] (pre_gate * u)[t - s]: float32 [D, L], zero beyond T.

    Traffic:  as two forward transforms, and the summed half spectrum, 8 bytes per point. One program sums a row over the batch:
              no atomics, the same bits every time. The inverse is torch.fft in float32.
    """
    check_precision("two_level", precision)
    B, D, T = u.shape
    taps = min(L, T)
    dk = torch.zeros(D, L, dtype=torch.float32, device=u.device)
    if u.numel() == 0 or taps == 0:
        return dk
    N1 = outer_size(T, L)
    K1 = N1 // 2 + 1
    dy, u = rows(dy), rows(u)
    pre, post = None if pre_gate is None else rows(pre_gate), None if post_gate is None else rows(post_gate)
    half = torch.empty(2, D, K1, SIDE, SIDE, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        x, x_scale = _outer(u, pre, N1, precision)
        g, g_scale = _outer(dy, post, N1, precision)
        inner_filter_bwd_kernel[(D * K1,)](
            x[0], x[1], g[0], g[1], x_scale, g_scale, tables(SIDE, SIDE, precision, u.device), half[0], half[1],
            B, D, K1, SIDE=SIDE, PRECISION=precision, UPCAST=is_interpreted(),
            num_warps=num_warps(INNER, precision), num_stages=1,
        )  # fmt: skip
    del x, g
    width = max(1, SPECTRUM_ELEMENTS // (N1 * INNER))
    for start in range(0, D, width):
        real, imag = half[:, start : start + width].transpose(-1, -2).flatten(-2)
        own = torch.complex(real, imag) * float(SIDE << _half(N1)) ** 2  # [d, k1, k2]
        mirrored = own[:, 1 : N1 // 2].flip(1, 2).conj_physical()  # row N1 - k1 at N - k
        spectrum = torch.cat([own, mirrored], dim=1).transpose(1, 2).flatten(1)[:, : N1 * INNER // 2 + 1]
        dk[start : start + width, :taps] = torch.fft.irfft(spectrum, n=N1 * INNER)[:, :taps]
    return dk
