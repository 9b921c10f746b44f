"""Halo: the inputs just before a rank's part, from the ranks that hold them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import halo_sources, halo_targets


def halo(x: Tensor, left: int, *, ctx: SequenceContext, dim: int) -> Tensor:
    """[what precedes, x] along dim: the `left` positions before this rank's part, zeros before the sequence.

    Local in:  x with ctx.local_tokens in dim; any other dims, equal on all ranks.
    Local out: the same with `left` more in dim. Reaches over several ranks where parts are short or empty.
    Packed:    with ctx.documents zeros for positions of another document than that of the part's first (where an empty part
               lies: the next position). Boundaries inside the part are the caller's.
    Traffic:   each of the positions once from its owner, those of other documents not at all; (left * row bytes) received by a
               rank deep in the sequence: `cost.halo_bytes`, `cost.halo_backward_bytes`.
    Gradients: those of the received positions go back to their owners and are added there (the adjoint).
    Order:     every rank must call; checks come before any message.
    Raises:    ValueError if left is negative, x is not this rank's part, or the context is zigzag.
    """
    return torch.cat([preceding(x, left, ctx=ctx, dim=dim), x], dim=dim)


def preceding(x: Tensor, left: int, *, ctx: SequenceContext, dim: int) -> Tensor:
    """The first part of `halo` alone: what precedes x, without a copy of x."""
    if left < 0:
        raise ValueError(f"halo: left must be >= 0; got {left}.")
    ctx.require_contiguous("halo")
    ctx.check_local("halo", x, dim)
    before: Tensor = _Preceding.apply(x, left, ctx, dim % x.ndim)  # type: ignore[no-untyped-call]
    return before


class _Preceding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: int, context: SequenceContext, dim: int) -> Tensor:
        ctx.context, ctx.left, ctx.dim, ctx.shape = context, left, dim, x.shape
        before = x.new_zeros(*x.shape[:dim], left, *x.shape[dim + 1 :])
        if context.size > 1:
            first = context.bounds[context.rank]
            sends = [
                (peer, x.narrow(dim, start - first, stop - start).contiguous())
                for peer, start, stop in halo_targets(context.bounds, context.rank, left, context.documents)
            ]
            places = [
                (peer, before.narrow(dim, start - (first - left), stop - start))
                for peer, start, stop in halo_sources(context.bounds, context.rank, left, context.documents)
            ]
            _exchange(sends, places, context, add=False)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        context, left, dim = ctx.context, ctx.left, ctx.dim
        dx = gradient.new_zeros(ctx.shape)
        if context.size > 1:
            first = context.bounds[context.rank]
            sends = [
                (peer, gradient.narrow(dim, start - (first - left), stop - start).contiguous())
                for peer, start, stop in halo_sources(context.bounds, context.rank, left, context.documents)
            ]
            places = [
                (peer, dx.narrow(dim, start - first, stop - start))
                for peer, start, stop in halo_targets(context.bounds, context.rank, left, context.documents)
            ]
            _exchange(sends, places, context, add=True)
        return dx, None, None, None


def _exchange(
    sends: list[tuple[int, Tensor]], places: list[tuple[int, Tensor]], context: SequenceContext, *, add: bool
) -> None:
    """Send, receive, and write (or add, in ascending order of ranks) what came into its places."""
    sends = [(peer, t) for peer, t in sends if t.numel() > 0]
    places = [(peer, t) for peer, t in places if t.numel() > 0]
    buffers = [(peer, torch.empty(t.shape, dtype=t.dtype, device=t.device)) for peer, t in places]
    comm.send_and_receive(sends, buffers, context.require_group(), context.ledger(), "halo")
    for (_, place), (_, buffer) in zip(places, buffers, strict=True):
        if add:
            place.add_(buffer)
        else:
            place.copy_(buffer)
