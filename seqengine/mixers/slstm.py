"""The sLSTM: a recurrent cell with exponential gates, a normaliser, and memory mixing within heads.

Beck et al. 2024, arXiv:2405.04517. The paper's block then has a gated MLP: `model.mlp = "geglu"` with d_inner = 4/3 d_model.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Count, Section
from seqengine.errors import InputError
from seqengine.mixers.heads import exact, split_heads
from seqengine.mixers.mixer import Mixer, ParameterRule, Place, Start, carried, context_of
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

NUM_GATES = 4
"""i, f, z, o, in the order of the kernel."""
FORGET_MOST, FORGET_RANGE = 5.0, 12.0
"""The forget gates' biases fall from 5 to -7 within each head."""


class SLstmConfig(Section):
    """[model.mixers.slstm]: a recurrent cell; sequential in time."""

    num_heads: Annotated[Count, Field(gt=0)] = 4
    """Heads that each have recurrent matrices of their own; divides d_model."""
    short_filter: Annotated[Count, Field(ge=0)] = 4
    """Taps of the convolution before the input and forget gates; 0 for none."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance in the norm of each head's outputs."""


class SLstmState(NamedTuple):
    """What an sLSTM carries; its size does not depend on how many tokens there were."""

    short: Tensor
    """[B, D, short_filter - 1]; empty without a short convolution."""
    h: Tensor
    """[B, H, K]: the output, which the recurrent matrices see."""
    c: Tensor
    """[B, H, K]: the memory."""
    n: Tensor
    """[B, H, K]: the normaliser; 0 before the first token."""
    m: Tensor
    """[B, H, K]: the stabiliser, a logarithm."""


class SLstm(Mixer):
    """y = norm over each head of h, h[t] = sLSTM(W x[t] + b + R h[t-1]), with W and R block-diagonal.

    The input and forget gates see silu(short convolution of x), the memory's input z and the output gate see x itself. There is
    no projection of the outputs: the MLP that follows mixes the heads.
    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    Dtypes: gates and cell in float32 at least.
    State:  SLstmState, 4 D + (short_filter - 1) D numbers a sample; a token costs O(D^2 / H).
    """

    keeps_documents_apart = False

    rules: Mapping[str, ParameterRule] = {
        "gate_bias": ParameterRule(weight_decay=0.0),
        "norm_weight": ParameterRule(weight_decay=0.0),
    }

    def __init__(self, config: SLstmConfig, place: Place) -> None:
        super().__init__()
        d_model, heads = place.d_model, config.num_heads
        if d_model % heads:
            raise InputError(f"model.mixers.slstm.num_heads = {heads} must divide model.d_model = {d_model}.")
        self.heads, self.norm_eps, K = heads, config.norm_eps, d_model // heads
        self.short_weight: nn.Parameter | None = None
        self.short_bias: nn.Parameter | None = None
        if config.short_filter:
            bound = config.short_filter**-0.5  # torch's rule for convolutions
            self.short_weight = nn.Parameter(torch.empty(d_model, config.short_filter).uniform_(-bound, bound))
            self.short_bias = nn.Parameter(torch.empty(d_model).uniform_(-bound, bound))
        self.gate_weight = nn.Parameter(torch.randn(NUM_GATES, heads, K, K) * (2 / (5 * d_model)) ** 0.5)
        self.gate_bias = nn.Parameter(torch.zeros(NUM_GATES, heads, K))
        self.recurrent = nn.Parameter(torch.zeros(NUM_GATES, heads, K, K))
        self.norm_weight = nn.Parameter(torch.ones(heads, K))
        depth = place.layer / (place.num_layers - 1) if place.num_layers > 1 else 0.0
        place_in_head = torch.linspace(0, 1, K) ** (0.3 + 1.3 * depth)
        with torch.no_grad():
            self.gate_bias[1] = FORGET_MOST - FORGET_RANGE * place_in_head

    def forward(
        self, x: Tensor, *, state: SLstmState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, SLstmState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        convolved, short = self._convolved(x, context, before, goes_on)
        h, after = parallel.rnn(
            self._gates(convolved, x),
            self.recurrent,
            ctx=context,
            cell="slstm",
            initial_state=None if before is None else (before.h, before.c, before.n, before.m),
            output_final_state=goes_on,
        )
        y = F.layer_norm(h, h.shape[-1:], eps=self.norm_eps) * exact(self.norm_weight)
        return y.flatten(2).to(x.dtype), None if after is None else SLstmState(short, *after)

    def _convolved(
        self, x: Tensor, ctx: SequenceContext, before: SLstmState | None, goes_on: bool
    ) -> tuple[Tensor, Tensor]:
        """What the input and forget gates see, and the short convolution's state."""
        if self.short_weight is None:
            return x, x.new_empty(x.shape[0], x.shape[2], 0)
        y, after = parallel.short_conv(
            x.transpose(1, 2),
            self.short_weight,
            self.short_bias,
            ctx=ctx,
            activation="silu",
            initial_state=None if before is None else before.short,
            output_final_state=goes_on,
        )
        return y.transpose(1, 2), x.new_empty(0) if after is None else after

    def _gates(self, convolved: Tensor, x: Tensor) -> Tensor:
        """[B, T, 4, H, K] with the biases, in float32 at least."""
        seen = ((convolved, self.gate_weight[:2]), (x, self.gate_weight[2:]))
        pairs = [torch.einsum("bthj,ghkj->btghk", split_heads(z, self.heads), weight) for z, weight in seen]
        return exact(torch.cat(pairs, dim=2)) + exact(self.gate_bias)
