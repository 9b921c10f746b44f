"""Ring: blocks of tokens pass from rank to rank, each of which works on a block while the next one is on its way.

Member i of a ring holds block (i - s) mod n at step s, and hands it to member i + 1 as long as a later member needs it. Who
needs whose block, and the shape of each, follow from the layout alone; so every send has its receive, and hops that nobody
needs do not happen. In the backward the blocks make the same way again. The gradient of a block begins with the first other
member that needs it, goes along, and from the last one straight home.

    visit_ring    what the forward of an operator does: a look at each block
    return_ring   what its backward does: a look at each block, which gives a part of the block's gradient
    ring          the two as a differentiable exchange of its own, which holds all blocks
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.checks import check
from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext

Blocks = tuple[Tensor, ...]


@dataclass(frozen=True)
class Route:
    """The way of the blocks: the same on every member.

    members: ranks of the group in the order of the ring. sizes: tokens of each member's block. spans: by member, (first, last):
    the distances along the ring to the nearest and to the farthest other member that needs its block; (0, 0) if none does.
    """

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, members: Sequence[int], sizes: Sequence[int], needs: Callable[[int, int], bool] | None) -> "Route":
        """needs(receiver, source), both places in the ring, says whether a block is looked at; None: always."""
        size = len(members)

        def looks(source: int, distance: int) -> bool:
            return needs is None or needs((source + distance) % size, source)

        spans = []
        for source in range(size):
            distances = range(1, size) if sizes[source] > 0 else range(0)
            nearest = next((s for s in distances if looks(source, s)), 0)
            spans.append((nearest, next((s for s in reversed(distances) if looks(source, s)), 0)))
        return cls(tuple(members), tuple(sizes), tuple(spans))

    @property
    def size(self) -> int:
        return len(self.members)

    def hops(self, source: int, step: int) -> bool:
        """The block goes on from the member at distance `step`."""
        return step < self.spans[source][1]

    def gradient_hops(self, source: int, step: int) -> bool:
        """So does its gradient."""
        first, last = self.spans[source]
        return first <= step < last

    def gradient_ends(self, source: int, step: int) -> bool:
        """The gradient goes home from the member at distance `step`."""
        return step > 0 and step == self.spans[source][1]


class _Wire:
    """One member's end of a ring: flat messages, and the blocks that they are."""

    def __init__(self, blocks: Blocks, dim: int, route: Route, context: SequenceContext):
        self.route, self.context, self.dim = route, context, dim
        self.index = route.members.index(context.rank)
        self.example = blocks[0]
        self.fixed = [(x.shape[:dim], x.shape[dim + 1 :]) for x in blocks]

    def source(self, step: int) -> int:
        return (self.index - step) % self.route.size

    def rank(self, index: int) -> int:
        return self.route.members[index % self.route.size]

    def shapes(self, source: int) -> list[torch.Size]:
        n = self.route.sizes[source]
        return [torch.Size((*before, n, *after)) for before, after in self.fixed]

    def empty(self, source: int, dtype: torch.dtype) -> Tensor:
        numel = sum(shape.numel() for shape in self.shapes(source))
        return torch.empty(numel, dtype=dtype, device=self.example.device)

    def unpack(self, message: Tensor, source: int) -> Blocks:
        """Views of the message."""
        shapes = self.shapes(source)
        parts = message.split([shape.numel() for shape in shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> list[comm.Work]:
        sends, receives = ([(peer, t) for peer, t in pairs if t.numel() > 0] for pairs in (sends, receives))
        if not sends and not receives:
            return []
        group, ledger = self.context.require_group(), self.context.ledger()
        return comm.start_send_and_receive(sends, receives, group, ledger, "ring")

    def pass_on(self, step: int, held: Tensor | None) -> tuple[Tensor | None, list[comm.Work]]:
        """Start to send the block of this step and to receive the next one."""
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, Tensor]] = []
        if held is not None and self.route.hops(self.source(step), step):
            sends.append((self.rank(self.index + 1), held))
        arriving = None
        if self.route.hops(self.source(step + 1), step):
            arriving = self.empty(self.source(step + 1), self.example.dtype)
            receives.append((self.rank(self.index - 1), arriving))
        return arriving, self.start(sends, receives)

    def pass_gradient_on(
        self, step: int, total: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None, list[comm.Work]]:
        """Start to send the gradient of this step's block on, or home. Returns the buffers of what arrives: the gradient
        of the next step's block, and of the own one."""
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, Tensor]] = []
        source, following = self.source(step), self.source(step + 1)
        if self.route.gradient_hops(source, step) and total is not None:
            sends.append((self.rank(self.index + 1), total))
        elif self.route.gradient_ends(source, step) and total is not None:
            sends.append((self.rank(source), total))
        carried = home = None
        if self.route.gradient_hops(following, step):
            carried = self.empty(following, dtype)
            receives.append((self.rank(self.index - 1), carried))
        if self.route.gradient_ends(self.index, step):
            home = self.empty(self.index, dtype)
            receives.append((self.rank(self.index + step), home))
        return carried, home, self.start(sends, receives)


