"""A long convolution by a Fourier transform over ranks: each rank works on a share of every channel.

The sequence, zeros behind it, is a matrix n = n1 N2 + n2 of N1 rows and N2 columns. With k = k1 + N1 k2

    X[k1 + N1 k2] = sum_n2 w(N2)^(n2 k2) w(N)^(n2 k1) sum_n1 w(N1)^(n1 k1) x[n1 N2 + n2],       w(n) = exp(-2 pi i / n)

so: transform the columns, multiply by the twiddle w(N)^(n2 k1), transform the rows. A rank has some columns n2, then some rows
k1; x is real, so that the rows 0 .. N1/2 tell all. The spectrum stays in this order: the filter's has the same, and the inverse
goes the same way back. Four exchanges: tokens to columns, columns to rows, rows to columns, columns to tokens; they carry S D,
2 S D, 2 S D and S D real numbers for S tokens a rank, less this rank's own. The filter, and the inputs before the first token,
are on every rank: each takes its own columns of them, and the filter's spectrum takes one more exchange.

A rank's tokens within the columns of another are in the order of n; all tokens of a column share follow each other there. So
a permutation of the tokens by owner of their column, and one all-to-all, bring them, whatever the shards are.

References: Bailey 1990 (four-step FFT); Frigo & Johnson 2005 (transposed order); Ku et al. 2025, arXiv:2503.01868.
"""

from math import pi

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.parallel.context import SequenceContext
from seqengine.parallel.conv_cost import FourStep
from seqengine.parallel.exchange.transpose import exchange_parts
from seqengine.parallel.layout import offsets

OPERATION = "fft"
"""In the ledger."""


