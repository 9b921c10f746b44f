"""Filters given tap by tap, fitted by sums of decaying exponentials: poles from the Hankel matrix, residues by least squares.

A filter k[t] = Re sum_n r_n lambda_n^t has the Hankel matrix H[i, j] = k[i + j] = V diag(r) V^T of Vandermonde matrices, so
that the leading singular vectors U of H span the columns of V, and multiplying them by the poles shifts them by one row:
U[1:] = U[:-1] A, where A has the poles as eigenvalues. For a filter that is no such sum, the same from the largest singular
values is nearly the best of its order. H is square and symmetric, and is never built: products with it are FFTs.

References: Kung 1978 (realisation from the Hankel matrix); Roy and Kailath 1989, doi:10.1109/29.32276 (rotational invariance);
Halko et al. 2011, arXiv:0909.4061 (randomised range finder); Massaroli et al. 2023, arXiv:2310.18780 (distillation of Hyena).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 12
"""Random vectors beyond the rank that is wanted."""
ITERATIONS = 4
"""Products with H, each of which makes the range of the random vectors more that of the largest singular values."""
RANK_TOLERANCE = 1e-13
"""Singular values below this share of the largest are rounding."""
SLOWEST_DECAY = 1e-3
"""A mode loses at least this share of itself over the length of the filter: poles lie inside of the unit circle."""
FASTEST_DECAY = 40.0
"""exp(-40) is nothing in float64: a mode that decays faster in one token is as well held there."""


class Modes(NamedTuple):
    """k[t] = Re sum_n residues[n] exp(log_poles[n] t), complex128 [C, N]."""

    log_poles: Tensor
    residues: Tensor

    def filter(self, length: int) -> Tensor:
        """[C, length], float64."""
        from seqengine.kernels.api import modal_filter

        return modal_filter(self.log_poles, self.residues, length)


class Subspace(NamedTuple):
    """What the poles of every order are found from: of the leading singular vectors U of each filter's Hankel matrix."""

    products: Tensor
    """[C, R, R]: U[:-1]^T U[1:]."""
    last: Tensor
    """[C, R]: the last row of U."""
    ranks: Tensor
    """[C]: how many singular values are more than rounding."""
    length: int

    def poles(self, modes: int) -> Tensor:
        """[C, P]: log poles with imaginary parts >= 0 of systems with up to 2 * modes real states, the others NaN."""
        n = min(2 * modes, self.last.shape[1])
        G, u = self.products[:, :n, :n], self.last[:, :n]
        kept = torch.arange(n, device=u.device) < self.ranks[:, None]
        u = u * kept
        G = G * kept[:, :, None] * kept[:, None]
        # (U1^T U1)^-1 U1^T U2 with U1^T U1 = 1 - u u^T, by Sherman and Morrison.
        rest = (1 - u.square().sum(1)).clamp(min=1e-15)
        A = G + u[:, :, None] * ((u[:, None] @ G) / rest[:, None, None])
        found = torch.linalg.eigvals(A)
        size = found.abs().clamp(min=math.exp(-FASTEST_DECAY))
        log = torch.complex(size.log().clamp(max=-SLOWEST_DECAY / self.length), found.angle())
        counts = (found.abs() > 1e-15) & (found.imag >= 0)
        return torch.where(counts, log, torch.nan)


def subspace(k: Tensor, rank: int, seed: int = 0) -> Subspace:
    """k [C, L] float64, L >= 3; rank: largest number of singular vectors."""
    m = (k.shape[1] + 1) // 2
    taps = k[:, : 2 * m - 1]
    size = min(m, rank + OVERSAMPLING)
    points = 1 << (3 * m).bit_length()
    spectrum = torch.fft.rfft(taps, n=points)[:, None]

    def times(q: Tensor) -> Tensor:
        """H q for q [C, m, S]."""
        x = torch.fft.rfft(q.transpose(1, 2), n=points)
        return torch.fft.irfft(spectrum * x.conj(), n=points)[..., :m].transpose(1, 2)

    if size == m:
        Q = torch.eye(m, dtype=k.dtype, device=k.device).expand(k.shape[0], m, m)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(m, size, dtype=k.dtype, generator=generator).to(k.device)
        Q = start.expand(k.shape[0], m, size)
        for _ in range(ITERATIONS):
            Q = torch.linalg.qr(times(Q)).Q
    small = Q.transpose(1, 2) @ times(Q)
    values, vectors = torch.linalg.eigh((small + small.transpose(1, 2)) / 2)
    order = values.abs().argsort(dim=1, descending=True)[:, : min(rank, m - 1)]
    values = values.abs().gather(1, order)
    U = Q @ vectors.gather(2, order[:, None].expand(-1, vectors.shape[1], -1))
    ranks = (values > RANK_TOLERANCE * values[:, :1]).sum(dim=1)
    return Subspace(U[:, :-1].transpose(1, 2) @ U[:, 1:], U[:, -1], ranks, k.shape[1])


def fit_residues(k: Tensor, log_poles: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Least squares over k[:, 0 .. L-1]: (residues [C, P], energy of each mode [C, P]). NaN poles get none."""
    lags = torch.arange(k.shape[1], dtype=k.dtype, device=k.device)
    absent = log_poles.isnan()
    powers = torch.exp(torch.where(absent, 0, log_poles)[:, None] * lags[:, None])
    powers = torch.where(absent[:, None], 0, powers)
    basis = torch.cat([powers.real, -powers.imag], dim=2)
    norms = basis.norm(dim=1, keepdim=True).clamp(min=1e-30)
    Q, R = torch.linalg.qr(basis / norms)
    U, S, V = torch.linalg.svd(R)
    inverse = torch.where(S > cutoff * S[:, :1], 1 / S, 0)
    x = V.mH @ (inverse[:, :, None] * (U.mH @ (Q.mH @ k[:, :, None])))
    x = torch.where(absent.repeat(1, 2), 0, x[..., 0] / norms[:, 0])
    a, b = x.chunk(2, dim=1)
    residues = torch.complex(a, b)
    energy = residues.abs() * powers.abs().square().sum(1).sqrt()
    return residues, energy


def fit(k: Tensor, space: Subspace, modes: int, cutoff: float) -> Modes:
    log_poles = space.poles(modes)
    residues, energy = fit_residues(k, log_poles, cutoff)
    if log_poles.shape[1] > modes:
        energy = torch.where(log_poles.isnan(), -1, energy)
        best = energy.argsort(dim=1, descending=True)[:, :modes]
        log_poles = log_poles.gather(1, best)
        residues, _ = fit_residues(k, log_poles, cutoff)
    return Modes(torch.where(log_poles.isnan(), -1, log_poles), residues)
