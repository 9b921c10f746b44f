"""Gated linear attention, as flash-linear-attention publishes it: Yang et al. 2023, arXiv:2312.06635."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Section
from seqengine.mixers.heads import HeadInputs, HeadNorm, exact, head_width, repeat_heads, split_heads
from seqengine.mixers.mixer import Mixer, Place, Start, carried, context_of
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

FeatureMap = Literal["identity", "relu", "squared_relu", "sigmoid", "silu"]
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


class GlaConfig(Section):
    """[model.mixers.gla]: gated linear attention."""

    num_heads: Annotated[int, Field(gt=0)] = 4
    """Heads, each with a state of its own."""
    num_kv_heads: Annotated[int, Field(gt=0)] | None = None
    """Heads of keys, values and gates, each shared by num_heads / num_kv_heads heads of queries; num_heads if not given."""
    expand_k: Annotated[float, Field(gt=0.0)] = 0.5
    """Channels of all queries, as a multiple of d_model."""
    expand_v: Annotated[float, Field(gt=0.0)] = 1.0
    """Channels of all outputs, as a multiple of d_model."""
    feature_map: FeatureMap = "identity"
    """Of queries and keys."""
    short_filter: Annotated[int, Field(ge=0)] = 0
    """Taps of a short convolution with SiLU on queries, keys and values; 0 = none."""
    gate_rank: Annotated[int, Field(gt=0)] = 16
    """Rank of the projection that makes the gates."""
    gate_normalizer: Annotated[float, Field(gt=0.0)] = 16.0
    """The logarithms of the gates are divided by this: the larger, the slower they forget."""
    gate_min: Annotated[float, Field(lt=0.0)] | None = None
    """Least logarithm of a gate; none if not given."""
    output_gate: bool = True
    """Multiply the normed outputs by silu(W x)."""
    norm_weight: bool = True
    """A weight for each channel in the norm of the outputs."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the mean square in the norm of the outputs."""

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        return self


class GlaState(NamedTuple):
    """What gated linear attention carries; its size does not depend on how many tokens there were."""

    short: Tensor
    """[B, channels of q, k and v, short_filter - 1]; empty without a short convolution."""
    recurrent: Tensor
    """[B, H, K, V], float32 at least."""


class Gla(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = K^-1/2 q_t S_t; y = W_out (norm(o) * silu(W_gate x)).

    The gates are a = sigmoid(W_2 W_1 x + b) ** (1 / gate_normalizer), computed in float32 at least; the norm is an RMSNorm
    over each head's values with one weight for all heads.
    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  GlaState, about H K V numbers a sample; a token then costs O(H K V).
    """

    def __init__(self, config: GlaConfig, place: Place) -> None:
        super().__init__()
        self.config, d_model, heads = config, place.d_model, config.num_heads
        K = head_width("gla", "expand_k", config.expand_k, d_model, heads)
        V = head_width("gla", "expand_v", config.expand_v, d_model, heads)
        self.kv_heads = config.num_kv_heads or heads
        widths = heads * K, self.kv_heads * K, self.kv_heads * V
        self.inputs = HeadInputs(d_model, widths, config.short_filter)
        self.decay_in = nn.Linear(d_model, config.gate_rank, bias=False)
        self.decay_out = nn.Linear(config.gate_rank, self.kv_heads * K)
        self.gate = nn.Linear(d_model, heads * V, bias=False) if config.output_gate else None
        self.norm = HeadNorm(V, eps=config.norm_eps, affine=config.norm_weight)
        self.out_proj = nn.Linear(heads * V, d_model, bias=False)

    def forward(
        self, x: Tensor, *, state: GlaState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, GlaState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        heads, shared_by = self.config.num_heads, self.config.num_heads // self.kv_heads
        (q, k, v), short = self.inputs(x, context, None if before is None else before.short, goes_on)
        feature_map = FEATURE_MAPS[self.config.feature_map]
        k, v, g = (repeat_heads(split_heads(t, self.kv_heads), shared_by) for t in (feature_map(k), v, self._decay(x)))
        o, recurrent = parallel.gla(
            split_heads(feature_map(q), heads),
            k,
            v,
            g,
            ctx=context,
            initial_state=None if before is None else before.recurrent,
            output_final_state=goes_on,
        )
        o = self.norm(o, None if self.gate is None else split_heads(self.gate(x), heads))
        y = self.out_proj(o.flatten(2))
        return y, None if short is None or recurrent is None else GlaState(short, recurrent)

    def _decay(self, x: Tensor) -> Tensor:
        """[B, T, D] -> the logarithms of the gates [B, T, kv_heads * K]."""
        g = F.logsigmoid(exact(self.decay_out(self.decay_in(x)))) / self.config.gate_normalizer
        return g if self.config.gate_min is None else g.clamp(min=self.config.gate_min)
