"""Overlap-save: y in frames of `hop` outputs, each by a transform of at least hop + L - 1 points. One frame is the whole.

    output i       irfft(rfft(x[i hop - (L-1) ...]) K), without its first L - 1
    dx of frame i  irfft(rfft(dy[i hop ... + L - 1]) conj K)      dk = irfft(sum_i rfft(dy as before) conj rfft(x[i hop ...]))

dy reaches L - 1 positions ahead of the hop that x alone fills: no product wraps around. Few frames are gone through one by
one, straight from the inputs; many at once, as a strided view of a padded copy.
"""

import torch
from torch import Tensor

from seqengine.kernels.conv.plan import Block, Plan
from seqengine.kernels.conv.stream import Rows, Sink, Stream


class Frames:
    """Few frames, one by one."""

    def __init__(self, how: Plan) -> None:
        self.how, self.inputs, self.ahead = how, Rows(), Rows()

    def _input(self, x: Stream, block: Block, start: int, lead: int) -> Tensor:
        """Spectrum of the frame's inputs with `lead` positions of history."""
        last = min(start + self.how.hop, len(x))
        spectrum: Tensor = torch.fft.rfft(self.inputs.padded(x, block, start - lead, last, self.how.size))
        return spectrum

    def _inverse(self, spectrum: Tensor, first: int, count: int) -> Tensor:
        z: Tensor = torch.fft.irfft(spectrum, n=self.how.size)
        return z[..., first : first + count]

    def convolve(self, x: Stream, k: Tensor, block: Block, y: Sink) -> None:
        taps = torch.fft.rfft(k, n=self.how.size)
        for start in range(0, len(x), self.how.hop):
            lead = min(k.shape[-1] - 1, start)
            z = self._inverse(self._input(x, block, start, lead).mul_(taps), lead, self.how.hop)
            y.write(block, start, z)

    def gradients(
        self, dy: Stream, x: Stream, k: Tensor, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = k.shape[-1], self.how.size, self.how.hop
        total: Tensor | None = None
        taps = torch.fft.rfft(k, n=size)
        conjugate = taps.conj_physical() if y is not None else taps.conj_physical_()
        for start in range(0, len(x), hop):
            if y is not None:
                lead = min(L - 1, start)
                inputs = self._input(x, block, start, lead)
                y.write(block, start, self._inverse(inputs * taps, lead, hop))
            if need_k and (y is None or lead > 0):
                inputs = self._input(x, block, start, 0)
            if need_k or dx is not None:
                last = min(start + hop + L - 1, len(dy))
                spectrum = torch.fft.rfft(self.ahead.padded(dy, block, start, last, size))
            if need_k:
                inputs.conj_physical_()
                total = inputs.mul_(spectrum) if total is None else total.addcmul_(inputs, spectrum)
            if dx is not None:
                dx.write(block, start, self._inverse(spectrum.mul_(conjugate), 0, hop))
        if total is None:
            return None
        dk: Tensor = torch.fft.irfft(total.sum_to_size(*k.shape[:-1], total.shape[-1]), n=size)
        return dk[..., :L]


class ManyFrames:
    """Frames by a view with overlapping rows."""

    def __init__(self, how: Plan) -> None:
        self.how, self.inputs, self.ahead = how, Rows(), Rows()

    def _spectra(self, rows: Rows, x: Stream, block: Block, before: int) -> Tensor:
        """[B, g, p, count, F]: frame i begins `before` positions before i * hop."""
        size = (self.how.count - 1) * self.how.hop + self.how.size
        padded = rows.padded(x, block, 0, len(x), size, before)
        spectra: Tensor = torch.fft.rfft(padded.unfold(-1, self.how.size, self.how.hop))
        return spectra

    def convolve(self, x: Stream, k: Tensor, block: Block, y: Sink) -> None:
        L, size = k.shape[-1], self.how.size
        spectra = self._spectra(self.inputs, x, block, L - 1).mul_(torch.fft.rfft(k, n=size)[..., None, :])
        y.write(block, 0, torch.fft.irfft(spectra, n=size)[..., L - 1 :].flatten(-2)[..., : len(x)])

    def gradients(
        self, dy: Stream, x: Stream, k: Tensor, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = k.shape[-1], self.how.size, self.how.hop
        if y is not None:
            self.convolve(x, k, block, y)
        if dx is None and not need_k:
            return None
        spectra = self._spectra(self.ahead, dy, block, 0)
        dk: Tensor | None = None
        if need_k:
            alone = self.inputs.padded(x, block, 0, len(x), self.how.count * hop).unflatten(-1, (self.how.count, hop))
            product = torch.fft.rfft(alone, n=size).conj_physical_().mul_(spectra).sum(dim=-2)
            dk = torch.fft.irfft(product.sum_to_size(*k.shape[:-1], product.shape[-1]), n=size)[..., :L]
        if dx is not None:
            taps = torch.fft.rfft(k, n=size).conj_physical_()
            rows = torch.fft.irfft(spectra.mul_(taps[..., None, :]), n=size)[..., :hop]
            dx.write(block, 0, rows.flatten(-2)[..., : len(x)])
        return dk
