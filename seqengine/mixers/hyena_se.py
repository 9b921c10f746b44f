"""Hyena-SE of StripedHyena 2: a short explicit filter, for patterns of a few tokens. Ku et al. 2025, arXiv:2503.01868."""

from typing import Any

import torch
from torch import Tensor, nn

from seqengine.mixers.heads import exact
from seqengine.mixers.mixer import Place
from seqengine.mixers.striped import Gated, Positive, StripedConfig, StripedOperator, check_groups, undecayed
from seqengine.parallel import api as parallel


class HyenaSEConfig(StripedConfig):
    """[model.mixers.hyena_se]: gates and a short explicit filter."""

    taps: Positive = 7
    """Taps of the filter."""
    num_groups: Positive | None = None
    """Filters, each for d_model / num_groups neighbouring channels; one per channel if not given (published: 16 share one)."""
    skip: bool = False
    """Whether the filter has a tap at lag 0 for each channel, beside those that its group shares."""


class HyenaSE(StripedOperator):
    """y = W_out (post * (k (*) (pre * v))) with a trained k of a few taps.

    State: StripedState, (taps - 1) D + 3 (short_filter - 1) D numbers a sample.
    """

    rules = undecayed("filter", "short_weight", "skip")

    def __init__(self, config: HyenaSEConfig, place: Place) -> None:
        super().__init__(config, place)
        groups, bound = check_groups("hyena_se", config.num_groups, place.d_model), config.short_filter**-0.5
        self.filter = nn.Parameter(torch.empty(groups, config.taps).uniform_(-bound, bound))
        """[G, taps], lag 0 first."""
        self.skip: nn.Parameter | None = None
        if config.skip:
            self.skip = nn.Parameter(torch.empty(place.d_model).uniform_(-1, 1) * config.taps**-0.5)

    def filtered(self, u: Gated, **states: Any) -> tuple[Tensor, Tensor | None]:
        k, skip = exact(self.filter), None if self.skip is None else exact(self.skip)
        return parallel.long_conv(u.value, k, skip=skip, pre_gate=u.pre, post_gate=u.post, **states)
