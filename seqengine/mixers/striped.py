"""What the three operators of StripedHyena 2 share: y = W_out (post * (k (*) (pre * v))), and they differ in k alone.

Ku et al. 2025, arXiv:2503.01868. post, pre and v are projections of x, each channel of which goes through a short convolution.
"""

from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from seqengine.config.values import Count, Section
from seqengine.errors import InputError
from seqengine.mixers.mixer import Mixer, ParameterRule, Place, Start, carried, context_of
from seqengine.mixers.projection import channels_first
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

Positive = Annotated[Count, Field(gt=0)]


class StripedConfig(Section):
    """What all three have."""

    short_filter: Positive = 3
    """Taps of the short convolution of gates and input."""
    short_bias: bool = False
    """Bias of the short convolution."""
    bias: bool = False
    """Biases of the projections of gates and input."""
    out_bias: bool = True
    """Bias of the output."""


class StripedState(NamedTuple):
    """What an operator of StripedHyena 2 carries; its size does not depend on how many tokens there were."""

    short: Tensor
    """[B, 3 D, short_filter - 1]."""
    inner: Tensor
    """Of the filter: its last gated inputs [B, D, taps - 1], or the state of its modes [B, D, N]."""


class Gated(NamedTuple):
    """What the filter of an operator sees, each [B, D, T]."""

    post: Tensor
    pre: Tensor
    value: Tensor


class StripedOperator(Mixer):
    """Projections, short convolution and output around `filtered`, which a kind of operator gives.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    """

    def __init__(self, config: StripedConfig, place: Place) -> None:
        super().__init__()
        width, bound = 3 * place.d_model, config.short_filter**-0.5
        self.in_proj = nn.Linear(place.d_model, width, bias=config.bias)
        self.short_weight = nn.Parameter(torch.empty(width, config.short_filter).uniform_(-bound, bound))
        self.short_bias = nn.Parameter(torch.zeros(width)) if config.short_bias else None
        self.out_proj = nn.Linear(place.d_model, place.d_model, bias=config.out_bias)

    def filtered(self, u: Gated, **states: Any) -> tuple[Tensor, Tensor | None]:
        """post * (k (*) (pre * value)), and the filter's state; states: ctx, initial_state, output_final_state."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, state: StripedState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, StripedState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        u, short = parallel.short_conv(
            channels_first(x, self.in_proj),
            self.short_weight,
            self.short_bias,
            ctx=context,
            initial_state=None if before is None else before.short,
            output_final_state=goes_on,
        )
        y, inner = self.filtered(
            Gated(*u.chunk(3, dim=1)),
            ctx=context,
            initial_state=None if before is None else before.inner,
            output_final_state=goes_on,
        )
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out, None if short is None or inner is None else StripedState(short, inner)


def undecayed(*names: str) -> dict[str, ParameterRule]:
    """Rules by which some parameters have no weight decay, as published for all filters."""
    return dict.fromkeys(names, ParameterRule(weight_decay=0.0))


def check_groups(mixer: str, num_groups: int | None, d_model: int) -> int:
    """How many filters there are. Raises InputError if channels cannot share them evenly."""
    groups = d_model if num_groups is None else num_groups
    if d_model % groups:
        raise InputError(
            f"model.mixers.{mixer}.num_groups = {groups} must divide model.d_model = {d_model}; leave it out for a filter "
            "per channel."
        )
    return groups
