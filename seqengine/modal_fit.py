"""Filters given tap by tap, fitted by sums of decaying exponentials: k[s] = Re sum_n r_n lambda_n^s over lags s = 1, 2, ...

First poles, the better for each filter of two kinds:

    Hankel       H[i, j] = k[1 + i + j] of a filter that is such a sum has the column space of a Vandermonde matrix, which
                 multiplication by the poles shifts by a row. So the leading singular vectors U of H obey U[1:] = U[:-1] A,
                 where the eigenvalues of A are the poles (Kung 1978; Roy and Kailath 1989, doi:10.1109/29.32276). H is
                 symmetric and never built: its products are FFTs, its singular vectors those of a random range (Halko et
                 al. 2011, arXiv:0909.4061). Poles that would grow are put on a slowly decaying circle.
    harmonics    frequencies evenly spaced, of a period longer than the filter: of smooth filters that do not decay by the end,
                 whose Hankel poles grow.

Residues are linear least squares. Then Levenberg and Marquardt's method moves the poles, with the residues eliminated
(variable projection, Golub and Pereyra 1973; Kaufman's form). Everything in float64. Poles stay inside of the unit circle.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.api import modal_filter

OVERSAMPLING, POWER_ITERATIONS = 12, 4
"""Of the range finder: random vectors beyond the rank that is wanted, and products with H."""
ROUNDING = 1e-13
"""Singular values, and errors, below this share of the largest are rounding."""
SLOWEST, TURNED_BACK, FASTEST = 1e-3, 0.3, 5.0
"""Decay of the slowest mode over the whole filter, of a mode that would have grown, and of the fastest from lag to lag."""
HARMONIC_PERIODS = (1.3, 2.0)
"""In lengths of the filter."""
STEPS = 30
"""Steps of refinement."""
BLOCK_NUMBERS = 1 << 22
"""Numbers of one table of powers: channels are fitted in blocks."""


class Modes(NamedTuple):
    """k[s] = Re sum_n residues[n] exp(log_poles[n] s); complex128 [C, N], real parts of log_poles below 0."""

    log_poles: Tensor
    residues: Tensor

    def filter(self, length: int) -> Tensor:
        """[C, length] float64, lag 0 first."""
        return modal_filter(self.log_poles, self.residues, length)


def fit(k: Tensor, modes: int, *, cutoff: float = 1e-10, goal: float = 0.0) -> Modes:
    """Modes near k [C, S] float64, the taps at lags 1 .. S, S >= 1, in the sense of least squares.

    cutoff: combinations of modes that are smaller than this share of the largest are left out; that bounds residues.
    goal:   relative l2 error of every filter that is good enough to stop at.
    """
    rows = max(1, BLOCK_NUMBERS // (k.shape[1] * modes))
    parts = [_fit_block(block, modes, cutoff, goal) for block in k.split(rows)]
    return Modes(torch.cat([p.log_poles for p in parts]), torch.cat([p.residues for p in parts]))


def _fit_block(k: Tensor, modes: int, cutoff: float, goal: float) -> Modes:
    best = _solve(k, hankel_poles(k, modes, cutoff), cutoff)
    for period in HARMONIC_PERIODS:
        best = _better(_solve(k, _harmonics(k, modes, period), cutoff), best)
    todo = (best.errors() > max(goal, ROUNDING) * k.norm(dim=1)).nonzero().flatten()
    if todo.numel() == 0:
        return Modes(best.log_poles, best.residues)
    start = _Solution(*(x[todo] for x in best))
    refined = _better(_refined(k[todo], start, cutoff, goal), start)
    return Modes(
        best.log_poles.index_copy(0, todo, refined.log_poles), best.residues.index_copy(0, todo, refined.residues)
    )


class _Solution(NamedTuple):
    """Poles and the residues that are best for them; [C, ...]."""

    log_poles: Tensor
    residues: Tensor
    powers: Tensor
    """[C, S, N]: exp(log_poles s)."""
    span: Tensor
    """[C, S, 2 N]: an orthonormal basis of what real combinations of the powers reach; columns left out are zero."""
    rest: Tensor
    """[C, S]: k minus the fit."""

    def errors(self) -> Tensor:
        """[C]."""
        norms: Tensor = self.rest.norm(dim=1)
        return norms

    def is_within(self, k: Tensor, goal: float) -> bool:
        return bool((self.errors() <= goal * k.norm(dim=1)).all())


def _lags(k: Tensor) -> Tensor:
    return torch.arange(1, k.shape[1] + 1, device=k.device).to(k.dtype)


def _solve(k: Tensor, log_poles: Tensor, cutoff: float) -> _Solution:
    """Least squares for the residues, by QR and a truncated SVD."""
    powers = torch.exp(log_poles[:, None] * _lags(k)[:, None])
    basis = torch.cat([powers.real, -powers.imag], dim=2)
    # By mode, not by column: the sine of a mode without frequency is nothing, and shall stay so.
    norms = powers.abs().norm(dim=1).clamp(min=1e-200).repeat(1, 2)
    Q, R = torch.linalg.qr(basis / norms[:, None])
    U, S, V = torch.linalg.svd(R, full_matrices=False)
    kept = S / S[:, :1] > cutoff
    span = (Q @ U) * kept[:, None]
    coordinates = (span.mT @ k[:, :, None])[..., 0]
    x = (V.mT @ torch.where(kept, coordinates / S, 0.0)[:, :, None])[..., 0] / norms
    rest = k - (span @ coordinates[:, :, None])[..., 0]
    return _Solution(log_poles, torch.complex(*x.chunk(2, dim=1)), powers, span, rest)


def _better(a: _Solution, b: _Solution) -> _Solution:
    """Of each filter the one with the smaller error."""
    return _choose(a.errors() < b.errors(), a, b)


def _choose(first: Tensor, a: _Solution, b: _Solution) -> _Solution:
    return _Solution(*(torch.where(first.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)))


def hankel_poles(k: Tensor, modes: int, cutoff: float) -> Tensor:
    """[C, modes] complex128 log poles, imaginary parts >= 0: of twice as many real states, those that carry most of k."""
    G, last = _shift_of_singular_vectors(k, 2 * modes)
    if last.shape[1] == 0:
        return k.new_full((k.shape[0], modes), -1.0).to(torch.complex128)
    # (U1^T U1)^-1 U1^T U2 with U1^T U1 = 1 - last last^T, by Sherman and Morrison.
    rest = (1 - last.square().sum(dim=1)).clamp(min=1e-15)
    A = G + last[:, :, None] * ((last[:, None] @ G) / rest[:, None, None])
    poles = torch.linalg.eigvals(A)
    size, found = poles.abs(), (poles.abs() > ROUNDING) & (poles.imag >= 0)
    decay = size.clamp(min=math.exp(-FASTEST)).log()
    decay = torch.where(decay > -SLOWEST / k.shape[1], -TURNED_BACK / k.shape[1], decay)
    # What is no pole becomes one that is gone after a few lags.
    log_poles = torch.where(found, torch.complex(decay, poles.angle()), torch.full_like(poles, -1.0))
    if log_poles.shape[1] <= modes:
        padding = log_poles.new_full((k.shape[0], modes - log_poles.shape[1]), -1.0)
        return torch.cat([log_poles, padding], dim=1)
    solved = _solve(k, log_poles, cutoff)
    energy = torch.where(found, solved.residues.abs() * solved.powers.abs().norm(dim=1), -1.0)
    return log_poles.gather(1, energy.argsort(dim=1, descending=True, stable=True)[:, :modes])


def _shift_of_singular_vectors(k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U[:-1]^T U[1:] [C, R, R], the last row of U [C, R]) of the Hankel matrix; columns below rounding are zero."""
    m = (k.shape[1] + 1) // 2
    points = 1 << (3 * m).bit_length()
    spectrum = torch.fft.rfft(k[:, : 2 * m - 1], n=points)[:, None]

    def times(q: Tensor) -> Tensor:
        x = torch.fft.rfft(q.mT, n=points)
        product: Tensor = torch.fft.irfft(spectrum * x.conj(), n=points)[..., :m].mT
        return product

    size = min(m, rank + OVERSAMPLING)
    if size == m:
        Q = torch.eye(m, dtype=k.dtype, device=k.device).expand(k.shape[0], m, m)
    else:
        start = torch.randn(m, size, dtype=k.dtype, generator=torch.Generator().manual_seed(0)).to(k.device)
        Q = start.expand(k.shape[0], m, size)
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(times(Q)).Q
    small = Q.mT @ times(Q)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    order = values.abs().argsort(dim=1, descending=True)[:, : min(rank, m - 1)]
    values = values.abs().gather(1, order)
    U = Q @ vectors.gather(2, order[:, None].expand(-1, size, -1))
    U = U * (values > ROUNDING * values[:, :1])[:, None]
    return U[:, :-1].mT @ U[:, 1:], U[:, -1]


