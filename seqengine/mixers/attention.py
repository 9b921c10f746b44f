"""Softmax attention: rotary positions, grouped or multi-query keys, a window.

Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
"""

from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Count, Section
from seqengine.errors import InputError
from seqengine.kernels import api as kernels
from seqengine.mixers.mixer import Mixer, Place, Start, carried, context_of
from seqengine.mixers.rotary import Rotary
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

Positive = Annotated[Count, Field(gt=0)]


class AttentionConfig(Section):
    """[model.mixers.attention]: softmax attention."""

    FORGOTTEN = frozenset({"rotary_base", "rotary_scale", "window"})

    num_heads: Positive = 4
    """Heads of queries; divides d_model."""
    num_kv_heads: Positive | None = None
    """Heads of keys and values, dividing num_heads (1 = multi-query); num_heads if not given."""
    rotary: bool = True
    """Positions by turning queries and keys; without them attention knows of order by its mask alone."""
    rotary_dim: Positive | None = None
    """Channels of a head that turn, an even number; all if not given."""
    rotary_base: Annotated[float, Field(gt=0.0)] = 10000.0
    """The slowest pair of channels turns about 1 / rotary_base of a radian a token."""
    rotary_interleaved: bool = False
    """Pairs are neighbours (GPT-J); false: channels of the two halves (GPT-NeoX, Llama)."""
    rotary_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Positions are divided by it: position interpolation, for sequences longer than those trained on."""
    window: Positive | None = None
    """A token sees so many newest tokens, itself among them; all if not given. Not causal: so many to each side."""
    bias: bool = True
    """Biases of queries, keys and values."""
    out_bias: bool = True
    """Bias of the output."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}")
        if self.rotary and self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim = {self.rotary_dim} must be even: channels turn in pairs")
        return self

    def head_dim(self, d_model: int) -> int:
        """Raises InputError if the heads do not fit the model's width."""
        if d_model % self.num_heads:
            raise InputError(
                f"model.mixers.attention.num_heads = {self.num_heads} must divide model.d_model = {d_model}."
            )
        width = d_model // self.num_heads
        turning = width if self.rotary_dim is None else self.rotary_dim
        if self.rotary and (turning > width or turning % 2):
            raise InputError(
                f"model.mixers.attention.rotary_dim = {turning} must be even and at most d_model / num_heads = {width}; "
                "change one of them, or set rotary = false."
            )
        return width


class AttentionState(NamedTuple):
    """The keys and values seen so far, from the oldest: row b has min(length[b], window) of them, the rest is not looked at."""

    keys: Tensor
    """[B, S, G, K], turned to their positions."""
    values: Tensor
    """[B, S, G, K]."""
    length: Tensor
    """[B] int64: tokens so far."""


class Attention(Mixer):
    """y = W_out softmax(q k^T / sqrt(K)) v, with q, k, v = W x.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  AttentionState, 2 S G K numbers a sample, S the tokens so far, at most `window`. A token costs O(S D). States of
            different length may be stacked, filled up at the end to the longest; whatever they are filled with.
    Raises: ValueError for a state on several ranks, or without causality.
    """

    is_bidirectional = True

    def __init__(self, config: AttentionConfig, place: Place) -> None:
        super().__init__()
        self.causal, self.window = place.causal, config.window
        self.head_dim = config.head_dim(place.d_model)
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(place.d_model, width, bias=config.bias)
        self.out_proj = nn.Linear(place.d_model, place.d_model, bias=config.out_bias)
        self.rotary: Rotary | None = None
        if config.rotary:
            self.rotary = Rotary(
                config.rotary_dim or self.head_dim,
                base=config.rotary_base,
                scale=config.rotary_scale,
                interleaved=config.rotary_interleaved,
            )

    def forward(
        self, x: Tensor, *, state: AttentionState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        if goes_on and (context.size > 1 or not self.causal):
            what = "on one rank; leave out the state or ctx" if context.size > 1 else "with causal attention"
            raise ValueError(f"Attention: a state can be carried only {what}.")
        positions = context.positions(x.device)
        if before is not None:
            positions = before.length[:, None] + positions
        q, k, v = self._heads(x, positions)
        after: AttentionState | None = None
        if before is not None:
            y, after = self._continue(q, k, v, before)
        else:
            y = parallel.attention(q, k, v, ctx=context, causal=self.causal, window=self.window)
            if goes_on:
                after = self._first(k, v)
        out: Tensor = self.out_proj(y.flatten(2))
        return out, after

    def _heads(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """q [B, T, H, K], k, v [B, T, G, K]; q and k turned to their positions."""
        split = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(split, dim=2)
        return [q, k, v] if self.rotary is None else [*self.rotary(positions, q, k), v]

    def _first(self, k: Tensor, v: Tensor) -> AttentionState:
        B, T = k.shape[:2]
        start = 0 if self.window is None else max(0, T - self.window)
        length = torch.full((B,), T, dtype=torch.int64, device=k.device)
        return AttentionState(k[:, start:], v[:, start:], length)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, before: AttentionState) -> tuple[Tensor, AttentionState]:
        """The attention of T tokens after those of a state, and the state after them."""
        T, S = q.shape[1], before.keys.shape[1]
        if T == 0:
            return q, before
        kept = before.length if self.window is None else before.length.clamp(max=self.window)
        # One token does without the question whether all rows are as long as the longest, which waits for the device.
        is_even = T > 1 and bool((kept == S).all())
        if is_even:
            keys, values = torch.cat([before.keys, k], dim=1), torch.cat([before.values, v], dim=1)
            y = kernels.attention(q, keys, values, causal=True, window=self.window)
        else:
            keys, values = _insert(before.keys, k, kept), _insert(before.values, v, kept)
            y = _attend_rows(q, keys, values, kept, self.window)
        if self.window is not None and self.window < S + T:
            dropped = (kept + T - self.window).clamp(min=0)
            keys, values = _take(keys, dropped, self.window), _take(values, dropped, self.window)
        return y, AttentionState(keys, values, before.length + T)


def _insert(cached: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """cached [B, S, G, K] with new [B, T, G, K] after the first kept[b] of row b: [B, S + T, G, K].

    What follows in a shorter row are copies of its last one: numbers, whatever the cache had there.
    """
    S, T = cached.shape[1], new.shape[1]
    slots = torch.arange(S + T, device=cached.device)
    is_old = slots < kept[:, None]
    placed = new
    if T > 1:
        source = (slots - kept[:, None]).clamp(0, T - 1)
        placed = new.gather(1, source[..., None, None].expand(-1, -1, *new.shape[2:]))
    return torch.where(is_old[..., None, None], F.pad(cached, (0, 0, 0, 0, 0, T)), placed)


def _take(x: Tensor, first: Tensor, count: int) -> Tensor:
    """x [B, S, G, K] -> its slots first[b] .. first[b] + count - 1 in row b; past the end, the last."""
    slots = (first[:, None] + torch.arange(count, device=x.device)).clamp(max=x.shape[1] - 1)
    return x.gather(1, slots[..., None, None].expand(-1, -1, *x.shape[2:]))


def _attend_rows(q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, window: int | None) -> Tensor:
    """Attention of q [B, T, H, K] whose token t stands at slot kept[b] + t of row b."""
    own = (kept[:, None] + torch.arange(q.shape[1], device=q.device))[..., None]
    slots = torch.arange(keys.shape[1], device=q.device)
    seen = slots <= own
    if window is not None:
        seen = seen & (slots > own - window)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), seen[:, None], enable_gqa=True
    )
    return y.transpose(1, 2)
