"""Overlap-save: y in frames of `hop` outputs, each by a transform of at least hop + L - 1 points. One frame is the whole.

    output i       irfft(rfft(x[i hop - (L-1) ...]) K), without its first L - 1
    dx of frame i  irfft(rfft(dy[i hop ... + L - 1]) conj K)      dk = irfft(sum_i rfft(dy as before) conj rfft(x[i hop ...]))

dy reaches L - 1 positions ahead of the hop that x alone fills: no product wraps around. Few frames, and long ones, are gone
through one by one, straight from the inputs; many short ones at once, as a strided view of a padded copy.
"""

from torch import Tensor

from seqengine.kernels.conv.plan import Block, Plan
from seqengine.kernels.conv.stream import Rows, Sink, Stream, Taps
from seqengine.kernels.conv.transforms import irfft_, rfft_, row_length


class Frames:
    """Frames one by one."""

    def __init__(self, how: Plan) -> None:
        self.how, self.taps, self.inputs, self.ahead = how, Rows(), Rows(), Rows()

    def _input(self, x: Stream, block: Block, start: int, lead: int) -> Tensor:
        """Spectrum of the frame's inputs with `lead` positions of history."""
        last = min(start + self.how.hop, len(x))
        return self.inputs.spectrum(x, block, start - lead, last, self.how.size)

    def _inverse(self, spectrum: Tensor, first: int, count: int) -> Tensor:
        return irfft_(spectrum, self.how.size)[..., first : first + count]

    def convolve(self, x: Stream, k: Taps, block: Block, y: Sink) -> None:
        taps = self.taps.spectrum(k, block, 0, len(k), self.how.size)
        for start in range(0, len(x), self.how.hop):
            lead = min(len(k) - 1, start)
            z = self._inverse(self._input(x, block, start, lead).mul_(taps), lead, self.how.hop)
            y.write(block, start, z)

    def gradients(
        self, dy: Stream, x: Stream, k: Taps, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = len(k), self.how.size, self.how.hop
        total: Tensor | None = None
        taps = self.taps.spectrum(k, block, 0, L, size)
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
                spectrum = self.ahead.spectrum(dy, block, start, last, size)
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
        return irfft_(total.sum_to_size(*k.rows(block), total.shape[-1]), size)[..., :L]


class ManyFrames:
    """Frames by a view with overlapping rows of a padded copy."""

    def __init__(self, how: Plan) -> None:
        self.how, self.taps, self.whole, self.inputs, self.ahead = how, Rows(), Rows(), Rows(), Rows()

    def _taps(self, k: Taps, block: Block) -> Tensor:
        """[b, g, q, 1, F]."""
        return self.taps.spectrum(k, block, 0, len(k), self.how.size)[..., None, :]

    def _spectra(self, rows: Rows, x: Stream, block: Block, before: int, filled: int) -> Tensor:
        """[B, g, p, count, F]: frame i holds `filled` values from `before` positions before i * hop on, then zeros."""
        count, hop, size = self.how.count, self.how.hop, self.how.size
        whole = self.whole.padded(x, block, 0, len(x), (count - 1) * hop + filled, before)
        frames = rows.empty(x, block, count, row_length(size, x.device.type))
        frames[..., :filled] = whole[..., : (count - 1) * hop + filled].unfold(-1, filled, hop)
        frames[..., filled:].zero_()
        return rfft_(frames, size)

    def convolve(self, x: Stream, k: Taps, block: Block, y: Sink) -> None:
        L, size = len(k), self.how.size
        spectra = self._spectra(self.inputs, x, block, L - 1, size).mul_(self._taps(k, block))
        y.write(block, 0, irfft_(spectra, size)[..., L - 1 :].flatten(-2)[..., : len(x)])

    def gradients(
        self, dy: Stream, x: Stream, k: Taps, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        L, size, hop = len(k), self.how.size, self.how.hop
        if y is not None:
            self.convolve(x, k, block, y)
        if dx is None and not need_k:
            return None
        spectra = self._spectra(self.ahead, dy, block, 0, size)
        dk: Tensor | None = None
        if need_k:
            product = self._spectra(self.inputs, x, block, 0, hop).conj_physical_().mul_(spectra).sum(dim=-2)
            dk = irfft_(product.sum_to_size(*k.rows(block), product.shape[-1]), size)[..., :L]
        if dx is not None:
            rows = irfft_(spectra.mul_(self._taps(k, block).conj_physical_()), size)[..., :hop]
            dx.write(block, 0, rows.flatten(-2)[..., : len(x)])
        return dk
