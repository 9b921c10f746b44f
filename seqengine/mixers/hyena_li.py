"""Hyena-LI of StripedHyena 2: a filter as long as the sequence, a sum of decaying exponentials.

Ku et al. 2025, arXiv:2503.01868.
"""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from seqengine.mixers.heads import exact
from seqengine.mixers.mixer import Place
from seqengine.mixers.striped import Gated, Positive, StripedConfig, StripedOperator, undecayed
from seqengine.parallel import api as parallel

PositiveRate = Annotated[float, Field(gt=0.0)]
INITIAL_P = -1.0
RESIDUE_SCALE = 0.1


class HyenaLIConfig(StripedConfig):
    """[model.mixers.hyena_li]: gates and a filter without end."""

    FORGOTTEN = frozenset({"gamma_min", "gamma_max"})

    state_size: Positive = 16
    """Exponentials N a channel."""
    gamma_min: PositiveRate = 0.01
    """Smallest initial rate; exp(-1) times it is the decay per token."""
    gamma_max: PositiveRate = 0.1
    """Largest initial rate; initial rates are uniform between both."""
    poles: Literal["rates", "log"] = "rates"
    """What is trained: rates = two logarithms whose sum is that of the decay per token; log = the logarithms of the poles
    themselves, as weights for inference are published; these may grow beyond 0."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.gamma_min > self.gamma_max:
            raise ValueError(f"gamma_min = {self.gamma_min} must be at most gamma_max = {self.gamma_max}")
        return self


class HyenaLI(StripedOperator):
    """y = W_out (post * (k (*) (pre * v) + skip * pre * v)), k[d, t] = sum_n residues[d, n] exp(log_poles[d, n] t).

    log_poles = -exp(p) exp(gamma), real and below 0.
    State:  StripedState, N D + 3 (short_filter - 1) D numbers a sample; a token then costs O(N D).
    """

    keeps_documents_apart = False

    rules = undecayed("p", "gamma", "log_poles", "residues", "short_weight", "skip")

    def __init__(self, config: HyenaLIConfig, place: Place) -> None:
        super().__init__(config, place)
        shape = (place.d_model, config.state_size)
        gamma = torch.empty(shape).uniform_(config.gamma_min, config.gamma_max).log()
        p = torch.full(shape, INITIAL_P)
        self.log_poles: nn.Parameter | None = None
        if config.poles == "log":
            self.log_poles = nn.Parameter(-torch.exp(p + gamma))
        else:
            self.p, self.gamma = nn.Parameter(p), nn.Parameter(gamma)
        self.residues = nn.Parameter(RESIDUE_SCALE * torch.randn(shape) * config.state_size**-0.5)
        self.skip = nn.Parameter(torch.empty(place.d_model).uniform_(-1, 1) * place.max_len**-0.5)

    def log_poles_now(self) -> Tensor:
        """[D, N], in float32 at least."""
        if self.log_poles is not None:
            return exact(self.log_poles)
        return -torch.exp(exact(self.p) + exact(self.gamma))

    def filtered(self, u: Gated, **states: Any) -> tuple[Tensor, Tensor | None]:
        log_poles, residues, skip = self.log_poles_now(), exact(self.residues), exact(self.skip)
        return parallel.modal_conv(u.value, log_poles, residues, skip=skip, pre_gate=u.pre, post_gate=u.post, **states)
