"""All-to-all between 'my tokens, all heads' and the tokens and heads that a plan gives to each rank.

One pattern serves Ulysses (all tokens, some heads), zigzag (other tokens, all heads), both together, and the keys that a rank
needs of others (overlapping tokens, all heads). A token of a head may be given to several ranks: then the backward of
`distribute` adds up, in the order of ranks. Where each goes to one rank, `collect` is the inverse, and the adjoint.

References: Jacobs et al. 2023, arXiv:2309.14509; Fang and Zhao 2024, arXiv:2405.07719 (with a ring).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import Interval, Intervals, common_rows, count


@dataclass(frozen=True)
class Places:
    """tokens: by rank, what it gets. heads: by tensor, by rank. total: by tensor, heads of all."""

    tokens: tuple[Intervals, ...]
    heads: tuple[Intervals, ...]
    total: tuple[int, ...]


def distribute(tensors: Sequence[Tensor], places: Places, ctx: SequenceContext) -> tuple[Tensor, ...]:
    """[B, T, H, K], this rank's tokens of all heads -> [B, tokens, heads, K] as `places` says."""
    results: tuple[Tensor, ...] = _Distribute.apply(places, ctx, *tensors)  # type: ignore[no-untyped-call]
    return results


def collect(x: Tensor, heads: Intervals, total: int, tokens: tuple[Intervals, ...], ctx: SequenceContext) -> Tensor:
    """The way back for one tensor, whose places must not overlap."""
    (result,) = _Collect.apply(Places(tokens, (heads,), (total,)), ctx, x)  # type: ignore[no-untyped-call]
    back: Tensor = result
    return back


def common(places: Places, owner: int, holder: int, parts: Sequence[Intervals]) -> list[tuple[Interval, Interval]]:
    """Tokens of `owner` that `holder` gets, as (rows of the owner's part, rows of what the holder has)."""
    return common_rows(parts[owner], places.tokens[holder])


def _exchange(
    tensors: Sequence[Tensor],
    sends: Sequence[list[tuple[slice, slice]]],
    receives: Sequence[list[tuple[slice, slice]]],
    shapes: Sequence[torch.Size],
    ctx: SequenceContext,
    adds: bool,
) -> list[Tensor]:
    """Rectangles (tokens, heads) to and from each rank: by rank, of each tensor in turn.

    adds: several may arrive for one place, and are added in float32 or float64; else each place gets one.
    """
    width, example = len(tensors), tensors[0]
    dtype = torch.float32 if adds and example.dtype != torch.float64 else example.dtype
    results = [torch.zeros(shape, dtype=dtype, device=example.device) for shape in shapes]
    outgoing, sizes = [], []
    for rank in range(ctx.size):
        parts = [x[:, t, h].reshape(-1) for i, x in enumerate(tensors) for t, h in sends[rank * width + i]]
        outgoing.append(torch.cat(parts) if parts else example.new_empty(0))
        places = [y[:, t, h].numel() for i, y in enumerate(results) for t, h in receives[rank * width + i]]
        sizes.append(torch.Size([sum(places)]))
    arrived = comm.all_to_all(outgoing, sizes, ctx.require_group(), ctx.ledger(), "attention")
    for rank, message in enumerate(arrived):
        at = 0
        for i, y in enumerate(results):
            for t, h in receives[rank * width + i]:
                place = y[:, t, h]
                part = message[at : at + place.numel()].view(place.shape)
                place.copy_(place + part if adds else part)
                at += place.numel()
    return [y.to(example.dtype) for y in results]


def _rectangles(
    places: Places, ctx: SequenceContext
) -> tuple[list[list[tuple[slice, slice]]], list[list[tuple[slice, slice]]]]:
    """(by rank and tensor, of the own part, what that rank gets; of what this rank holds, what comes from that rank)."""
    given, held = [], []
    for rank in range(ctx.size):
        to_rank = common(places, ctx.rank, rank, ctx.parts)
        from_rank = common(places, rank, ctx.rank, ctx.parts)
        for heads in places.heads:
            given.append([(slice(*rows), slice(*heads[rank])) for rows, _ in to_rank])
            width = heads[ctx.rank][1] - heads[ctx.rank][0]
            held.append([(slice(*rows), slice(0, width)) for _, rows in from_rank])
    return given, held


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Places, context: SequenceContext, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.how = (places, context)
        given, held = _rectangles(places, context)
        n, rank = count(places.tokens[context.rank]), context.rank
        shapes = [
            torch.Size((x.shape[0], n, heads[rank][1] - heads[rank][0], x.shape[3]))
            for x, heads in zip(tensors, places.heads, strict=True)
        ]
        return tuple(_exchange(tensors, given, held, shapes, context, adds=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places, context = ctx.how
        return (None, None, *_collect(places, context, gradients, adds=True))


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Places, context: SequenceContext, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.how = (places, context)
        return tuple(_collect(places, context, tensors, adds=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places, context = ctx.how
        return (None, None, *distribute(gradients, places, context))


def _collect(places: Places, ctx: SequenceContext, tensors: Sequence[Tensor], adds: bool) -> list[Tensor]:
    given, held = _rectangles(places, ctx)
    shapes = [
        torch.Size((x.shape[0], ctx.local_tokens, total, x.shape[3]))
        for x, total in zip(tensors, places.total, strict=True)
    ]
    return _exchange(tensors, held, given, shapes, ctx, adds)
