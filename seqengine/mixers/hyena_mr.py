"""Hyena-MR of StripedHyena 2: an explicit filter of about a hundred taps that decays with the lag.

Ku et al. 2025, arXiv:2503.01868.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqengine.mixers.heads import exact
from seqengine.mixers.mixer import Place
from seqengine.mixers.striped import Gated, Positive, StripedConfig, StripedOperator, check_groups, undecayed
from seqengine.parallel import api as parallel

SLOWEST = {"weak": -2.0, "normal": -1.0, "strong": 0.0}
FASTEST = 2.0
"""Powers of ten of the decay rates of the first and the last filter, over `decay_tokens`."""
INITIAL_SCALE = 1e-5
"""Of the filters at first: then the skip connection is almost all there is."""


class HyenaMRConfig(StripedConfig):
    """[model.mixers.hyena_mr]: gates and a filter of middle length."""

    taps: Positive = 128
    """Taps of the filter."""
    num_groups: Positive | None = None
    """Filters, each for d_model / num_groups neighbouring channels; one per channel if not given (published: 16 share one)."""
    decay: Literal["none", "weak", "normal", "strong"] = "weak"
    """The taps are multiplied by exp(-rate * lag / decay_tokens); rates go from 0.01 (weak), 0.1 or 1 (strong) to 100."""
    decay_tokens: Positive | None = None
    """max_len if not given."""
    skip: bool = True
    """Whether the filter has a tap at lag 0 for each channel, beside those that its group shares."""

    @property
    def is_told_by_max_len(self) -> bool:
        return self.decay != "none" and self.decay_tokens is None


class HyenaMR(StripedOperator):
    """y = W_out (post * (k (*) (pre * v) + skip * pre * v)), k[g, s] = h[g, s] exp(-rate[g] s / (decay_tokens - 1)).

    State: StripedState, (taps - 1) D + 3 (short_filter - 1) D numbers a sample.
    """

    rules = undecayed("filter", "short_weight", "skip")

    def __init__(self, config: HyenaMRConfig, place: Place) -> None:
        super().__init__(config, place)
        self.groups, self.taps = check_groups("hyena_mr", config.num_groups, place.d_model), config.taps
        self.decay, self.decay_tokens = config.decay, config.decay_tokens or place.max_len
        scale = INITIAL_SCALE * self.decay_tokens**-0.5
        self.filter = nn.Parameter(torch.randn(self.groups, config.taps) * scale)
        """h [G, taps], lag 0 first."""
        self.skip: nn.Parameter | None = None
        if config.skip:
            self.skip = nn.Parameter(torch.empty(place.d_model).uniform_(-1, 1) * config.taps**-0.5)

    def window(self) -> Tensor | None:
        """[G, taps] float64: what the taps are multiplied by."""
        if self.decay == "none":
            return None
        device, slowest = self.filter.device, SLOWEST[self.decay]
        rates = torch.logspace(slowest, FASTEST, self.groups, dtype=torch.float64, device=device)
        lags = torch.arange(self.taps, dtype=torch.float64, device=device) / max(1, self.decay_tokens - 1)
        return torch.exp(-rates[:, None] * lags)

    def taps_now(self) -> Tensor:
        """k [G, taps], in float32 at least."""
        h, window = exact(self.filter), self.window()
        return h if window is None else h * window.to(h.dtype)

    def filtered(self, u: Gated, **states: Any) -> tuple[Tensor, Tensor | None]:
        k, skip = self.taps_now(), None if self.skip is None else exact(self.skip)
        return parallel.long_conv(u.value, k, skip=skip, pre_gate=u.pre, post_gate=u.post, **states)
