"""Linear attention: Katharopoulos et al. 2020, arXiv:2006.16236."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Section
from seqengine.mixers.heads import HeadInputs, HeadNorm, exact, head_width, split_heads
from seqengine.mixers.mixer import Mixer, Place, Start, carried, context_of
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 without cancellation: exp(x) below 0."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "relu": F.relu, "identity": lambda x: x}
DENOMINATOR_EPS = 1e-6


class LinearAttentionConfig(Section):
    """[model.mixers.linear_attention]: attention with a kernel of features instead of the softmax."""

    num_heads: Annotated[int, Field(gt=0)] = 8
    """Heads, each with a state of its own."""
    expand_k: Annotated[float, Field(gt=0.0)] = 1.0
    """Channels of all queries and of all keys, as a multiple of d_model."""
    expand_v: Annotated[float, Field(gt=0.0)] = 1.0
    """Channels of all values, as a multiple of d_model."""
    feature_map: Literal["elu", "relu", "identity"] = "elu"
    """Of queries and keys; elu is elu(x) + 1."""
    normalize: bool = True
    """Divide by the sum of the weights, so that the outputs are means of values; needs features that are not negative."""
    output_norm: bool = False
    """RMSNorm over each head's outputs."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the mean square in that norm."""
    bias: bool = True
    """Biases in all projections."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.normalize and self.feature_map == "identity":
            raise ValueError(
                "normalize divides by a sum of weights, which feature_map = 'identity' may make 0; set it false"
            )
        return self


class LinearAttentionState(NamedTuple):
    """What linear attention carries."""

    recurrent: Tensor
    """[B, H, K, V], float32 at least; with normalize [B, H, K, V + 1], the sum of keys last."""


class LinearAttention(Mixer):
    """o_t = sum_{s <= t} (f(q_t) f(k_s)) v_s / (1e-6 + sum_{s <= t} f(q_t) f(k_s)); y = W_out o.

    The denominator is the output for one more value, which is always 1: one scan gives both. Without normalize, the
    scale is K^-1/2 and there is none.
    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  LinearAttentionState, about H K V numbers a sample; a token then costs O(H K V).
    """

    def __init__(self, config: LinearAttentionConfig, place: Place) -> None:
        super().__init__()
        self.config, d_model, heads = config, place.d_model, config.num_heads
        K = head_width("linear_attention", "expand_k", config.expand_k, d_model, heads)
        V = head_width("linear_attention", "expand_v", config.expand_v, d_model, heads)
        self.inputs = HeadInputs(d_model, (heads * K, heads * K, heads * V), bias=config.bias)
        self.norm = HeadNorm(V, eps=config.norm_eps) if config.output_norm else None
        self.out_proj = nn.Linear(heads * V, d_model, bias=config.bias)

    def forward(
        self, x: Tensor, *, state: LinearAttentionState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        tensors, _ = self.inputs(x, context, None, goes_on)
        q, k, v = (split_heads(t, self.config.num_heads) for t in tensors)
        feature_map, dtype, normalize = FEATURE_MAPS[self.config.feature_map], v.dtype, self.config.normalize
        if normalize:
            v = torch.cat([exact(v), torch.ones_like(exact(v[..., :1]))], dim=-1)
        o, recurrent = parallel.simple_gla(
            feature_map(q),
            feature_map(k),
            v,
            ctx=context,
            scale=1.0 if normalize else None,
            initial_state=None if before is None else before.recurrent,
            output_final_state=goes_on,
        )
        if normalize:
            o = (o[..., :-1] / (o[..., -1:] + DENOMINATOR_EPS)).to(dtype)
        if self.norm is not None:
            o = self.norm(o)
        y = self.out_proj(o.flatten(2))
        assert not isinstance(recurrent, tuple)
        return y, None if recurrent is None else LinearAttentionState(recurrent)
