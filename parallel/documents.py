"""Packed documents over a sequence that is split across ranks: who holds which, and their states before and after.

Everything follows from the global boundaries and the layout, which all ranks have: nothing is sent to find it. The state before
a document is needed where it begins; the state after it is found where it ends, and is delivered to every rank.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.checks import check
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets


def documents_of(name: str, cu_seqlens: Tensor | None, ctx: SequenceContext, device: torch.device) -> Tensor | None:
    """The boundaries that a twin was given, or else those of its context; ValueError if they are two different ones."""
    if ctx.documents is None:
        return cu_seqlens
    if cu_seqlens is not None:
        is_same = cu_seqlens.ndim == 1 and tuple(cu_seqlens.tolist()) == ctx.documents
        check(name, is_same, "cu_seqlens must be None or those of the context, {}", cu_seqlens.tolist(), ctx.documents)
        return cu_seqlens
    return torch.tensor(ctx.documents, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end. Those without tokens are left out: their final state is the initial one."""

    kept: list[int]
    count: int
    starts: tuple[int, ...]
    """[P + 1] kept documents that begin before each rank; the last number is all of them."""
    stops: tuple[int, ...]
    """The same of their ends."""
    local: list[int]
    """Boundaries of the pieces on this rank, [0, .., T]; [0] without tokens."""
    enters: bool
    """Whether the first piece began on an earlier rank."""
    leaves: bool
    """Whether the last piece goes on, on a later rank."""

    @classmethod
    def of(cls, ends: list[int], ctx: SequenceContext) -> "Documents":
        """From boundaries that ascend from 0 to ctx.total_tokens."""
        spans = [(d, a, b) for d, (a, b) in enumerate(pairwise(ends)) if a < b]
        first, stop = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
        mine = [(a, b) for _, a, b in spans if first < stop and a < stop and b > first]
        return cls(
            [d for d, _, _ in spans],
            len(ends) - 1,
            _counts([a for _, a, _ in spans], ctx.bounds),
            _counts([b - 1 for _, _, b in spans], ctx.bounds),
            [0, *(min(b, stop) - first for _, b in mine)],
            bool(mine) and mine[0][0] < first,
            bool(mine) and mine[-1][1] > stop,
        )

    def before(self, states: Tensor, is_zero: bool, ctx: SequenceContext) -> Tensor:
        """The states before the documents that begin on this rank, of those before all [count, ...], which all ranks have.

        is_zero: they are zeros that nobody differentiates by.
        Traffic: none forward; backward this rank's part to all, so that the gradient is the whole one on every rank.
        """
        if is_zero:
            return states.new_zeros(self.starts[ctx.rank + 1] - self.starts[ctx.rank], *states.shape[1:])
        if len(self.kept) < self.count:
            states = states[self.kept]
        rows: Tensor = _Rows.apply(states, _context_of(self.starts, ctx))  # type: ignore[no-untyped-call]
        return rows

    def after(self, finals: Tensor, states: Tensor, ctx: SequenceContext) -> Tensor:
        """The states after all documents, on every rank, from those of the ones that end on this rank.

        Traffic: forward this rank's part to all; backward none, for the gradient of what all ranks have counts once.
        """
        everyone = _context_of(self.stops, ctx).join(finals, 0)
        if len(self.kept) == self.count:
            return everyone
        kept = torch.tensor(self.kept, dtype=torch.int64, device=states.device)
        return states.index_copy(0, kept, everyone)


def _counts(positions: list[int], bounds: Sequence[int]) -> tuple[int, ...]:
    """How many of the positions lie before each rank, and all of them."""
    found = [0] * (len(bounds) - 1)
    for position in positions:
        found[bisect_right(bounds, position) - 1] += 1
    return tuple(offsets(found))


def _context_of(counts: tuple[int, ...], ctx: SequenceContext) -> SequenceContext:
    """Documents in the place of tokens."""
    return SequenceContext(ctx.group, ctx.rank, counts, _ledger=ctx.ledger())


class _Rows(torch.autograd.Function):
    """This rank's part of states that all ranks have."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, context: SequenceContext) -> Tensor:
        ctx.context = context
        return context.split(states, 0).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.context.join(gradient, 0), None
