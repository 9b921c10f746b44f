"""Overlap-save: y in frames of `hop` outputs, each by a transform of at least hop + L - 1 points. One frame is the whole.

    output i       irfft(rfft(x[i hop - (L-1) ...]) K), without its first L - 1
    dx of frame i  irfft(rfft(dy[i hop ... + L - 1]) conj K)      dk = irfft(sum_i rfft(dy as before) conj rfft(x[i hop ...]))

dy reaches L - 1 positions ahead of the hop that x alone fills: no product wraps around. Few frames are gone through one by
one, straight from the inputs; many at once, as a strided view of a padded copy.
"""

from torch import Tensor

from seqengine.kernels.conv.plan import Block, Plan
from seqengine.kernels.conv.stream import Rows, Sink, Stream
from seqengine.kernels.conv.transforms import Transforms


class Frames:
    """Few frames, one by one."""

    def __init__(self, how: Plan) -> None:
        self.how, self.inputs, self.ahead, self.fft = how, Rows(), Rows(), Transforms()

    def _input(self, x: Stream, block: Block, start: int, lead: int) -> Tensor:
        """Spectrum of the frame's inputs with `lead` positions of history."""
        last = min(start + self.how.hop, len(x))
        return self.fft.rfft("inputs", self.inputs.padded(x, block, start - lead, last, self.how.size), self.how.size)

    def _inverse(self, spectrum: Tensor, first: int, count: int) -> Tensor:
        return self.fft.irfft("outputs", spectrum, self.how.size)[..., first : first + count]

    def convolve(self, x: Stream, k: Tensor, block: Block, y: Sink) -> None:
        taps = self.fft.rfft("taps", k, self.how.size)
        for start in range(0, len(x), self.how.hop):
            lead = min(k.shape[-1] - 1, start)
            z = self._inverse(self._input(x, block, start, lead).mul_(taps), lead, self.how.hop)
            y.write(block, start, z)

    def gradients(
        self, dy: Stream, x: Stream, k: Tensor, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = k.shape[-1], self.how.size, self.how.hop
        total: Tensor | None = None
        taps = self.fft.rfft("taps", k, size)
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
                spectrum = self.fft.rfft("ahead", self.ahead.padded(dy, block, start, last, size), size)
            if need_k:
                inputs.conj_physical_()
                if total is None:
                    total = inputs.mul_(spectrum) if hop >= len(x) else inputs * spectrum
                else:
                    total.addcmul_(inputs, spectrum)
            if dx is not None:
                dx.write(block, start, self._inverse(spectrum.mul_(conjugate), 0, hop))
        if total is None:
            return None
        return self.fft.irfft("dk", total.sum_to_size(*k.shape[:-1], total.shape[-1]), size)[..., :L]


class ManyFrames:
    """Frames by a view with overlapping rows."""

    def __init__(self, how: Plan) -> None:
        self.how, self.inputs, self.ahead, self.fft = how, Rows(), Rows(), Transforms()

    def _spectra(self, name: str, rows: Rows, x: Stream, block: Block, before: int) -> Tensor:
        """[B, g, p, count, F]: frame i begins `before` positions before i * hop."""
        size = (self.how.count - 1) * self.how.hop + self.how.size
        padded = rows.padded(x, block, 0, len(x), size, before)
        return self.fft.rfft(name, padded.unfold(-1, self.how.size, self.how.hop), self.how.size)

    def convolve(self, x: Stream, k: Tensor, block: Block, y: Sink) -> None:
        L, size = k.shape[-1], self.how.size
        spectra = self._spectra("inputs", self.inputs, x, block, L - 1).mul_(
            self.fft.rfft("taps", k, size)[..., None, :]
        )
        y.write(block, 0, self.fft.irfft("outputs", spectra, size)[..., L - 1 :].flatten(-2)[..., : len(x)])

    def gradients(
        self, dy: Stream, x: Stream, k: Tensor, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = k.shape[-1], self.how.size, self.how.hop
        if y is not None:
            self.convolve(x, k, block, y)
        if dx is None and not need_k:
            return None
        spectra = self._spectra("ahead", self.ahead, dy, block, 0)
        dk: Tensor | None = None
        if need_k:
            alone = self.inputs.padded(x, block, 0, len(x), self.how.count * hop).unflatten(-1, (self.how.count, hop))
            product = self.fft.rfft("alone", alone, size).conj_physical_().mul_(spectra).sum(dim=-2)
            dk = self.fft.irfft("dk", product.sum_to_size(*k.shape[:-1], product.shape[-1]), size)[..., :L]
        if dx is not None:
            taps = self.fft.rfft("taps", k, size).conj_physical_()
            rows = self.fft.irfft("outputs", spectra.mul_(taps[..., None, :]), size)[..., :hop]
            dx.write(block, 0, rows.flatten(-2)[..., : len(x)])
        return dk