def _pack(blocks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([x.reshape(-1).to(dtype) for x in blocks])


def _wait(works: Sequence[comm.Work]) -> None:
    for work in works:
        work.wait()


def visit_ring(
    visit: Callable[[int, Blocks], None], blocks: Blocks, *, route: Route, ctx: SequenceContext, dim: int
) -> None:
    """visit(source, blocks of that member) for the own blocks, and then for each that arrives, the nearest first.

    The next block is on its way during a visit. All ranks of the route must call. Memory: two blocks.
    """
    wire = _Wire(blocks, dim, route, ctx)
    held: Tensor | None = _pack(blocks, blocks[0].dtype) if route.size > 1 else None
    for step in range(route.size):
        arriving, works = wire.pass_on(step, held)
        if step == 0:
            visit(wire.index, blocks)
        elif held is not None:
            visit(wire.source(step), wire.unpack(held, wire.source(step)))
        _wait(works)
        held = arriving


def return_ring(
    visit: Callable[[int, Blocks | None], Sequence[Tensor] | None],
    blocks: Blocks,
    *,
    route: Route,
    ctx: SequenceContext,
    dim: int,
    dtype: torch.dtype,
    travel: bool = True,
) -> Blocks:
    """The gradients of the own blocks: the sum of what visit(source, blocks) returns for them on all members.

    A visit may return None for a block that it has no use for. Sums are made, and travel, in dtype; their order is that of the
    ring. travel=False: the visits get None, and the blocks stay where they are. All ranks of the route must call.
    """
    wire = _Wire(blocks, dim, route, ctx)
    held: Tensor | None = _pack(blocks, blocks[0].dtype) if route.size > 1 and travel else None
    mine = wire.empty(wire.index, dtype).zero_()
    carried: Tensor | None = None
    home: Tensor | None = None
    gradient_works: list[comm.Work] = []
    for step in range(route.size):
        source = wire.source(step)
        arriving, works = wire.pass_on(step, held) if travel else (None, [])
        found = None
        if step == 0:
            found = visit(source, blocks if travel else None)
        elif held is not None or (not travel and route.spans[source][0] <= step <= route.spans[source][1]):
            found = visit(source, None if held is None else wire.unpack(held, source))
        _wait(gradient_works)
        if home is not None:
            mine, home = mine + home, None
        total = None if found is None else _pack(found, dtype)
        if carried is not None:
            total = carried if total is None else carried.add_(total)
        if step == 0:
            mine, total = (mine if total is None else total), None
        elif total is None and max(1, route.spans[source][0]) <= step <= route.spans[source][1]:
            total = wire.empty(source, dtype).zero_()
        carried, home, gradient_works = wire.pass_gradient_on(step, total, dtype)
        sent = total  # alive until its works are waited for, in the next step
        _wait(works)
        held = arriving
    _wait(gradient_works)
    del sent
    return wire.unpack(mine if home is None else mine + home, wire.index)


def ring(
    blocks: Tensor | Sequence[Tensor],
    *,
    ctx: SequenceContext,
    dim: int = 1,
    needs: Callable[[int, int], bool] | None = None,
) -> list[Blocks | None]:
    """The blocks of every rank that this one needs, by source; None for the others. The own ones are always there.

    Local in:  tensors with ctx.local_tokens in dim, of one dtype; other dims equal on all ranks. needs(receiver, source): the
               same pure function of ranks on every rank; None: all are needed.
    Local out: a list over ranks of tuples like `blocks`, with that rank's tokens in dim.
    Traffic:   `cost.ring_bytes`; the backward the gradients alone, `cost.ring_backward_bytes` with travels=False.
    Memory:    all blocks that are needed. An operator that can do with two at a time is built on `visit_ring`.
    Gradients: those of a block, from all ranks that got it, are added along the ring and return to its owner (the adjoint).
    Order:     every rank must call, and must run the backward; checks come before any message.
    Raises:    ValueError if a tensor is not this rank's part, or dtypes differ.
    References: Liu et al. 2023, arXiv:2310.01889.
    """
    given = (blocks,) if isinstance(blocks, Tensor) else tuple(blocks)
    check("ring", len(given) > 0, "blocks must be at least one tensor", len(given))
    dims = {dim % x.ndim for x in given}
    check("ring", len(dims) == 1, "dim={} must be the same dim of all blocks", sorted(dims), dim)
    (dim,) = dims
    for x in given:
        ctx.check_local("ring", x, dim)
        check("ring", x.dtype == given[0].dtype, "blocks must have one dtype, {}", x.dtype, given[0].dtype)
    if ctx.size == 1:
        return [given]
    route = Route.of(range(ctx.size), ctx.sizes, needs)
    wanted = [r == ctx.rank or needs is None or needs(ctx.rank, r) for r in range(ctx.size)]
    outputs = iter(_Ring.apply(ctx, dim, route, tuple(wanted), *given))  # type: ignore[no-untyped-call]
    return [tuple(next(outputs) for _ in given) if wants else None for wants in wanted]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, dim: int, route: Route, wanted: tuple[bool, ...], *blocks: Tensor
    ) -> Blocks:
        ctx.how, ctx.shapes = (context, dim, route, wanted), [x.shape for x in blocks]
        ctx.example = blocks[0].new_empty(0)
        found: dict[int, Blocks] = {}

        def visit(source: int, block: Blocks) -> None:
            if wanted[source]:
                found[source] = tuple(x.clone() for x in block)

        visit_ring(visit, blocks, route=route, ctx=context, dim=dim)
        shapes = [(x.shape[:dim], x.shape[dim + 1 :]) for x in blocks]
        for source, wants in enumerate(wanted):
            if wants and source not in found:  # an empty block never travels
                n = context.sizes[source]
                found[source] = tuple(blocks[0].new_empty(*before, n, *after) for before, after in shapes)
        return tuple(x for source in sorted(found) for x in found[source])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        context, dim, route, wanted = ctx.how
        width = len(ctx.shapes)
        places = {source: i * width for i, source in enumerate(s for s, wants in enumerate(wanted) if wants)}

        def visit(source: int, _: Blocks | None) -> Sequence[Tensor] | None:
            place = places.get(source)
            return None if place is None else gradients[place : place + width]

        like = tuple(ctx.example.new_empty(1).expand(shape) for shape in ctx.shapes)
        found = return_ring(visit, like, route=route, ctx=context, dim=dim, dtype=ctx.example.dtype, travel=False)
        return (None, None, None, None, *found)
