"""Fused FFT convolution for sequences that fit on chip: order-2 Monarch transforms as matrix products, in Triton.

The transform.  N = N1 N2, n = n1 N2 + n2, k = k1 + N1 k2, w_M = exp(-2 pi i / M):

    X[k1, k2] = sum_n2 w_N2^(n2 k2) * w_N^(n2 k1) * sum_n1 w_N1^(n1 k1) x[n1, n2]

so a row of N numbers is an [N1, N2] matrix between two small DFT matrices, with a twiddle after the first. The spectrum stays
in the order [k1, k2]; the filter's spectrum is put in that order once, and the inverse walks the same way back.

Two rows at once.  Filters are real, so z = x_a + i x_b goes through as one complex row: y_a is the real part of the result, y_b
the imaginary part. Every row is first multiplied by a power of two that brings its largest element into [1, 2), and divided by
it at the end; both are exact. So float16 operands neither overflow nor sink, and a loud row leaks no rounding into its quiet
partner. A NaN or an infinity in one row of a pair does reach the other.

The factor 1/N is divided, 1/N1 into each twiddle and the rest at the end: rows and spectrum in [1, 2), no operand exceeds 8 N2.

Measured in the interpreter and an emulation of bfloat16 (its TF32 is float32), normal noise, relative L2 error against float64:
ieee 3e-7, bf16x3 7e-6, fp16 6e-4. Machine code: no spills in the fp16 forward, at most 64 kB of shared memory (8192: 72 kB).

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
Reference: FlashFFTConv, Fu et al. 2023, arXiv:2311.05908.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.environment import is_interpreted

Precision = Literal["fp16", "tf32", "bf16x3", "ieee"]
"""Operands of the matrix products: float16, TF32, two bfloat16 halves (three products), float32. Sums are always float32."""

FACTORS = {1024: (32, 32), 4096: (64, 64), 8192: (128, 64)}
"""Padded size: (N1, N2). 8192 in fp16 only: no other operands of that size fit on chip without much spilling."""

FILTER_PROGRAMS = 1024
"""Programs of a filter gradient, about: several waves of any GPU, and a bound on its scratch memory."""


class FilterSpectrum(NamedTuple):
    """A filter's transform in the order of the kernels: scale * (real + i imag)."""

    real: Tensor
    """[D, N1, N2], float16 in fp16, else float32."""
    imag: Tensor
    scale: Tensor
    """[D] float32, powers of two: largest |real|, |imag| of a channel in [1, 2)."""


@triton.jit
def power_of_two(i_e):
    """2^i_e as float32 for -126 <= i_e <= 127, exact; smaller exponents give 2^-126."""
    return ((tl.maximum(i_e, -126) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent(b_x):
    """The integer e of 2^e <= max |b_x| < 2^(e+1), within [-126, 126] so that 2^e and 2^-e are both normal numbers."""
    b_bits = tl.max(tl.abs(b_x)).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((b_bits >> 23) - 127, -126), 126)


@triton.jit
def bfloat16_half(b_x, UPCAST: tl.constexpr):
    """b_x rounded to bfloat16. UPCAST: the same numbers in float32: the interpreter neither rounds nor multiplies bfloat16."""
    if UPCAST:
        b_bits = b_x.to(tl.int32, bitcast=True)
        return ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - the compiler wants both branches
        return b_x.to(tl.bfloat16)


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """b_acc + b_a b_b with float32 accumulation."""
    if PRECISION == "fp16":
        b_c = tl.dot(b_a.to(tl.float16), b_b.to(tl.float16), b_acc)
    elif PRECISION == "bf16x3":
        if not UPCAST:  # keeps the compiler from splitting every element once per warp
            b_b = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_b], dtype=tl.float32, is_pure=False, pack=1)
        b_a_high = bfloat16_half(b_a, UPCAST)
        b_b_high = bfloat16_half(b_b, UPCAST)
        b_c = tl.dot(bfloat16_half(b_a - b_a_high.to(tl.float32), UPCAST), b_b_high, b_acc, input_precision="ieee")
        b_c = tl.dot(b_a_high, bfloat16_half(b_b - b_b_high.to(tl.float32), UPCAST), b_c, input_precision="ieee")
        b_c = tl.dot(b_a_high, b_b_high, b_c, input_precision="ieee")
    else:
        b_c = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    return b_c


