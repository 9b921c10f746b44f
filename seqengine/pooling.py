"""One vector a sequence, from the vectors of its tokens, wherever those are."""

from typing import Literal

import torch
from torch import Tensor

from seqengine.parallel import comm
from seqengine.parallel.api import transpose
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes

Pooling = Literal["mean", "last", "first"]


def rows_context(batch: int, ctx: SequenceContext) -> SequenceContext:
    """Who has which sequences of a batch after `pool`: sequences in the place of tokens."""
    return SequenceContext(ctx.group, ctx.rank, offsets(split_sizes(batch, ctx.size)), _ledger=ctx.ledger())


def rows_of(batch: int, ctx: SequenceContext) -> slice:
    """The sequences of a batch that `pool` gives to this rank: all of them on one rank."""
    rows = rows_context(batch, ctx)
    return slice(rows.bounds[rows.rank], rows.bounds[rows.rank + 1])


def pool(hidden: Tensor, mask: Tensor | None, how: Pooling, ctx: SequenceContext) -> Tensor:
    """The mean, the last or the first of a sequence's tokens.

    Local in:  hidden [B, T, D], this rank's tokens; mask [B, T] bool, False for padding, or None.
    Local out: [b, D], the rows `rows_of(B, ctx)`: a loss over them is this rank's part, gradients of weights its partial sums.
    Traffic:   D + 1 numbers a sequence to the rank that has its row; last and first with a mask also its positions.
    Raises:    ValueError if a sequence has no token.
    """
    B, T, D = hidden.shape
    kept = torch.ones(B, T, dtype=torch.bool, device=hidden.device) if mask is None else mask
    weights = _weights(kept, how, ctx).to(hidden.dtype)
    sums = torch.einsum("bt,btd->bd", weights, hidden)
    partial = torch.cat([sums, weights.sum(dim=1, keepdim=True)], dim=1)[:, None]
    if ctx.size > 1:
        one_each = SequenceContext(ctx.group, ctx.rank, tuple(range(ctx.size + 1)), _ledger=ctx.ledger())
        partial = transpose(partial, ctx=one_each, scatter=0, gather=1, token_dim=1)
    total = partial.sum(dim=1)
    return total[:, :D] / total[:, D:].clamp(min=1.0)


def _weights(kept: Tensor, how: Pooling, ctx: SequenceContext) -> Tensor:
    """[B, T]: of every token in a sum; for last and first 1 for that token."""
    if how == "mean":
        return kept
    positions = ctx.positions(kept.device)
    # The larger the better; what is kept counts from 1.
    order = positions + 1 if how == "last" else ctx.total_tokens - positions
    score = torch.where(kept, order, 0)
    best = score.amax(dim=1) if kept.shape[1] else score.new_zeros(kept.shape[0])
    comm.all_reduce_max(best, ctx.group)
    return kept & (score == best[:, None])
