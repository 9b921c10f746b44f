"""The public face of the learned Monarch convolution: the factors, the checks, the choice of backend."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.kernels.monarch import ops, reference

Backend = Literal["auto", "torch", "reference"]
"""auto: torch on every device. torch: matrix products, block of channels by block. reference: the full matrices."""
MOST_UNBALANCED = 16
"""N1 / N2 at most: beyond it the factors are closer to a full matrix than to a fast transform."""


class MonarchFactors(NamedTuple):
    """One order-2 Monarch transform of n = N1 N2 points: two matrices [out, in] and what multiplies between them.

    Forward:  point n1 N2 + n2 to frequency k1 + N1 k2, through outer[k1, n1] twiddle[k1, n2] inner[k2, n2].
    Inverse:  the way back, through inner[n2, k2] twiddle[k1, n2] outer[n1, k1].
    Shapes:   complex; G is 1 (shared by all channels) or divides D (each for D / G neighbouring channels).
    """

    outer: Tensor  # [G, N1, N1]
    twiddle: Tensor  # [G, N1, N2]
    inner: Tensor  # [G, N2, N2]


def _split(size: int) -> tuple[int, int] | None:
    """(N1, N2) with N1 N2 = size and N1 >= N2 as near to each other as can be; None if that is too far."""
    N2 = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    N1 = size // N2
    return (N1, N2) if size == 1 or (N2 > 1 and N1 <= MOST_UNBALANCED * N2) else None


def _sizes(name: str, size: int) -> tuple[int, int]:
    check(name, isinstance(size, int) and size >= 1, "size must be an int >= 1", size)
    split = _split(size)
    if split is None:
        larger = next(n for n in range(size + 1, 2 * size + 4) if _split(n))
        must = f"size must be N1 N2 with N1 <= {MOST_UNBALANCED} N2 and N2 > 1, such as {larger}"
        raise ValueError(f"{name}: {must}; got {size}.")
    return split


def _roots(rows: int, columns: int, size: int, sign: int, device: torch.device | str | None) -> Tensor:
    """exp(sign 2 pi i j m / size) for j < rows, m < columns: angles reduced as whole numbers, so exact to rounding."""
    products = torch.arange(rows, device=device)[:, None] * torch.arange(columns, device=device)
    angles = (products % size).to(torch.float64) * (sign * 2 * math.pi / size)
    return torch.complex(angles.cos(), angles.sin())


def _factors(
    name: str, sign: int, size: int, groups: int, dtype: torch.dtype, device: torch.device | str | None
) -> MonarchFactors:
    N1, N2 = _sizes(name, size)
    check(name, isinstance(groups, int) and groups >= 1, "groups must be an int >= 1", groups)
    check(name, dtype in (torch.complex64, torch.complex128), "dtype must be complex64 or complex128", dtype)
    outer, inner = _roots(N1, N1, N1, sign, device), _roots(N2, N2, N2, sign, device)
    if sign > 0:
        outer, inner = outer / N1, inner / N2
    tables = (outer, _roots(N1, N2, size, sign, device), inner)
    return MonarchFactors(*(table.to(dtype).repeat(groups, 1, 1) for table in tables))


def dft_factors(
    size: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str | None = None,
) -> MonarchFactors:
    """The factors whose transform is the discrete Fourier transform of `size` points: where learning starts.

    Shapes:   outer [G, N1, N1], twiddle [G, N1, N2], inner [G, N2, N2] with G = groups, N1 N2 = size, N1 >= N2 as near to
              each other as the divisors of size allow.
    Dtypes:   complex64 or complex128, computed in float64.
    Raises:   ValueError if size is prime or N1 > 16 N2 (the message names the next size that does), if groups < 1, or if dtype
              is not complex.
    References: Dao et al. 2022, arXiv:2204.00595; the order-2 decomposition: Bailey 1990, J. Supercomputing 4.
    """
    return _factors("dft_factors", -1, size, groups, dtype, device)


def inverse_dft_factors(
    size: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str | None = None,
) -> MonarchFactors:
    """The factors of the inverse transform: 1 / N1 is in outer and 1 / N2 in inner. All else as in `dft_factors`."""
    return _factors("inverse_dft_factors", 1, size, groups, dtype, device)


def _check_factors(name: str, what: str, factors: MonarchFactors, D: int, device: torch.device) -> None:
    twiddle = factors.twiddle
    must = "{} must be [G, N1, N2], G, N1, N2 >= 1"
    check(name, twiddle.ndim == 3 and min(twiddle.shape) >= 1, must, twiddle.shape, f"{what}.twiddle")
    G, N1, N2 = twiddle.shape
    check_shape(name, f"{what}.outer", factors.outer, "[G, N1, N1]", G, N1, N1)
    check_shape(name, f"{what}.inner", factors.inner, "[G, N2, N2]", G, N2, N2)
    check(name, D % G == 0, "{} [G, N1, N2] needs G dividing D={}", twiddle.shape, f"{what}.twiddle", D)
    for field, x in factors._asdict().items():
        complex_ = x.dtype in (torch.complex64, torch.complex128)
        check(name, complex_, "{}.{} must be complex64 or complex128", x.dtype, what, field)
        check(name, x.device == device, "{}.{} must be on {}, like u", x.device, what, field, device)


def monarch_conv(
    u: Tensor,
    k: Tensor,
    forward: MonarchFactors,
    inverse: MonarchFactors,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Convolution by learned transforms: y = post_gate * (Re(Minv (M x * M k))[:T] + skip * x), x = pre_gate * u, zero-padded.

    Shapes:   u, pre_gate, post_gate [B, D, T]; k [D, L] or [B, D, L]; skip [D]; forward (M) and inverse (Minv) of the same
              N1, N2, with T + L - 1 <= n = N1 N2; the G of each is 1 or one divisor of D. Returns y [B, D, T]. Any T >= 0.
    Dtypes:   u, k, skip, gates float64, float32, bfloat16 or float16; factors complex64 or complex128. Arithmetic is double
              if any argument is, else single; y in u.dtype. On a GPU products of float32 follow torch.backends.cuda.matmul.
    Memory:   saves the arguments; a few spectra of one block of channels at a time, which the backward computes again.
              O(n (N1 + N2)) multiply-adds a row of u or k, and padding rows are left out of the outer products; the backward
              does about three times as much. Second derivatives hold the spectra of all channels at once.
    State:    none. With the DFT, y is the causal convolution. Learned transforms are neither causal nor shift-invariant:
              y[t] depends on all of x, and the sequence cannot be cut.
    Exact to: reference.monarch_conv within 1e-12 relative in float64, and so to long_conv with DFT factors. Any order of
              derivative; torch.compile traces it whole.
    Raises:   ValueError if shapes, dtypes or devices do not fit, n is too small, or the backend is unknown.
    References: Fu et al. 2023, arXiv:2302.06646 (learned butterfly matrices in place of the DFT); Dao et al. 2022,
              arXiv:2204.00595 (Monarch matrices).
    """
    name = "monarch_conv"
    check(name, backend in ("auto", "torch", "reference"), "backend must be 'auto', 'torch' or 'reference'", backend)
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    B, D, T = u.shape
    fits = k.ndim in (2, 3) and k.shape[-1] >= 1 and k.shape[:-1] == u.shape[3 - k.ndim : 2]
    check(name, fits, "k must be [D, L] or [B, D, L] with B, D = {}, {}, L >= 1", k.shape, B, D)
    check_shape(name, "skip", skip, "[D]", D)
    check_shape(name, "pre_gate", pre_gate, "[B, D, T]", B, D, T)
    check_shape(name, "post_gate", post_gate, "[B, D, T]", B, D, T)
    check_floats(name, u=u, k=k, skip=skip, pre_gate=pre_gate, post_gate=post_gate)
    _check_factors(name, "forward", forward, D, u.device)
    _check_factors(name, "inverse", inverse, D, u.device)
    there, back = forward.twiddle.shape, inverse.twiddle.shape
    check(name, there[1:] == back[1:], "inverse.twiddle must have the N1, N2 = {} of forward", back, tuple(there[1:]))
    same = there[0] == back[0] or 1 in (there[0], back[0])
    check(name, same, "inverse.twiddle must have the G = {} of forward, or 1", back, there[0])
    n, needed = there[1] * there[2], max(T, 1) + k.shape[-1] - 1
    check(name, needed <= n, "forward.twiddle [G, N1, N2] must have N1 N2 >= T + L - 1 = {}", there, needed)
    if backend == "reference":
        return reference.monarch_conv(u, k, forward, inverse, skip, pre_gate, post_gate)
    y: Tensor = ops.monarch_conv(u, k, *forward, *inverse, skip, pre_gate, post_gate)
    return y
