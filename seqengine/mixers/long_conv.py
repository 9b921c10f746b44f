"""Long convolutions whose taps are learned directly, and kept simple by squashing. Fu et al. 2023, arXiv:2302.06646."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Section
from seqengine.kernels import api as kernels
from seqengine.kernels.api import MonarchFactors
from seqengine.mixers.mixer import ParameterRule, Place
from seqengine.mixers.s4_layer import FilterLayer, Taps
from seqengine.parallel.context import SequenceContext

STD = {"random": 0.002, "double_exp": 0.02}
"""Standard deviation of initial taps at lag 0."""
MOST_SQUASHED = 3.0
"""In standard deviations: taps that all begin squashed to zero have no gradient."""


class LongConvConfig(Section):
    """[model.mixers.long_conv]: learned taps."""

    FORGOTTEN = frozenset({"init", "kernel_dropout", "filter_lr"})

    init: Literal["random", "double_exp"] = "double_exp"
    """random: small normal taps; double_exp: normal taps that decay with the lag, in later channels faster."""
    squash: Annotated[float, Field(ge=0.0)] = 0.003
    """Soft threshold: taps of less than this are zero, others shrink by it."""
    smooth: Annotated[int, Field(ge=1)] = 1
    """Taps are averaged over so many neighbours, odd; 1 = as they are."""
    kernel_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Taps dropped in training; not for sequences over several ranks."""
    filter_lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Largest learning rate of the taps."""
    parametrisation: Literal["taps", "butterfly"] = "taps"
    """taps: as they are; butterfly: seen through learned Monarch transforms, which begin as the Fourier transform."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.smooth % 2 == 0:
            raise ValueError(f"smooth must be odd (as many neighbours on both sides); got {self.smooth}")
        most = MOST_SQUASHED * STD[self.init]
        if self.squash > most:
            raise ValueError(
                f"squash must be at most {most:g} with init = {self.init!r}, or all taps begin and stay at zero; "
                f"got {self.squash}"
            )
        return self


class Butterfly(nn.Module):
    """Filters as the response of a learned convolution to an impulse: Re(Minv (M delta * M taps)).

    M and Minv are order-2 Monarch transforms of n >= 2 L - 1 points, n a power of two, shared by all channels; they
    begin as the Fourier transform and its inverse, and then the filter is the taps. The convolution that is made of
    learned transforms is neither causal nor the same at every token; its impulse response, used as a filter, is both.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        size = max(4, 1 << (2 * length - 2).bit_length())
        made = (("forward", kernels.dft_factors(size)), ("inverse", kernels.inverse_dft_factors(size)))
        self.factors = nn.ParameterDict(
            {
                f"{way}_{field}": nn.Parameter(torch.view_as_real(factor).contiguous())
                for way, factors in made
                for field, factor in factors._asdict().items()
            }
        )

    def forward(self, taps: Tensor, length: int) -> Tensor:
        """taps [C, L] -> the first `length` of the filters [C, length]."""
        impulse = F.pad(taps.new_ones(1, taps.shape[0], 1), (0, length - 1))
        forward, inverse = self._factors("forward"), self._factors("inverse")
        return kernels.monarch_conv(impulse, taps, forward, inverse)[0]

    def _factors(self, way: str) -> MonarchFactors:
        return MonarchFactors(*(torch.view_as_complex(self.factors[f"{way}_{f}"]) for f in MonarchFactors._fields))


def _initial_taps(init: str, place: Place) -> Tensor:
    """[d_model, max_len]"""
    channels, length = place.d_model, place.max_len
    taps = STD[init] * torch.randn(channels, length)
    if init == "double_exp":
        rate = (channels // 2) ** (torch.arange(channels) / channels)
        taps = taps * torch.exp(-rate[:, None] * torch.arange(length) / length)
    return taps


class LongConv(FilterLayer):
    """y = GLU(W gelu(k (*) x + skip * x)), k = squash(smooth(taps)) with max_len taps per channel.

    Without causality, as published: a second set of max_len taps a channel, begun, smoothed and squashed like the first, for
    the tokens that follow. The last of them meets no token of a sequence of max_len. That the transforms of a butterfly serve
    both sets is ours.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  FilterState, O(max_len D) numbers a sample; a token then costs O(max_len D).
    Raises: ValueError if taps would be dropped in training on a sequence over several ranks: the masks would differ.
            ValueError for a state without causality.
    """

    def __init__(self, config: LongConvConfig, place: Place) -> None:
        super().__init__(place)
        self.squash, self.smooth, self.kernel_dropout = config.squash, config.smooth, config.kernel_dropout
        self.taps = nn.Parameter(_initial_taps(config.init, place))
        self.taps_backward = None if place.causal else nn.Parameter(_initial_taps(config.init, place))
        self.butterfly = Butterfly(place.max_len) if config.parametrisation == "butterfly" else None
        slow = ParameterRule(weight_decay=0.0, lr_most=config.filter_lr)
        self.rules = {"taps": slow, "taps_backward": slow, "butterfly.*": slow}

    def filter(self, length: int, ctx: SequenceContext, *, backward: bool = False) -> Taps:
        taps = self.taps_backward if backward else self.taps
        assert taps is not None
        drops = self.training and self.kernel_dropout > 0.0
        if drops and ctx.size > 1:
            raise ValueError(
                f"long_conv: kernel_dropout must be 0 to train on sequences over several ranks; got {self.kernel_dropout} "
                f"on {ctx.size} ranks, which would drop different taps. Set parallel.sequence = 1."
            )

        def of_channels(channels: slice) -> Tensor:
            k = taps[channels]
            if self.butterfly is not None:
                k = self.butterfly(k, k.shape[1])
            if self.smooth > 1:
                k = F.avg_pool1d(k[None], self.smooth, stride=1, padding=self.smooth // 2)[0]
            k = torch.sign(k) * F.relu(k.abs() - self.squash)
            k = F.dropout(k, self.kernel_dropout) if drops else k
            return k[:, :length]

        return of_channels
