"""Gated DeltaNet: Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464."""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Section
from seqengine.errors import InputError
from seqengine.mixers.heads import DECAY_RULES, HeadInputs, HeadNorm, InputDecay, exact, split_heads
from seqengine.mixers.mixer import Mixer, Place, Start, carried, context_of
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

LENGTH_EPS = 1e-6
"""Added to the squared length of queries and keys."""
DECAY_RANGE = 0.0, 16.0


class GatedDeltaConfig(Section):
    """[model.mixers.gated_delta]: Gated DeltaNet. Published with num_heads * head_dim = 0.75 * d_model."""

    num_heads: Annotated[int, Field(gt=0)] = 6
    """Heads, each with a state of its own."""
    head_dim: Annotated[int, Field(gt=0)] = 256
    """Channels of a head's queries and keys."""
    expand_v: Annotated[float, Field(gt=0.0)] = 2.0
    """Channels of a head's values, as a multiple of head_dim."""
    short_filter: Annotated[int, Field(ge=0)] = 4
    """Taps of the short convolution with SiLU on queries, keys and values; 0 = SiLU alone."""
    negative_eigenvalues: bool = False
    """Write strengths up to 2 instead of 1: a write may turn the state's sign (Grazzi et al. 2024, arXiv:2411.12537)."""
    output_gate: bool = True
    """Multiply the normed outputs by silu(W x)."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the mean square in the norm of the outputs."""


class GatedDeltaState(NamedTuple):
    """What Gated DeltaNet carries; its size does not depend on how many tokens there were."""

    short: Tensor
    """[B, channels of q, k and v, short_filter - 1]; empty without a short convolution."""
    recurrent: Tensor
    """[B, H, K, V], float32 at least."""


def unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dim, computed in float32 at least."""
    y = exact(x)
    return (y * torch.rsqrt(y.square().sum(dim=-1, keepdim=True) + LENGTH_EPS)).to(x.dtype)


class GatedDelta(Mixer):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = K^-1/2 q_t S_t; y = W_out (norm(o) * silu(W_gate x)).

    q and k have length 1; b = sigmoid(W_b x), and a = exp(-A softplus(W_a x + bias)), both in float32 at least.
    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  GatedDeltaState, about H K V numbers a sample; a token then costs O(H K V).
    """

    rules = DECAY_RULES

    def __init__(self, config: GatedDeltaConfig, place: Place) -> None:
        super().__init__()
        self.config, d_model, heads, K = config, place.d_model, config.num_heads, config.head_dim
        V = round(K * config.expand_v)
        if V < 1 or not math.isclose(V, K * config.expand_v):
            raise InputError(
                f"model.mixers.gated_delta: expand_v * head_dim = {K * config.expand_v:g} must be a whole number, at least 1; "
                "change one of them."
            )
        self.inputs = HeadInputs(d_model, (heads * K, heads * K, heads * V), config.short_filter)
        self.decay_proj = nn.Linear(d_model, heads, bias=False)
        self.decay = InputDecay(heads, *DECAY_RANGE)
        self.beta_proj = nn.Linear(d_model, heads, bias=False)
        self.gate = nn.Linear(d_model, heads * V, bias=False) if config.output_gate else None
        self.norm = HeadNorm(V, eps=config.norm_eps)
        self.out_proj = nn.Linear(heads * V, d_model, bias=False)

    def forward(
        self, x: Tensor, *, state: GatedDeltaState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, GatedDeltaState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        heads = self.config.num_heads
        tensors, short = self.inputs(x, context, None if before is None else before.short, goes_on)
        if not self.config.short_filter:
            tensors = [F.silu(t) for t in tensors]
        q, k, v = (split_heads(t, heads) for t in tensors)
        _, g = self.decay(self.decay_proj(x))
        beta = torch.sigmoid(exact(self.beta_proj(x)))
        o, recurrent = parallel.delta_rule(
            unit_length(q),
            unit_length(k),
            v,
            2 * beta if self.config.negative_eigenvalues else beta,
            g,
            ctx=context,
            initial_state=None if before is None else before.recurrent,
            output_final_state=goes_on,
        )
        o = self.norm(o, None if self.gate is None else split_heads(self.gate(x), heads))
        y = self.out_proj(o.flatten(2))
        return y, None if short is None or recurrent is None else GatedDeltaState(short, recurrent)