def fft_long_conv(x: Tensor, k: Tensor, skip: Tensor | None, initial: Tensor | None, ctx: SequenceContext) -> Tensor:
    """k (*) x + skip * x on this rank's part of x, in the dtype of the arithmetic: float64 if one of them is, else float32.

    Shapes:    x [B, D, T]; k [D, L], [G, L] or [B, D, L] and skip [D], the same on all ranks; initial [B, D, L-1], the inputs
               before the first token, whose gradient is the one of this rank's columns.
    Traffic:   `conv_cost.FourStep.sent_bytes`; x in its dtype, the rest in that of the arithmetic.
    Gradients: of k, skip and initial this rank's partial sums. Any order.
    """
    given = [t for t in (x, k, skip, initial) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    if x.shape[0] * x.shape[1] * ctx.total_tokens == 0:
        y = x.to(dtype)
        for t in given:
            y = y + t.sum().to(dtype) * 0
        return y
    layout = FourStep.of(ctx.bounds, k.shape[-1], initial is not None)
    transform = _Transform(layout, ctx, dtype, x.device)
    spectrum = transform.forward(transform.replicated(k[..., : layout.taps]))
    signal = transform.forward(transform.to_columns(x, initial))
    y = transform.to_tokens(transform.inverse(_product(signal, spectrum)))
    return y if skip is None else y + skip[:, None].to(dtype) * x.to(dtype)


def _product(signal: Tensor, spectrum: Tensor) -> Tensor:
    """[B, D, R, N2] times [D, R, N2], [G, R, N2] or [B, D, R, N2]."""
    if spectrum.ndim == 4:
        return signal * spectrum
    by_filter: Tensor = signal.unflatten(1, (spectrum.shape[0], -1)) * spectrum[:, None]
    return by_filter.flatten(1, 2)


class _Transform:
    """The exchanges and transforms of one layout. Columns: [.., N1, this rank's n2]; rows: [.., this rank's k1, N2]."""

    def __init__(self, layout: FourStep, ctx: SequenceContext, dtype: torch.dtype, device: torch.device):
        self.layout, self.ctx, self.dtype, self.device = layout, ctx, dtype, device
        self.n1, self.n2 = layout.sizes
        self.first, self.stop = offsets(layout.columns)[ctx.rank : ctx.rank + 2]
        self.width = self.stop - self.first
        count = self.n1 * self.n2
        k1 = torch.arange(self.n1 // 2 + 1, device=device)
        turns = k1[:, None] * torch.arange(self.first, self.stop, device=device) % count
        angle = turns.double() * (-2 * pi / count)
        self.twiddle = torch.complex(angle.cos(), angle.sin()).to(
            torch.complex128 if dtype == torch.float64 else torch.complex64
        )
        ranks = range(layout.ranks)
        self.gives = [layout.tokens(ctx.rank, r) for r in ranks]
        self.gets = [layout.tokens(r, ctx.rank) for r in ranks]
        position = torch.arange(ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1], device=device) + layout.shift
        edges = torch.tensor(offsets(layout.columns)[1:], device=device)
        owner = torch.searchsorted(edges, position % self.n2, right=True)
        self.order = owner.argsort(stable=True)

    def _matrix(self, values: Tensor, start: int) -> Tensor:
        """[.., M] -> [.., N1, width]: values in the order of n, the first at place `start` of this rank's columns."""
        missing = self.n1 * self.width - start - values.shape[-1]
        padded = F.pad(values.to(self.dtype), (start, missing))
        return padded.view(*values.shape[:-1], self.n1, self.width)

    def replicated(self, x: Tensor) -> Tensor:
        """This rank's columns of x [.., M], which every rank has, from position 0 on."""
        count = self.layout.before(x.shape[-1], self.ctx.rank)
        row = torch.arange(-(-x.shape[-1] // self.n2), device=self.device)
        position = row[:, None] * self.n2 + torch.arange(self.first, self.stop, device=self.device)
        return self._matrix(x[..., position.flatten()[:count]], 0)

    def to_columns(self, x: Tensor, initial: Tensor | None) -> Tensor:
        """x [B, D, T], `shift` inputs before the first token."""
        came = exchange_parts(x[..., self.order], 2, 2, self.gives, self.gets, ctx=self.ctx, operation=OPERATION)
        columns = self._matrix(came, self.layout.before(self.layout.shift, self.ctx.rank))
        return columns if initial is None else columns + self.replicated(initial)

    def to_tokens(self, columns: Tensor) -> Tensor:
        start = self.layout.before(self.layout.shift, self.ctx.rank)
        values = columns.flatten(-2)[..., start : start + sum(self.gets)]
        came = exchange_parts(values, 2, 2, self.gets, self.gives, ctx=self.ctx, operation=OPERATION)
        y: Tensor = came[..., self.order.argsort()]
        return y

    def forward(self, columns: Tensor) -> Tensor:
        """The spectrum of real columns, in rows."""
        half = torch.fft.rfft(columns, dim=-2) if columns.numel() else _empty_spectrum(columns, self.n1 // 2 + 1)
        rows = self._swap(half * self.twiddle, -2, self.layout.rows, -1, self.layout.columns)
        return torch.fft.fft(rows, dim=-1) if rows.numel() else rows

    def inverse(self, rows: Tensor) -> Tensor:
        """Real columns of a spectrum in rows."""
        turned = torch.fft.ifft(rows, dim=-1) if rows.numel() else rows
        half = self._swap(turned, -1, self.layout.columns, -2, self.layout.rows) * self.twiddle.conj()
        if half.numel() == 0:
            return F.pad(half.real, (0, 0, 0, self.n1 - half.shape[-2]))
        columns: Tensor = torch.fft.irfft(half, n=self.n1, dim=-2)
        return columns

    def _swap(self, x: Tensor, scatter: int, cut: list[int], gather: int, joined: list[int]) -> Tensor:
        """Complex numbers, as pairs of real ones."""
        dims = (scatter % x.ndim, gather % x.ndim)
        pairs = torch.view_as_real(x.resolve_conj())
        came = exchange_parts(pairs, *dims, cut, joined, ctx=self.ctx, operation=OPERATION)
        return torch.view_as_complex(came)


def _empty_spectrum(columns: Tensor, rows: int) -> Tensor:
    """Of no columns, still in the graph."""
    kept = columns[..., :rows, :]
    return torch.complex(kept, kept)