def _harmonics(k: Tensor, modes: int, period: float) -> Tensor:
    frequency = (torch.arange(modes, dtype=k.dtype, device=k.device) + 0.5) * (2 * math.pi / (period * k.shape[1]))
    decay = torch.full_like(frequency, -1 / k.shape[1])
    return torch.complex(decay, frequency.clamp(max=math.pi)).expand(k.shape[0], -1)


def _refined(k: Tensor, start: _Solution, cutoff: float, goal: float) -> _Solution:
    """Levenberg and Marquardt's steps on the logarithms of the decays and on the frequencies, of all filters at once."""
    length, lags = k.shape[1], _lags(k)
    least = SLOWEST / length
    log_decay = (-start.log_poles.real - least).clamp(min=least).log()
    # On the real axis the derivative by the frequency is zero: begin beside it.
    frequency = start.log_poles.imag.clamp(min=0.5 / length)

    def solved(log_decay: Tensor, frequency: Tensor) -> _Solution:
        decay = (log_decay.exp() + least).clamp(max=FASTEST)
        return _solve(k, torch.complex(-decay, frequency), cutoff)

    now = solved(log_decay, frequency)
    damping = torch.full_like(k[:, 0], 1e-2)
    for _ in range(STEPS):
        if now.is_within(k, max(goal, ROUNDING)):
            break
        slope = now.residues[:, None] * now.powers * lags[:, None]
        J = torch.cat([-log_decay.exp()[:, None] * slope.real, -slope.imag / length], dim=2)
        J = J - now.span @ (now.span.mT @ J)
        normal = J.mT @ J
        diagonal = normal.diagonal(dim1=1, dim2=2)
        floor = ROUNDING * diagonal.amax(dim=1, keepdim=True) + 1e-300
        damped = normal + torch.diag_embed(damping[:, None] * diagonal + floor)
        step = torch.linalg.solve_ex(damped, J.mT @ now.rest[:, :, None])[0][..., 0]
        by_decay, by_frequency = step.nan_to_num(0.0).chunk(2, dim=1)
        log_decay_next = log_decay + by_decay.clamp(-1, 1)
        frequency_next = frequency + by_frequency.clamp(-3, 3) / length
        trial = solved(log_decay_next, frequency_next)
        is_better = trial.errors() < now.errors()
        now = _choose(is_better, trial, now)
        log_decay = torch.where(is_better[:, None], log_decay_next, log_decay)
        frequency = torch.where(is_better[:, None], frequency_next, frequency)
        damping = torch.where(is_better, damping / 5, damping * 4).clamp(1e-12, 1e6)
    return now
