"""Frequency-sparse convolution: the filter projected on some bands of frequencies, and no work for the others.

The positive frequencies of a padded transform of n points are cut into equal bands. A SparseSpectrum says which are kept. The
projection of a filter k on them is k - r, where r is the dropped part. Seen as a circular filter of n points it is not
zero before lag 0, so the convolution is not exactly causal. What leaks is r, and error(k) = |r|_2 / |k|_2 bounds it:

    every output     |y[t] - y_causal[t]| <= error |k|_2 |x|_2
    the leak         the taps that reach from the future hold at most error^2 of the filter's energy

By Parseval's theorem both come from the energies of the bands. The arithmetic is in `sparse_ops.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.kernels.conv.plan import SPARSE_BLOCK_ELEMENTS as BLOCK_ELEMENTS
from seqengine.kernels.conv.plan import fft_size
from seqengine.kernels.conv.sparse_ops import sparse_conv as sparse_conv_op


@dataclass(frozen=True)
class SparseSpectrum:
    """Which frequencies of an n-point transform a convolution keeps, in bands.

    Shapes:   `size` is n, `keep` says of each of num_blocks >= 2 bands, lowest first, whether it is kept. Band j is the
              frequencies from j n / (2 num_blocks) to below (j+1) n / (2 num_blocks), in cycles per n points; the last band
              also holds n/2. n is a multiple of 2 num_blocks.
    State:    plain numbers: it can be compared, hashed, pickled and closed over under torch.compile.
    Raises:   ValueError if there are fewer than two bands, keep is no tuple of bools, or n no such multiple.
    References: FlashFFTConv, Fu et al. 2023, arXiv:2311.05908.
    """

    size: int
    keep: tuple[bool, ...]

    def __post_init__(self) -> None:
        name = "SparseSpectrum"
        is_bools = isinstance(self.keep, tuple) and all(type(kept) is bool for kept in self.keep)
        check(name, is_bools, "keep must be a tuple of bools, one a band", self.keep)
        _check_blocks(name, self.num_blocks, "keep must have two bands or more")
        fits = isinstance(self.size, int) and self.size > 0 and self.size % (2 * self.num_blocks) == 0
        check(name, fits, "size must be a positive multiple of twice the {} bands", self.size, self.num_blocks)

    @classmethod
    def fit(cls, k: Tensor, length: int, *, error: float, num_blocks: int = 32) -> "SparseSpectrum":
        """The spectrum with the fewest bands, in greedy order, whose error(k) is at most `error` for every filter.

        Bands are dropped one by one, from the smallest up, and the first that would take a filter's error above the bound
        ends it. A band is as large as the largest share of a filter's energy in it; of equal bands the highest goes first.

        Shapes:   k [D, L], [G, L] or [B, D, L], every tap counted; length T >= 1, the longest sequence. The size is at
                  least T + L - 1: num_blocks times a fast even transform length.
        Dtypes:   k float64, float32, bfloat16 or float16; the energies are in float64. No gradient flows.
        Memory:   the energies, and the spectra of a block of filters. The values of k are read on the host.
        Raises:   ValueError if k has no filter, no tap or a value that is not finite, or if a number is out of range.
        """
        name = "SparseSpectrum.fit"
        check(name, error >= 0, "error must be >= 0", error)
        check(name, k.ndim >= 2 and k.numel() > 0, "k must be [D, L] or [B, D, L], none of them 0", k.shape)
        size = _size(name, length, k.shape[-1], num_blocks)
        shares = _shares(name, k, size, num_blocks)
        largest = shares.amax(dim=0).tolist()
        keep = [True] * num_blocks
        for band in sorted(range(num_blocks), key=lambda band: (largest[band], -band)):
            keep[band] = False
            if bool((_dropped(shares, keep) > error).any()):
                keep[band] = True
                break
        return cls(size, tuple(keep))

    @classmethod
    def low_pass(cls, length: int, taps: int, *, kept: int, num_blocks: int = 32) -> "SparseSpectrum":
        """The lowest `kept` of num_blocks bands, for sequences of at most `length` values and filters of at most `taps`."""
        name = "SparseSpectrum.low_pass"
        size = _size(name, length, taps, num_blocks)
        is_count = isinstance(kept, int) and 0 <= kept <= num_blocks
        check(name, is_count, "kept must be an int from 0 to num_blocks={}", kept, num_blocks)
        return cls(size, tuple(band < kept for band in range(num_blocks)))

    @property
    def num_blocks(self) -> int:
        return len(self.keep)

    @property
    def kept_fraction(self) -> float:
        """The part of the bands that is kept, from 0 to 1."""
        return sum(self.keep) / len(self.keep)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """bool [n/2 + 1]: for each positive frequency, whether it is kept."""
        bands = torch.tensor(self.keep, device=device).repeat_interleave(self.size // (2 * self.num_blocks))
        return torch.cat([bands, bands[-1:]])

    def error(self, k: Tensor) -> Tensor:
        """|r|_2 / |k|_2 of each filter [..., L], r its dropped part: float64 [...], without gradient; 0 for a zero filter."""
        check("SparseSpectrum.error", k.ndim >= 1 and k.shape[-1] >= 1, "k must be [..., L], L >= 1", k.shape)
        must = "size must be at least L={}"
        check("SparseSpectrum.error", self.size >= k.shape[-1], must, self.size, k.shape[-1])
        shares = _shares("SparseSpectrum.error", k, self.size, self.num_blocks)
        return _dropped(shares, list(self.keep)).reshape(k.shape[:-1])

    def check(self, name: str, T: int, L: int) -> None:
        """ValueError, under the name of the caller, if sequences of T values and filters of L taps would wrap around."""
        must = "the size of spectrum must be at least T + L - 1, with T={} and L={}"
        check(name, self.size >= T + L - 1, must, self.size, T, L)


def _check_blocks(name: str, num_blocks: int, must: str) -> None:
    check(name, isinstance(num_blocks, int) and num_blocks >= 2, must, num_blocks)


def _size(name: str, length: int, taps: int, num_blocks: int) -> int:
    _check_blocks(name, num_blocks, "num_blocks must be an int >= 2")
    check(name, isinstance(length, int) and length >= 1, "length must be an int >= 1", length)
    check(name, isinstance(taps, int) and taps >= 1, "taps must be an int >= 1", taps)
    return num_blocks * fft_size(-(-(length + taps - 1) // num_blocks))


def _shares(name: str, k: Tensor, size: int, num_blocks: int) -> Tensor:
    """Of each filter's energy, the part in each band: [filters, num_blocks] in float64; 0 for a zero filter."""
    check_floats(name, k=k)
    filters = k.detach().reshape(-1, k.shape[-1])
    check(name, bool(torch.isfinite(filters).all()), "k must be finite", "nan or inf")
    energies = torch.empty(filters.shape[0], num_blocks, dtype=torch.float64, device=k.device)
    width = max(1, BLOCK_ELEMENTS.get(k.device.type, 1 << 24) // size)
    for start in range(0, filters.shape[0], width):
        block = slice(start, start + width)
        power = torch.fft.rfft(filters[block].double(), n=size).abs().square()
        power[:, 1:-1] *= 2
        energies[block] = power[:, :-1].unflatten(-1, (num_blocks, -1)).sum(dim=-1)
        energies[block, -1] += power[:, -1]
    total = energies.sum(dim=-1, keepdim=True)
    return energies / total.where(total > 0, 1)


def _dropped(shares: Tensor, keep: list[bool]) -> Tensor:
    """The relative L2 error [filters] of dropping what is not kept."""
    dropped = ~torch.tensor(keep, device=shares.device)
    return (shares * dropped).sum(dim=-1).sqrt()


def _check(name: str, x: Tensor, k: Tensor, skip: Tensor | None, spectrum: SparseSpectrum) -> None:
    check(name, x.ndim == 3, "x must be [B, D, T]", x.shape)
    check(name, k.ndim in (2, 3) and k.shape[-1] >= 1, "k must be [D, L] or [B, D, L], L >= 1", k.shape)
    leading = tuple(x.shape[:2])[3 - k.ndim :]
    check(name, k.shape[:-1] == leading, "k must have {} filters, as x has channels", k.shape, leading)
    check_shape(name, "skip", skip, "[D]", x.shape[1])
    check_floats(name, x=x, k=k, skip=skip)
    spectrum.check(name, x.shape[-1], k.shape[-1])


def sparse_conv(x: Tensor, k: Tensor, skip: Tensor | None, spectrum: SparseSpectrum) -> Tensor:
    """y = (k on the kept bands) (*) x + skip * x: T values of a circular convolution of n = spectrum.size points.

    Shapes:   x [B, D, T]; k [D, L] or [B, D, L]; skip [D], on all frequencies. Returns y [B, D, T]. Any T >= 0 and L >= 1 with
              T + L - 1 <= n. Every tap counts, those at lags >= T too.
    Dtypes:   float64, float32, bfloat16 or float16; float32 arithmetic for the halves; y in x.dtype. On a GPU one factor is a
              complex matrix product, which torch.backends.cuda.matmul.allow_tf32 rounds to TF32.
    Memory:   saves x and k; the backward computes spectra again, block of channels by block. Any order of derivative;
              torch.compile traces it whole. Time: n log(n / num_blocks) always, n num_blocks for the share of bands kept.
    State:    none: the filter reaches a little into the future (see above), and an outer state would not be exact.
    Exact to: sparse_conv_reference within 1e-12 relative in float64, gradients too.
    Raises:   ValueError if shapes disagree, a dtype is not supported, or the spectrum's size is too small.
    References: FlashFFTConv, Fu et al. 2023, arXiv:2311.05908.
    """
    _check("sparse_conv", x, k, skip, spectrum)
    y: Tensor = sparse_conv_op(x, k, spectrum.size, list(spectrum.keep))
    return y if skip is None else (y + skip[:, None] * x).to(x.dtype)


def sparse_conv_reference(x: Tensor, k: Tensor, skip: Tensor | None, spectrum: SparseSpectrum) -> Tensor:
    """The definition, in whole transforms of n points: the arguments and the result of sparse_conv, all work done."""
    _check("sparse_conv", x, k, skip, spectrum)
    n = spectrum.size
    dtype = torch.promote_types(torch.promote_types(x.dtype, k.dtype), torch.float32)
    product = torch.fft.rfft(x.to(dtype), n=n) * torch.fft.rfft(k.to(dtype), n=n)
    y: Tensor = torch.fft.irfft(product * spectrum.mask(x.device), n=n)[..., : x.shape[-1]].to(x.dtype)
    return y if skip is None else (y + skip[:, None] * x).to(x.dtype)
