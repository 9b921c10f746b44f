"""Uniformly partitioned convolution: sequence and filter in pieces of C, so that no transform is longer than 2 C.

X_r is the spectrum of piece r of x padded to 2 C, G_r that of the 2 C values of dy from piece r on, K_m that of piece m of
the filter padded to 2 C: as many points in all as in one long transform, but each transform stays in the cache.

    y      piece r of the output comes from Z_r = sum_m X_{r-m} K_m: the first C values of irfft(Z_r) belong to
           piece r, the last C to piece r + 1
    dx_r = first C of irfft(sum_m G_{r+m} conj K_m)        dk_m = first C of irfft(sum_r G_{r+m} conj X_r)

The products cost R Q multiply-adds of spectra for R and Q pieces, which is why C grows with the longer of the two.

References: Stockham 1966 (sectioned convolution); the uniform partition of the filter: Wefers 2015, RWTH Aachen, chapter 5.
"""

from torch import Tensor

from seqengine.kernels.conv.plan import Block, Plan, pieces
from seqengine.kernels.conv.stream import Rows, Sink, Stream, Taps
from seqengine.kernels.conv.transforms import irfft_, rfft_, row_length


class Partitions:
    """Pieces of how.hop = C values."""

    def __init__(self, how: Plan) -> None:
        self.piece, self.taps, self.inputs, self.ahead = how.hop, Rows(), Rows(), Rows()

    def _spectra(self, rows: Rows, source: Stream | Taps, block: Block, reach: int) -> Tensor:
        """[B, g, p, R, C + 1]: spectra of 2 C points, of which the first `reach` are the source from each piece on."""
        C, R = self.piece, pieces(len(source), self.piece)
        own = rows.empty(source, block, R, row_length(2 * C, source.device.type))
        for r in range(R):
            filled = min(r * C + reach, len(source)) - r * C
            source.write(own[..., r, :filled], block, r * C, r * C + filled)
            own[..., r, filled:].zero_()
        return rfft_(own, 2 * C)

    def _output(self, inputs: Tensor, taps: Tensor, block: Block, y: Sink) -> None:
        C, R = self.piece, inputs.shape[-2]
        total = inputs * taps[..., :1, :]
        for m in range(1, taps.shape[-2]):
            total[..., m:, :].addcmul_(inputs[..., : R - m, :], taps[..., m : m + 1, :])
        both = irfft_(total, 2 * C)
        z: Tensor = both[..., :C]
        z[..., 1:, :] += both[..., :-1, C:]
        for r in range(R):
            y.write(block, r * C, z[..., r, :])

    def convolve(self, x: Stream, k: Taps, block: Block, y: Sink) -> None:
        inputs, taps = self._spectra(self.inputs, x, block, self.piece), self._spectra(self.taps, k, block, self.piece)
        self._output(inputs, taps, block, y)

    def gradients(
        self, dy: Stream, x: Stream, k: Taps, block: Block, dx: Sink | None, y: Sink | None, need_k: bool
    ) -> Tensor | None:
        C, R, Q = self.piece, pieces(len(x), self.piece), pieces(len(k), self.piece)
        if y is not None or need_k:
            inputs = self._spectra(self.inputs, x, block, C)
        if y is not None or dx is not None:
            taps = self._spectra(self.taps, k, block, C)
        if y is not None:
            self._output(inputs, taps, block, y)
        if dx is None and not need_k:
            return None
        spectra = self._spectra(self.ahead, dy, block, 2 * C)
        if dx is not None:
            taps.conj_physical_()
            total = spectra * taps[..., :1, :]
            for m in range(1, Q):
                total[..., : R - m, :].addcmul_(spectra[..., m:, :], taps[..., m : m + 1, :])
            found = irfft_(total, 2 * C)
            for r in range(R):
                dx.write(block, r * C, found[..., r, :C])
        if not need_k:
            return None
        inputs.conj_physical_()
        sums = spectra[..., :Q, :] * inputs[..., :1, :]
        for r in range(1, R):
            reached = min(Q, R - r)
            sums[..., :reached, :].addcmul_(spectra[..., r : r + reached, :], inputs[..., r : r + 1, :])
        dk = irfft_(sums.sum_to_size(*k.rows(block), Q, C + 1), 2 * C)[..., :C]
        return dk.flatten(-2)[..., : len(k)]
