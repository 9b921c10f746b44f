"""Uniformly partitioned convolution: sequence and filter in pieces of C, so that no transform is longer than 2 C.

X_r is the spectrum of piece r of x padded to 2 C, G_r that of the 2 C values of dy from piece r on, K_m that of piece m of
the filter padded to 2 C: as many points in all as in one long transform, but each transform stays in the cache.

    y      piece r of the output comes from Z_r = sum_m X_{r-m} K_m: the first C values of irfft(Z_r) belong to
           piece r, the last C to piece r + 1
    dx_r = first C of irfft(sum_m G_{r+m} conj K_m)        dk_m = first C of irfft(sum_r G_{r+m} conj X_r)

The products cost R Q multiply-adds of spectra for R and Q pieces, which is why C grows with the longer of the two.

References: Stockham 1966 (sectioned convolution); the uniform partition of the filter: Wefers 2015, RWTH Aachen, chapter 5.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """y [B, d, T] of x [B, d, T] and k [d, L] or [B, d, L], L <= T, in one real dtype."""
    T = x.shape[-1]
    inputs, taps = _spectra(x, piece), _spectra(k, piece)
    R = inputs.shape[-2]
    total = inputs * taps[..., :1, :]
    for m in range(1, taps.shape[-2]):
        total[..., m:, :].addcmul_(inputs[..., : R - m, :], taps[..., m : m + 1, :])
    both = torch.fft.irfft(total, n=2 * piece)
    y: Tensor = both[..., :piece]
    y[..., 1:, :] += both[..., :-1, piece:]
    return y.flatten(-2)[..., :T]


def gradients_block(
    dy: Tensor, x: Tensor, k: Tensor, piece: int, need_x: bool, need_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [B, d, T], dk shaped like k); None for what is not needed."""
    T, L = x.shape[-1], k.shape[-1]
    R, Q = pieces(T, piece), pieces(L, piece)
    ahead = F.pad(dy, (0, (R + 1) * piece - T)).unfold(-1, 2 * piece, piece)
    spectra = torch.fft.rfft(ahead)
    dx: Tensor | None = None
    dk: Tensor | None = None
    if need_x:
        taps = _spectra(k, piece).conj_physical_()
        total = spectra * taps[..., :1, :]
        for m in range(1, Q):
            total[..., : R - m, :].addcmul_(spectra[..., m:, :], taps[..., m : m + 1, :])
        dx = torch.fft.irfft(total, n=2 * piece)[..., :piece].flatten(-2)[..., :T]
    if need_k:
        inputs = _spectra(x, piece).conj_physical_()
        sums = []
        for m in range(Q):
            product = (spectra[..., m:, :] * inputs[..., : R - m, :]).sum(dim=-2)
            sums.append(product if k.ndim == 3 else product.sum(dim=0))
        dk = torch.fft.irfft(torch.stack(sums, dim=-2), n=2 * piece)[..., :piece].flatten(-2)[..., :L]
    return dx, dk
