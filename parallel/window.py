"""Inputs around a rank's part: the ones before and after it, and the last ones of the whole sequence or of its documents.

The state of a convolution is the last inputs, so that states over ranks are a matter of who holds which position: a window
around the part, a join of the tails. A state that is the same on every rank counts once (see `SequenceContext`).

`convolve_after` runs the kernel while the window is on its way: first on the part alone, then, when the window is there, once
more on the few first tokens that reach back, whose outputs it replaces. The gradient of what was replaced would take a copy of
dy with zeros in it; instead y = alone(u) + (new - old) on those tokens, old = alone on them, has the same gradient without one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.conv_cost import Span, tails, window_sources, window_targets, windows
from seqengine.parallel.documents import Documents
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


@dataclass
class _Exchange:
    """The positions of x [.., T] that other ranks need, under way; in the graph as its start and its finish."""

    context: SequenceContext
    needed: Sequence[Span]
    running: tuple[list[tuple[int, int, Tensor]], list[comm.Work]] | None = None

    def places(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(peer, start, stop) of what this rank gives, in its part, and of what it gets, in its window without the part."""
        bounds, rank = self.context.bounds, self.context.rank
        (first, last), start = bounds[rank : rank + 2], self.needed[rank][0]
        gives = [(p, a - first, b - first) for p, a, b in window_targets(bounds, self.needed, rank)]
        gets = []
        for p, a, b in window_sources(bounds, self.needed, rank):
            shift = start if b <= first else start + last - first
            gets.append((p, a - shift, b - shift))
        return gives, gets

    def begin(self, x: Tensor, gives: list[tuple[int, int, int]], gets: list[tuple[int, int, int]]) -> None:
        sends = [(peer, x[..., a:b].contiguous()) for peer, a, b in gives if x[..., a:b].numel() > 0]
        incoming = [(a, b, peer, x.new_empty(*x.shape[:-1], b - a)) for peer, a, b in gets]
        receives = [(peer, t) for _, _, peer, t in incoming if t.numel() > 0]
        group, ledger = self.context.require_group(), self.context.ledger()
        works = comm.start_send_and_receive(sends, receives, group, ledger, "halo")
        self.running = ([(a, b, t) for a, b, _, t in incoming], works)

    def end(self) -> list[tuple[int, int, Tensor]]:
        assert self.running is not None, "an exchange is begun before it ends"
        (incoming, works), self.running = self.running, None
        for work in works:
            work.wait()
        return incoming


class _Start(torch.autograd.Function):
    """Sends; gives the first `head` positions of x, whose gradient joins that of the positions that were sent."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, x: Tensor, head: int) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.shape = exchange, x.shape
        exchange.begin(x, *exchange.places())
        return x.new_zeros(0), x[..., :head].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_head: Tensor) -> tuple[None, Tensor, None]:
        dx = d_head.new_zeros(ctx.shape)
        dx[..., : d_head.shape[-1]] = d_head
        for a, b, gradient in ctx.exchange.end():
            dx[..., a:b] += gradient
        return None, dx, None


class _Finish(torch.autograd.Function):
    """What is around the part: all of the window that lies before it, and all that lies after."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, token: Tensor, like: Sequence[int], left: int, right: int) -> Tensor:
        ctx.exchange = exchange
        around = token.new_zeros(*like, left + right)
        for a, b, values in exchange.end():
            around[..., a:b] = values
        return around

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None, None]:
        gives, gets = ctx.exchange.places()
        ctx.exchange.begin(gradient, gets, gives)
        return None, gradient.new_zeros(0), None, None, None


class Window:
    """What surrounds this rank's part of x [B, D, T], on its way from the construction to `finish`, in the backward too.

    needed: what each rank needs around its part (`conv_cost.windows`), at most what there is.
    head:   the first positions of x. Use these, and no slice, where they are needed besides x: their gradient costs no pass.
    Traffic: each position once from its owner: `conv_cost.window_bytes`, `conv_cost.window_backward_bytes`.
    """

    def __init__(self, x: Tensor, needed: Sequence[Span], ctx: SequenceContext, head: int = 0):
        self._exchange, self._like = _Exchange(ctx, needed), tuple(x.shape[:-1])
        start, stop = needed[ctx.rank]
        self._left, self._right = ctx.bounds[ctx.rank] - start, stop - ctx.bounds[ctx.rank + 1]
        self._token: Tensor
        self.head: Tensor
        self._token, self.head = _Start.apply(self._exchange, x, head)  # type: ignore[no-untyped-call]

    def finish(self) -> tuple[Tensor, Tensor]:
        """The positions before and those after."""
        sizes = (self._left, self._right)
        around: Tensor = _Finish.apply(self._exchange, self._token, self._like, *sizes)  # type: ignore[no-untyped-call]
        before, after = around.split(sizes, dim=-1)
        return before, after


