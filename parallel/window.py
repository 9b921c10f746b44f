"""Inputs around a rank's part as states: the ones before it, and the last ones of the whole sequence.

The state of a convolution is the last inputs, so that states over ranks are a matter of who holds which position: a halo before
the part, a join of the tail. A state that is the same on every rank counts once (see `SequenceContext`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.halo import preceding
from seqengine.parallel.layout import offsets, overlap


class _Shared(torch.autograd.Function):
    """A tensor that every rank holds and each uses for its own part: the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceContext) -> Tensor:
        ctx.context = context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        return comm.all_reduce_sum(total, ctx.context.require_group(), ctx.context.ledger()), None


def shared(x: Tensor, ctx: SequenceContext) -> Tensor:
    """x, equal on all ranks, whose gradient is the sum over ranks: one all-reduce in the backward."""
    same: Tensor = _Shared.apply(x, ctx)  # type: ignore[no-untyped-call]
    return same


def inputs_before(x: Tensor, left: int, initial: Tensor | None, ctx: SequenceContext) -> Tensor:
    """The `left` positions before this rank's part of x [B, D, T]; those before the sequence are of `initial`, or zeros.

    Traffic: a halo of `left` positions; with `initial` [B, D, left], the same on every rank, an all-reduce in the backward.
    """
    before = preceding(x, left, ctx=ctx, dim=2)
    if initial is None:
        return before
    missing = max(0, left - ctx.bounds[ctx.rank])
    return torch.cat([shared(initial, ctx)[..., left - missing :].to(x.dtype), before[..., missing:]], dim=-1)


def last_inputs(x: Tensor, keep: int, initial: Tensor | None, ctx: SequenceContext) -> Tensor:
    """The last `keep` positions of the joined x, on every rank; where there are fewer, those of `initial` or zeros precede.

    Traffic: the positions go from their owners to all other ranks.
    """
    total = ctx.total_tokens
    tail = (total - keep, total)
    spans = [overlap(tail, (ctx.bounds[r], ctx.bounds[r + 1])) for r in range(ctx.size)]
    start, stop = spans[ctx.rank]
    first = ctx.bounds[ctx.rank]
    own = x[..., start - first : stop - first] if stop > start else x[..., :0]
    found = replace(ctx, bounds=offsets([b - a for a, b in spans])).join(own, 2)
    missing = keep - found.shape[-1]
    if missing == 0:
        return found
    before = x.new_zeros(*x.shape[:2], missing) if initial is None else initial[..., keep - missing :].to(x.dtype)
    return torch.cat([before, found], dim=-1)
