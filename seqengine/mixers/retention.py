"""Multi-scale retention, the mixer of RetNet: Sun et al. 2023, arXiv:2307.08621."""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from seqengine.config.values import Section
from seqengine.errors import InputError
from seqengine.mixers.heads import HeadInputs, HeadNorm, exact, head_width, split_heads
from seqengine.mixers.mixer import Mixer, Place, Start, carried, context_of
from seqengine.mixers.rotary import Rotary
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

INITIAL_GAIN = 2**-2.5
"""Of the projections in, as published."""


class RetentionConfig(Section):
    """[model.mixers.retention]: linear attention with a fixed decay for each head."""

    num_heads: Annotated[int, Field(gt=0)] = 8
    """Heads; head h forgets 2^(-5 - h) of its state at each token."""
    expand_k: Annotated[float, Field(gt=0.0)] = 1.0
    """Channels of all queries and of all keys, as a multiple of d_model; even for each head."""
    expand_v: Annotated[float, Field(gt=0.0)] = 2.0
    """Channels of all values, as a multiple of d_model."""
    rotary_base: Annotated[float, Field(gt=0.0)] = 10000.0
    """The slowest pair of channels turns about 1 / rotary_base of a radian a token."""
    output_gate: bool = True
    """Multiply the normed outputs by silu(W x)."""
    norm_weight: bool = True
    """A weight for each channel in the norm of the outputs."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the mean square in the norm of the outputs."""


class RetentionState(NamedTuple):
    """What retention carries; its size does not depend on how many tokens there were."""

    recurrent: Tensor
    """[B, H, K, V], float32 at least."""
    length: Tensor
    """[B] int64: tokens so far."""


def log_decays(num_heads: int, device: torch.device) -> Tensor:
    """log(1 - 2^(-5 - h)) of head h, [H] float64."""
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5.0 - heads))


class Retention(Mixer):
    """S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T, o_t = K^-1/2 q_t S_t in head h; y = W_out (norm(o) * silu(W_gate x)).

    q and k are turned to their positions in the whole sequence, the two halves of a head's channels in pairs; the norm is an
    RMSNorm over each head's values.
    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  RetentionState, about H K V numbers a sample; a token then costs O(H K V).
    """

    def __init__(self, config: RetentionConfig, place: Place) -> None:
        super().__init__()
        self.num_heads, d_model, heads = config.num_heads, place.d_model, config.num_heads
        K = head_width("retention", "expand_k", config.expand_k, d_model, heads)
        V = head_width("retention", "expand_v", config.expand_v, d_model, heads)
        if K % 2:
            raise InputError(
                f"model.mixers.retention: expand_k * model.d_model / num_heads = {K} must be even, for channels turn in pairs; "
                "change num_heads, expand_k or model.d_model."
            )
        self.inputs = HeadInputs(d_model, (heads * K, heads * K, heads * V))
        self.rotary = Rotary(K, base=config.rotary_base)
        self.gate = nn.Linear(d_model, heads * V, bias=False) if config.output_gate else None
        self.norm = HeadNorm(V, eps=config.norm_eps, affine=config.norm_weight)
        self.out_proj = nn.Linear(heads * V, d_model, bias=False)

    def initialise(self) -> None:
        """Queries, keys, values and gates each by Xavier's rule with a small gain."""
        for weight in self.inputs.proj.weight.split(self.inputs.widths):
            nn.init.xavier_uniform_(weight, gain=INITIAL_GAIN)
        if self.gate is not None:
            nn.init.xavier_uniform_(self.gate.weight, gain=INITIAL_GAIN)

    def forward(
        self, x: Tensor, *, state: RetentionState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, RetentionState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        tensors, _ = self.inputs(x, context, None, goes_on)
        q, k, v = (split_heads(t, self.num_heads) for t in tensors)
        positions = context.positions(x.device)
        if before is not None:
            positions = before.length[:, None] + positions
        q, k = self.rotary(positions, q, k)
        o, recurrent = parallel.simple_gla(
            q,
            k,
            v,
            log_decays(self.num_heads, x.device).to(exact(v).dtype),
            ctx=context,
            initial_state=None if before is None else before.recurrent,
            output_final_state=goes_on,
        )
        o = self.norm(o, None if self.gate is None else split_heads(self.gate(x), self.num_heads))
        y = self.out_proj(o.flatten(2))
        assert not isinstance(recurrent, tuple)
        if recurrent is None:
            return y, None
        tokens = x.new_full((x.shape[0],), context.total_tokens, dtype=torch.int64)
        return y, RetentionState(recurrent, tokens if before is None else before.length + tokens)