class _Replace(torch.autograd.Function):
    """y with its first outputs, equal to `old`, replaced by `new`, in place: y + (new - old) for the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, old: Tensor, new: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.head = new.shape[-1]
        y[..., : ctx.head] = new
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_new = dy[..., : ctx.head]
        return dy, -d_new, d_new


OVERLAP_ELEMENTS, OVERLAP_RATIO = 1 << 20, 64
"""Numbers of a part, and tokens for each input that it reaches back, from which on the exchange is hidden: below the calls of
two more kernels, or what these compute, take longer than what they hide."""

Whole = Callable[[Tensor | None, Tensor | None], Tensor]
"""A kernel on this rank's part: (state before, boundaries) -> outputs."""
Head = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""The same kernel on few tokens: (inputs, factors of the outputs, state before) -> outputs."""


def convolve_after(
    convolve: Whole,
    convolve_head: Head,
    x: Tensor,
    post_gate: Tensor | None,
    keep: int,
    initial: Tensor | None,
    documents: Sequence[int] | None,
    ctx: SequenceContext,
) -> Tensor:
    """A convolution of this rank's part that reaches `keep` of the inputs x back, over ranks, into the initial states.

    initial: [B, D, keep], or with documents one for each [N, D, keep]; the same on all ranks.
    Traffic: a halo of `keep` positions, none of another document; with `initial` an all-reduce in the backward.
    """
    if keep == 0:  # nor does it reach over a boundary
        return convolve(None, None)
    needed = windows(ctx.bounds, keep, documents=documents)
    begun = None if initial is None else shared(initial, ctx).to(x.dtype)
    if documents is None:
        row, states, cu_seqlens, first = begun, None, None, ctx.local_tokens
        overlaps = x.numel() >= OVERLAP_ELEMENTS and first >= OVERLAP_RATIO * keep
    else:
        own = Documents.of(list(documents), ctx)
        row, states = _states_of(own, begun, ctx)
        cu_seqlens, first = torch.tensor(own.local, device=x.device), own.local[min(1, len(own.local) - 1)]
        overlaps = first > 0
    if not overlaps:
        return convolve(_history(Window(x, needed, ctx).finish()[0], row, keep), None)
    window = Window(x, needed, ctx, min(keep, first))
    y = convolve(states, cu_seqlens)
    past = _history(window.finish()[0], row, keep)
    gate = None if post_gate is None else post_gate[..., : min(keep, first)]
    old, new = convolve_head(window.head, gate, None), convolve_head(window.head, gate, past)
    replaced: Tensor = _Replace.apply(y, old, new)  # type: ignore[no-untyped-call]
    return replaced


def _states_of(own: Documents, begun: Tensor | None, ctx: SequenceContext) -> tuple[Tensor | None, Tensor | None]:
    """Of initial states of all documents: that before the first piece here [1, D, keep], and all with zeros for the first."""
    if begun is None:
        return None, None
    stop = own.starts[ctx.rank + 1]
    pieces = own.kept[stop - (len(own.local) - 1) : stop]
    if not pieces:  # nothing is here, but the gradient is a sum over all ranks
        return begun.sum(dim=0, keepdim=True) * 0, None
    rows = begun[pieces]
    return rows[:1], F.pad(rows[1:], (0, 0, 0, 0, 1, 0))


def _history(before: Tensor, row: Tensor | None, keep: int) -> Tensor:
    """`keep` inputs: those before, and where they begin with their document the last ones of its state, or zeros."""
    missing = keep - before.shape[-1]
    if row is None:
        return F.pad(before, (missing, 0))
    return torch.cat([row[..., keep - missing :], before], dim=-1)


def last_inputs(
    x: Tensor, keep: int, initial: Tensor | None, documents: Sequence[int] | None, ctx: SequenceContext
) -> Tensor:
    """The last `keep` positions of the joined x [B, D, total], on every rank; where there are fewer, those of `initial` or
    zeros precede. With documents those of each, [N, D, keep].

    Traffic: the positions go from their owners to all other ranks: `conv_cost.final_state_bytes`.
    """
    ends = (0, ctx.total_tokens) if documents is None else documents
    mine = (ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1])
    held = [
        sum(
            stop - start
            for start, stop in (overlap(tail, (ctx.bounds[r], ctx.bounds[r + 1])) for tail in tails(ends, keep))
        )
        for r in range(ctx.size)
    ]
    own = [overlap(tail, mine) for tail in tails(ends, keep)]
    parts = [x[..., start - mine[0] : stop - mine[0]] for start, stop in own if stop > start]
    joined = SequenceContext(ctx.group, ctx.rank, offsets(held), _ledger=ctx.ledger())
    found = joined.join(torch.cat(parts, dim=-1) if parts else x[..., :0], x.ndim - 1)
    if documents is None:
        return _history(found, None if initial is None else initial.to(x.dtype), keep)
    lengths = torch.tensor([min(keep, b - a) for a, b in pairwise(ends)], device=x.device)
    states = x.new_zeros(len(ends) - 1, x.shape[1], keep) if initial is None else initial.to(x.dtype)
    stream = torch.cat([states.transpose(0, 1).flatten(1), found[0]], dim=1)  # [D, N keep + tails]
    column = torch.arange(keep, device=x.device)
    missing, document = keep - lengths, torch.arange(len(ends) - 1, device=x.device)
    place = states.shape[0] * keep + (lengths.cumsum(0) - lengths)[:, None] + column - missing[:, None]
    place = torch.where(column < missing[:, None], document[:, None] * keep + lengths[:, None] + column, place)
    last: Tensor = stream[:, place]  # [D, N, keep]
    return last.transpose(0, 1)
