"""Rotary position embedding: pairs of channels of queries and keys turn by an angle that grows with the position.

Su et al. 2021, arXiv:2104.09864; position interpolation: Chen et al. 2023, arXiv:2306.15595.
"""

import torch
from torch import Tensor, nn


def inverse_frequencies(rotary_dim: int, base: float) -> Tensor:
    """base^(-2i / rotary_dim), i = 0 .. rotary_dim / 2 - 1, float64: radians a token of each pair."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return torch.as_tensor(base, dtype=torch.float64) ** -exponents


class Rotary(nn.Module):
    """x -> x with pair i of its first rotary_dim channels turned by position / scale * frequency i; other channels stay.

    Shapes: x [B, T, H, K]; positions [T], or [B, T] if they differ from sample to sample.
    Pairs:  interleaved: channels 2i and 2i + 1; else i and i + rotary_dim / 2.
    Dtypes: angles in float64, so that a million positions are as exact as ten; sines, cosines and products in float32, or
            float64 for such x.
    Weights may come with frequencies of their own, such as rounded ones: they are saved with the model, as the bits of float64
    numbers, which no cast of the model to another dtype touches.
    """

    frequency_bits: Tensor

    def __init__(
        self, rotary_dim: int, *, base: float = 10000.0, scale: float = 1.0, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.rotary_dim, self.base, self.scale, self.interleaved = rotary_dim, base, scale, interleaved
        self.register_buffer("frequency_bits", inverse_frequencies(rotary_dim, base).view(torch.int64))

    @property
    def frequencies(self) -> Tensor:
        """[rotary_dim / 2] float64, radians a token before `scale`."""
        return self.frequency_bits.view(torch.float64)

    def set_frequencies(self, frequencies: Tensor) -> None:
        """Replace them: [rotary_dim / 2]."""
        self.frequency_bits.copy_(frequencies.double().view(torch.int64))

    def forward(self, positions: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The tensors [B, T, H, K], turned, each in its own dtype."""
        angles = (positions.double() / self.scale)[..., None] * self.frequencies
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        cosines, sines = torch.cos(angles).to(dtype)[..., None, :], torch.sin(angles).to(dtype)[..., None, :]
        return [self._turn(x, cosines, sines) for x in tensors]

    def _turn(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        turning, rest = x.split([self.rotary_dim, x.shape[-1] - self.rotary_dim], dim=-1)
        a, b = turning.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else turning.chunk(2, dim=-1)
        pair = (a * cosines - b * sines, b * cosines + a * sines)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)
