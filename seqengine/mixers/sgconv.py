"""SGConv: long filters of few parameters, put together of pieces at growing scales. Li et al. 2022, arXiv:2210.09298."""

import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from seqengine.config.values import Section
from seqengine.mixers.mixer import ParameterRule, Place
from seqengine.mixers.s4_layer import FilterLayer, Taps
from seqengine.parallel.context import SequenceContext


class SGConvConfig(Section):
    """[model.mixers.sgconv]: filters of pieces at growing scales."""

    FORGOTTEN = frozenset({"decay_min", "decay_max", "filter_lr"})

    kernel_dim: Annotated[int, Field(ge=1)] = 64
    """Parameters of each piece and channel; the filter has about log2(max_len / kernel_dim) + 1 pieces."""
    decay_min: Annotated[float, Field(gt=0.0)] = 2.0
    """By how much each piece is larger than the next at first: of the first channel."""
    decay_max: Annotated[float, Field(gt=0.0)] = 2.0
    """Of the last channel; between them linearly."""
    filter_lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Largest learning rate of the pieces."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.decay_min > self.decay_max:
            raise ValueError(f"decay_min must not be above decay_max; got {self.decay_min} > {self.decay_max}")
        return self


def stretch(piece: Tensor, factor: int) -> Tensor:
    """piece [C, N] -> [C, N factor]: linear interpolation between the middles of equal cells, constant beyond the ends.

    A product with a [3, factor] table of weights, of the cells before, at and after: no scattered sums in the backward.
    """
    if factor == 1:
        return piece
    offset = (torch.arange(factor, dtype=piece.dtype, device=piece.device) + 0.5) / factor - 0.5
    weights = torch.stack([(-offset).relu(), 1 - offset.abs(), offset.relu()])
    before = torch.cat([piece[:, :1], piece[:, :-1]], dim=1)
    after = torch.cat([piece[:, 1:], piece[:, -1:]], dim=1)
    return (torch.stack([before, piece, after], dim=-1) @ weights).flatten(1)


class SGConv(FilterLayer):
    """y = GLU(W gelu(k (*) x + skip * x)), k = [w_0, w_1, stretch(w_2, 2), stretch(w_3, 4), ..] / norm, pieces weighted.

    Piece i of S is multiplied by decay^(S - 1 - i), so that the filter falls off with the lag as a power law. The norm is that
    of the whole initial filter of each channel, and stays.

    Without causality, as in the authors' code: a second set of pieces, normal as the first, with the same decay and a norm of
    its own, for the tokens that follow.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  FilterState, O(max_len D) numbers a sample; a token then costs O(max_len D).
    Raises: ValueError for a state without causality.
    """

    decay: Tensor
    norm: Tensor
    norm_backward: Tensor

    def __init__(self, config: SGConvConfig, place: Place) -> None:
        super().__init__(place)
        scales = 1 + max(0, math.ceil(math.log2(place.max_len / config.kernel_dim)))
        shape = (place.d_model, config.kernel_dim)
        self.pieces = nn.ParameterList(torch.randn(shape) for _ in range(scales))
        self.register_buffer("decay", torch.linspace(config.decay_min, config.decay_max, place.d_model)[:, None])
        self.register_buffer("norm", self._norm())
        self.pieces_backward: nn.ParameterList | None = None
        if not place.causal:
            self.pieces_backward = nn.ParameterList(torch.randn(shape) for _ in range(scales))
            self.register_buffer("norm_backward", self._norm(backward=True))
        slow = ParameterRule(lr_most=config.filter_lr)
        self.rules = {"pieces.*": slow, "pieces_backward.*": slow}

    def _norm(self, *, backward: bool = False) -> Tensor:
        """[d_model, 1]"""
        with torch.no_grad():
            norm: Tensor = self._whole(slice(0, self.d_model), backward=backward).norm(dim=1, keepdim=True)
        return norm

    def _whole(self, channels: slice, *, backward: bool = False) -> Tensor:
        """[C, kernel_dim 2^(S - 1)]: the filter before it is normalised and cut."""
        pieces = self.pieces_backward if backward else self.pieces
        assert pieces is not None
        last = len(pieces) - 1
        return torch.cat(
            [
                stretch(piece[channels], 2 ** max(0, i - 1)) * self.decay[channels] ** (last - i)
                for i, piece in enumerate(pieces)
            ],
            dim=1,
        )

    def filter(self, length: int, ctx: SequenceContext, *, backward: bool = False) -> Taps:
        norm = self.norm_backward if backward else self.norm
        return lambda channels: self._whole(channels, backward=backward)[:, :length] / norm[channels]
