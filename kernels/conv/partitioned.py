"""Uniformly partitioned convolution: sequence and filter in pieces of C, so that no transform is longer than 2 C.

X_r is the spectrum of piece r of x padded to 2 C, G_r that of the 2 C values of dy from piece r on, K_m that of piece m of
the filter padded to 2 C: as many points in all as in one long transform, but each transform stays in the cache.

    y      piece r of the output comes from Z_r = sum_m X_{r-m} K_m: the first C values of irfft(Z_r) belong to
           piece r, the last C to piece r + 1
    dx_r = first C of irfft(sum_m G_{r+m} conj K_m)        dk_m = first C of irfft(sum_r G_{r+m} conj X_r)

The products cost R Q multiply-adds of spectra for R and Q pieces, which is why C grows with the longer of the two.

References: Stockham 1966 (sectioned convolution); the uniform partition of the filter: Wefers 2015, RWTH Aachen, chapter 5.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Need(NamedTuple):
    """Which of the input's gradient, the filter's gradient and the output itself are asked for."""

    x: bool
    k: bool
    y: bool


@dataclass
class Gradients:
    """What was asked for; None for the rest."""

    x: Tensor | None = None
    k: Tensor | None = None
    y: Tensor | None = None


def pieces(length: int, piece: int) -> int:
    """Pieces of `piece` that cover `length`."""
    return -(-length // piece)


def _spectra(x: Tensor, piece: int) -> Tensor:
    """[..., n] -> [..., pieces, C + 1]: spectra of the pieces, each padded to 2 C points."""
    count = pieces(x.shape[-1], piece)
    missing = count * piece - x.shape[-1]
    whole = F.pad(x, (0, missing)) if missing else x
    spectra: Tensor = torch.fft.rfft(whole.unflatten(-1, (count, piece)), n=2 * piece)
    return spectra


def convolve_block(x: Tensor, k: Tensor, piece: int) -> Tensor:
    """y [..., n] of x [..., n] and k [..., L], L <= n, whose leading dims fit by broadcasting, in one real dtype."""
    return _output(_spectra(x, piece), _spectra(k, piece), piece)[..., : x.shape[-1]]


def _output(inputs: Tensor, taps: Tensor, piece: int) -> Tensor:
    """[..., pieces * C] from the spectra of the pieces of input and filter."""
    R = inputs.shape[-2]
    total = inputs * taps[..., :1, :]
    for m in range(1, taps.shape[-2]):
        total[..., m:, :].addcmul_(inputs[..., : R - m, :], taps[..., m : m + 1, :])
    both = torch.fft.irfft(total, n=2 * piece)
    y: Tensor = both[..., :piece]
    y[..., 1:, :] += both[..., :-1, piece:]
    return y.flatten(-2)


def gradients_block(dy: Tensor, x: Tensor, k: Tensor, piece: int, need: Need) -> Gradients:
    """Of y = convolve_block(x, k, piece): dx and y of x's shape, dk [b, ..., L] still to be summed to k's."""
    n, L = x.shape[-1], k.shape[-1]
    R, Q = pieces(n, piece), pieces(L, piece)
    found = Gradients()
    if need.y or need.x:
        taps = _spectra(k, piece)
    if need.y or need.k:
        inputs = _spectra(x, piece)
    if need.y:
        found.y = _output(inputs, taps, piece)[..., :n]
    if not (need.x or need.k):
        return found
    ahead = F.pad(dy, (0, (R + 1) * piece - n)).unfold(-1, 2 * piece, piece)
    spectra = torch.fft.rfft(ahead)
    if need.x:
        taps.conj_physical_()
        total = spectra * taps[..., :1, :]
        for m in range(1, Q):
            total[..., : R - m, :].addcmul_(spectra[..., m:, :], taps[..., m : m + 1, :])
        found.x = torch.fft.irfft(total, n=2 * piece)[..., :piece].flatten(-2)[..., :n]
    if need.k:
        inputs.conj_physical_()
        sums = []
        for m in range(Q):
            product = (spectra[..., m:, :] * inputs[..., : R - m, :]).sum(dim=-2)
            sums.append(product if k.shape[0] > 1 else product.sum(dim=0, keepdim=True))
        found.k = torch.fft.irfft(torch.stack(sums, dim=-2), n=2 * piece)[..., :piece].flatten(-2)[..., :L]
    return found