@triton.jit
def complex_dot(b_ar, b_ai, b_br, b_bi, CONJ: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b, conj(a) b (CONJ 1) or a conj(b) (CONJ 2). Signs go into the accumulators: operands stand in shared memory once."""
    b_zero = tl.zeros((b_ar.shape[0], b_br.shape[1]), dtype=tl.float32)
    b_cr = dot(b_ai, b_bi, b_zero, PRECISION, UPCAST)
    if CONJ == 0:
        b_cr = -b_cr
    b_cr = dot(b_ar, b_br, b_cr, PRECISION, UPCAST)
    if CONJ == 1:
        b_ci = dot(b_ar, b_bi, -dot(b_ai, b_br, b_zero, PRECISION, UPCAST), PRECISION, UPCAST)
    else:
        b_ci = dot(b_ar, b_bi, b_zero, PRECISION, UPCAST)
        if CONJ == 2:
            b_ci = -b_ci
        b_ci = dot(b_ai, b_br, b_ci, PRECISION, UPCAST)
    return b_cr, b_ci


@triton.jit
def load_matrix(p_table, o_row, o_column, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Rows and columns of the real and imaginary matrices, SIZE elements each, that begin at p_table."""
    p_matrix = p_table + o_row[:, None] * COLUMNS + o_column[None, :]
    return tl.load(p_matrix), tl.load(p_matrix + SIZE)


@triton.jit
def load_twiddle(p_tables, N1: tl.constexpr, N2: tl.constexpr):
    """w_N^(n2 k1) / N1 as [k1, n2] float32."""
    START: tl.constexpr = 2 * N1 * N1 if N1 == N2 else 2 * N1 * N1 + 2 * N2 * N2
    b_tr, b_ti = load_matrix(p_tables + START, tl.arange(0, N1), tl.arange(0, N2), N2, N1 * N2)
    return b_tr.to(tl.float32) * (1.0 / N1), b_ti.to(tl.float32) * (1.0 / N1)


@triton.jit
def transform(
    b_xr, b_xi, p_tables,
    N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BR, N2] rows n1 < BR of a complex row, the others zero -> its spectrum / N1 in the order [k1, k2], float32 [N1, N2]."""
    b_fr, b_fi = load_matrix(p_tables, tl.arange(0, N1), tl.arange(0, BR), N1, N1 * N1)
    b_ar, b_ai = complex_dot(b_fr, b_fi, b_xr, b_xi, 0, PRECISION, UPCAST)
    b_tr, b_ti = load_twiddle(p_tables, N1, N2)
    b_cr = b_ar * b_tr - b_ai * b_ti
    b_ci = b_ar * b_ti + b_ai * b_tr
    o_2 = tl.arange(0, N2)
    b_fr, b_fi = load_matrix(p_tables + (0 if N1 == N2 else 2 * N1 * N1), o_2, o_2, N2, N2 * N2)
    return complex_dot(b_cr, b_ci, b_fr, b_fi, 0, PRECISION, UPCAST)


@triton.jit
def inverse_transform(
    b_yr, b_yi, p_tables,
    N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The way back from the order [k1, k2]: N / N1 times the inverse transform, its first BR rows n1, float32 [BR, N2]."""
    o_2 = tl.arange(0, N2)
    b_fr, b_fi = load_matrix(p_tables + (0 if N1 == N2 else 2 * N1 * N1), o_2, o_2, N2, N2 * N2)
    b_ar, b_ai = complex_dot(b_yr, b_yi, b_fr, b_fi, 2, PRECISION, UPCAST)
    b_tr, b_ti = load_twiddle(p_tables, N1, N2)
    b_cr = b_ar * b_tr + b_ai * b_ti
    b_ci = b_ai * b_tr - b_ar * b_ti
    b_fr, b_fi = load_matrix(p_tables, tl.arange(0, BR), tl.arange(0, N1), N1, N1 * N1)
    return complex_dot(b_fr, b_fi, b_cr, b_ci, 1, PRECISION, UPCAST)


@triton.jit
def load_gated(p_x, p_gate, i_b, i_d, x_stride_b, x_stride_d, gate_stride_b, gate_stride_d, o_t, m_t):
    """Elements o_t of row (i_b, i_d) times its gate, float32, zero outside the mask."""
    i_b = tl.cast(i_b, tl.int64)
    i_d = tl.cast(i_d, tl.int64)
    b_x = tl.load(p_x + i_b * x_stride_b + i_d * x_stride_d + o_t, mask=m_t, other=0.0).to(tl.float32)
    if p_gate is not None:
        b_x *= tl.load(p_gate + i_b * gate_stride_b + i_d * gate_stride_d + o_t, mask=m_t, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def store_row(
    b_y, p_y, p_u, p_pre, p_post, p_skip, i_b, i_d, D, T,
    u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d, o_t, m_t,
):  # fmt: skip
    """post * (b_y + skip * pre * u) into row (i_b, i_d) of the contiguous y."""
    if p_skip is not None:
        b_x = load_gated(p_u, p_pre, i_b, i_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, m_t)
        b_y += tl.load(p_skip + i_d).to(tl.float32) * b_x
    if p_post is not None:
        b_y *= load_gated(p_post, None, i_b, i_d, post_stride_b, post_stride_d, 0, 0, o_t, m_t)
    p_row = p_y + (tl.cast(i_b, tl.int64) * D + i_d) * T
    tl.store(p_row + o_t, b_y.to(p_y.dtype.element_ty), mask=m_t)


@triton.jit
def monarch_fwd_kernel(
    p_u, p_pre, p_post, p_skip, p_kr, p_ki, p_scale, p_tables, p_y, B, D, T,
    u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d,
    N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr,
    CONJ: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One pair of batch rows of one channel; grid [D * ceil(B / 2)], the pairs of a channel next to each other."""
    i_pairs = (B + 1) // 2
    i_d = tl.program_id(0) // i_pairs
    i_a = (tl.program_id(0) % i_pairs) * 2
    o_t = tl.arange(0, BR)[:, None] * N2 + tl.arange(0, N2)[None, :]
    m_a = o_t < T
    m_b = m_a & (i_a + 1 < B)
    b_xa = load_gated(p_u, p_pre, i_a, i_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, m_a)
    b_xb = load_gated(p_u, p_pre, i_a + 1, i_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, m_b)
    i_ea = exponent(b_xa)
    i_eb = exponent(b_xb)
    b_xa *= power_of_two(-i_ea)
    b_xb *= power_of_two(-i_eb)

    b_zr, b_zi = transform(b_xa, b_xb, p_tables, N1, N2, BR, PRECISION, UPCAST)
    o_k = tl.cast(i_d, tl.int64) * (N1 * N2) + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    b_kr = tl.load(p_kr + o_k).to(tl.float32)
    b_ki = tl.load(p_ki + o_k).to(tl.float32)
    if CONJ:
        b_ki = -b_ki
    b_yr = b_zr * b_kr - b_zi * b_ki
    b_yi = b_zr * b_ki + b_zi * b_kr
    tl.debug_barrier()  # the tables are loaded again, not kept in registers
    b_yr, b_yi = inverse_transform(b_yr, b_yi, p_tables, N1, N2, BR, PRECISION, UPCAST)

    b_scale = tl.load(p_scale + i_d) * (N1 / N2)
    store_row(
        b_yr * b_scale * power_of_two(i_ea), p_y, p_u, p_pre, p_post, p_skip, i_a, i_d, D, T,
        u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d, o_t, m_a,
    )  # fmt: skip
    store_row(
        b_yi * b_scale * power_of_two(i_eb), p_y, p_u, p_pre, p_post, p_skip, i_a + 1, i_d, D, T,
        u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, post_stride_b, post_stride_d, o_t, m_b,
    )  # fmt: skip


@triton.jit
def monarch_filter_bwd_kernel(
    p_dy, p_post, p_u, p_pre, p_tables, p_xr, p_xi, p_dkr, p_dki, B, D, T, P,
    dy_stride_b, dy_stride_d, post_stride_b, post_stride_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d,
    N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum of conj(X) G over every P-th pair of one channel, X of x = pre * u and G of g = post * dy; grid [D * P].

    The real part of the inverse is corr(g_a, x_a) + corr(g_b, x_b); the cross terms are imaginary. To be summed the two need
    one scale: x_a and x_b are brought to [1, 2), g_a and g_b take the inverse factors and a common one. X waits for G in
    p_xr, p_xi (cache) and the sums in p_dkr, p_dki: two spectra at once would not fit into the registers.
    """
    i_d = tl.program_id(0) // P
    i_p = tl.program_id(0) % P
    o_t = tl.arange(0, BR)[:, None] * N2 + tl.arange(0, N2)[None, :]
    o_k = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    o_k += (tl.cast(i_p, tl.int64) * D + i_d) * (N1 * N2)
    for i_a in range(i_p * 2, B, P * 2):
        m_a = o_t < T
        m_b = m_a & (i_a + 1 < B)
        b_xa = load_gated(p_u, p_pre, i_a, i_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, m_a)
        b_xb = load_gated(p_u, p_pre, i_a + 1, i_d, u_stride_b, u_stride_d, pre_stride_b, pre_stride_d, o_t, m_b)
        i_xa = exponent(b_xa)
        i_xb = exponent(b_xb)
        b_xa *= power_of_two(-i_xa)
        b_xb *= power_of_two(-i_xb)
        b_xr, b_xi = transform(b_xa, b_xb, p_tables, N1, N2, BR, PRECISION, UPCAST)
        tl.store(p_xr + o_k, b_xr)
        tl.store(p_xi + o_k, b_xi)
        tl.debug_barrier()
        b_ga = load_gated(p_dy, p_post, i_a, i_d, dy_stride_b, dy_stride_d, post_stride_b, post_stride_d, o_t, m_a)
        b_gb = load_gated(p_dy, p_post, i_a + 1, i_d, dy_stride_b, dy_stride_d, post_stride_b, post_stride_d, o_t, m_b)
        i_ga = exponent(b_ga)
        i_gb = exponent(b_gb)
        i_e = tl.maximum(i_xa + i_ga, i_xb + i_gb)
        b_ga = b_ga * power_of_two(-i_ga) * power_of_two(i_xa + i_ga - i_e)
        b_gb = b_gb * power_of_two(-i_gb) * power_of_two(i_xb + i_gb - i_e)
        b_gr, b_gi = transform(b_ga, b_gb, p_tables, N1, N2, BR, PRECISION, UPCAST)
        b_xr = tl.load(p_xr + o_k)
        b_xi = tl.load(p_xi + o_k)
        i_half = i_e >> 1
        b_scale = power_of_two(i_half)
        b_other = power_of_two(i_e - i_half)
        b_dkr = (b_xr * b_gr + b_xi * b_gi) * b_scale * b_other
        b_dki = (b_xr * b_gi - b_xi * b_gr) * b_scale * b_other
        if i_a > i_p * 2:
            b_dkr += tl.load(p_dkr + o_k)
            b_dki += tl.load(p_dki + o_k)
        tl.store(p_dkr + o_k, b_dkr)
        tl.store(p_dki + o_k, b_dki)


def check_precision(name: str, precision: str) -> None:
    if precision not in ("fp16", "tf32", "bf16x3", "ieee"):
        raise ValueError(f"{name}: precision must be 'fp16', 'tf32', 'bf16x3' or 'ieee'; got {precision!r}.")


def padded_size(T: int, L: int, precision: Precision) -> int:
    """The smallest size of FACTORS that holds T + min(L, T) - 1 numbers."""
    check_precision("monarch", precision)
    need = T + max(1, min(L, T)) - 1
    sizes = [size for size in FACTORS if size >= need and (size <= 4096 or precision == "fp16")]
    if not sizes:
        limit = 8192 if precision == "fp16" else 4096
        raise ValueError(
            f"monarch: T + min(L, T) - 1 must be <= {limit} in {precision}; got T={T}, L={L}. Use the two-level transform."
        )
    return sizes[0]


@lru_cache(maxsize=32)
def tables(N1: int, N2: int, precision: Precision, device: torch.device) -> Tensor:
    """F_N1, F_N2 (left out if N1 = N2) and w_N^(n2 k1), real then imaginary parts each; rounded once from float64."""
    shapes = [(N1, N1, N1)] + ([] if N1 == N2 else [(N2, N2, N2)]) + [(N1, N2, N1 * N2)]
    parts = []
    for rows, columns, order in shapes:
        turns = torch.outer(torch.arange(rows), torch.arange(columns)) % order
        angles = turns.double() * (-2 * torch.pi / order)
        parts += [angles.cos().flatten(), angles.sin().flatten()]
    return torch.cat(parts).to(device, torch.float16 if precision == "fp16" else torch.float32)


def permute_spectrum(spectrum: Tensor, N1: int, N2: int, precision: Precision) -> FilterSpectrum:
    """Complex [D, ..., N1 * N2] in natural order -> [D, ..., N1, N2] with k = k1 + N1 k2, one power of two per D split off."""
    parts = torch.view_as_real(spectrum.unflatten(-1, (N2, N1)).transpose(-1, -2).contiguous())
    largest = parts.flatten(1).abs().amax(1) if parts.numel() else parts.new_ones(len(parts))
    scale = (largest.view(torch.int32) & 0x7F800000).clamp(0x00800000, 0x7F000000).view(torch.float32)
    parts = parts / scale.view(-1, *[1] * (parts.ndim - 1))
    real, imag = (
        parts[..., i].to(torch.float16 if precision == "fp16" else torch.float32).contiguous() for i in (0, 1)
    )
    return FilterSpectrum(real, imag, scale)


def filter_spectrum(k: Tensor, N: int, precision: Precision) -> FilterSpectrum:
    """Spectrum of k [D, L <= N] padded to N, by torch.fft in float32, in the order of the kernels."""
    N1, N2 = FACTORS[N]
    return permute_spectrum(torch.fft.fft(k.float(), n=N), N1, N2, precision)


def rows(x: Tensor) -> Tensor:
    """x with neighbouring elements along the last dim: the kernels take any other strides."""
    if x.dtype == torch.float64:
        raise ValueError("monarch: u, dy and gates must be float32, bfloat16 or float16; got torch.float64.")
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*inputs: Tensor | None) -> list[int]:
    """Batch and channel strides of each, zeros for None."""
    return [x.stride(dim) if x is not None else 0 for x in inputs for dim in (0, 1)]


def num_warps(N: int, precision: Precision) -> int:
    """Warps without spills or nearly so: 64 rows are four warps' worth of tensor cores."""
    return 8 if N == 8192 or precision == "ieee" or (N == 4096 and precision == "bf16x3") else 4


def _sizes(T: int, N: int) -> dict[str, int]:
    N1, N2 = FACTORS[N]
    return {"N1": N1, "N2": N2, "BR": N1 // 2 if 2 * T <= N else N1}


def _convolve(
    u: Tensor, k: Tensor, skip: Tensor | None, pre: Tensor | None, post: Tensor | None, precision: Precision, conj: bool
) -> Tensor:
    B, D, T = u.shape
    N = padded_size(T, k.shape[-1], precision)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    spectrum = filter_spectrum(k[:, :T], N, precision)
    u, pre, post = rows(u), None if pre is None else rows(pre), None if post is None else rows(post)
    with torch.cuda.device_of(u):
        monarch_fwd_kernel[(D * ((B + 1) // 2),)](
            u, pre, post, skip, *spectrum, tables(*FACTORS[N], precision, u.device), y, B, D, T, *strides(u, pre, post),
            **_sizes(T, N), CONJ=conj, PRECISION=precision, UPCAST=is_interpreted(),
            num_warps=num_warps(N, precision), num_stages=1,
        )  # fmt: skip
    return y


def monarch_forward(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """y = post_gate * (k (*) x + skip * x), x = pre_gate * u, for T + min(L, T) - 1 <= 4096 (8192 in fp16).

    Shapes:   u, gates [B, D, T], any strides; k [D, L]; skip [D]; returns y [B, D, T], contiguous.
    Dtypes:   u, gates float32, bfloat16, float16; y in u.dtype.
    Traffic:  u, gates and y once, the filter's spectrum (4 N bytes per channel in fp16, else 8 N) once per channel while the
              pairs of the channel find it in L2; tables of at most 96 kB from cache.
    """
    return _convolve(u, k, skip, pre_gate, post_gate, precision, conj=False)


def monarch_input_gradient(
    dy: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """du = pre_gate * (corr(g, k) + skip * g), g = post_gate * dy, corr(g, k)[t] = sum_s k[s] g[t + s].

    Shapes, dtypes, traffic and gates as in monarch_forward. Without pre_gate it is the gradient of x = pre_gate * u.
    """
    return _convolve(dy, k, skip, post_gate, pre_gate, precision, conj=True)


def monarch_filter_gradient(
    dy: Tensor, u: Tensor, L: int, pre_gate: Tensor | None, post_gate: Tensor | None, precision: Precision
) -> Tensor:
    """dk[d, s] = sum over b, t of (post_gate * dy)[t] (pre_gate * u)[t - s]: float32 [D, L], zero beyond T.

    Traffic:  dy, u and gates once; partial spectra and scratch of 16 N bytes per program, about FILTER_PROGRAMS or one per
              pair, whichever is less, summed by torch.sum: no atomics, the same bits every time.
    """
    B, D, T = u.shape
    taps = min(L, T)
    N = padded_size(T, L, precision)
    dk = torch.zeros(D, L, dtype=torch.float32, device=u.device)
    if u.numel() == 0 or taps == 0:
        return dk
    N1, N2 = FACTORS[N]
    P = min((B + 1) // 2, -(-FILTER_PROGRAMS // D))
    parts = torch.empty(4, P, D, N1, N2, dtype=torch.float32, device=u.device)
    dy, u = rows(dy), rows(u)
    pre, post = None if pre_gate is None else rows(pre_gate), None if post_gate is None else rows(post_gate)
    with torch.cuda.device_of(u):
        monarch_filter_bwd_kernel[(D * P,)](
            dy, post, u, pre, tables(N1, N2, precision, u.device), *parts.unbind(), B, D, T, P, *strides(dy, post, u, pre),
            **_sizes(T, N), PRECISION=precision, UPCAST=is_interpreted(), num_warps=num_warps(N, precision), num_stages=1,
        )  # fmt: skip
    real, imag = parts[2:].sum(dim=1).transpose(-1, -2).reshape(2, D, N)
    dk[:, :taps] = torch.fft.ifft(torch.complex(real, imag) * N1**2).real[:, :taps]
    return dk
