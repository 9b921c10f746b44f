"""Transpose: all-to-all between 'my tokens of all channels' and 'all tokens of my channels'.

On nodes of n ranks it can go two ways after each other. First each rank gives to a rank of its own node all that the ranks in
that one's place, on whatever node, will get: n messages over fast links. Then those ranks send to each node one message, of all
that theirs has for one rank there: over slow links there are n times fewer messages, n times as large, of the same bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.conv_cost import relay
from seqengine.parallel.layout import offsets, split_sizes


def transpose(
    x: Tensor,
    *,
    ctx: SequenceContext,
    scatter: int,
    gather: int,
    token_dim: int | None = None,
    channels: int | None = None,
    node_size: int | None = None,
) -> Tensor:
    """Cut dim `scatter` over the ranks and join dim `gather` from them; one of the two holds the tokens.

    Local in:  to channels (gather = token dim): ctx.local_tokens tokens of all C channels;
               to tokens (scatter = token dim): all tokens of this rank's channels.
    Local out: all tokens of `split_sizes(C, P)[rank]` channels, or ctx.local_tokens tokens of all channels.
    token_dim: by default the last of a 3-dimensional tensor [B, D, T], and 1 of a 4-dimensional one [B, T, H, K].
    channels:  C, for the way back when C is not P times this rank's channels; without it the ranks tell each other.
    node_size: of consecutive ranks on one node, the last node maybe smaller: the exchange then has two levels, "transpose
               within" and "transpose across" in the ledger, and the same result bit for bit. The same on all ranks.
    Traffic:   forward and backward each send x but for this rank's own part, (P - 1) / P of it when even; with node_size
               `conv_cost.two_level_bytes`.
    Gradients: the inverse exchange, which is also the adjoint.
    Order:     every rank must call; checks come before any message.
    Raises:    ValueError if neither or both dims hold the tokens, or sizes do not fit the context.
    References: Jacobs et al. 2023, arXiv:2309.14509 (all-to-all between sequence and heads).
    """
    ctx.require_contiguous("transpose")
    scatter, gather = scatter % x.ndim, gather % x.ndim
    tokens = _token_dim(x, token_dim)
    if scatter == gather or tokens not in (scatter, gather):
        raise ValueError(
            f"transpose: scatter and gather must be two dims, one of them the tokens' (dim {tokens} of {tuple(x.shape)}); "
            f"got scatter={scatter}, gather={gather}. Name it with token_dim if it is another."
        )
    if node_size is not None and node_size < 1:
        raise ValueError(f"transpose: node_size must be >= 1; got {node_size}.")
    if tokens == gather:
        ctx.check_local("transpose", x, tokens)
    elif x.shape[tokens] != ctx.total_tokens:
        raise ValueError(f"transpose: dim {tokens} must hold all {ctx.total_tokens} tokens; got {tuple(x.shape)}.")
    if ctx.size == 1:
        return x
    if tokens == gather:
        channel_sizes = split_sizes(x.shape[scatter], ctx.size)
        sizes = (channel_sizes, ctx.sizes)
    else:
        channel_sizes = _channel_sizes(x.shape[gather], ctx, channels)
        sizes = (ctx.sizes, channel_sizes)
    return exchange_parts(x, scatter, gather, *sizes, ctx=ctx, operation="transpose", node_size=node_size)


def _token_dim(x: Tensor, token_dim: int | None) -> int:
    if token_dim is not None:
        return token_dim % x.ndim
    if x.ndim not in (3, 4):
        raise ValueError(f"transpose: token_dim must be given for a tensor of {x.ndim} dims; got {tuple(x.shape)}.")
    return 2 if x.ndim == 3 else 1


def _channel_sizes(mine: int, ctx: SequenceContext, channels: int | None) -> list[int]:
    if channels is None:
        return comm.gather_integers(mine, ctx.require_group(), ctx.ledger())
    sizes = split_sizes(channels, ctx.size)
    if sizes[ctx.rank] != mine:
        raise ValueError(f"transpose: of {channels} channels rank {ctx.rank} holds {sizes[ctx.rank]}; got {mine}.")
    return sizes


def exchange_parts(
    x: Tensor,
    scatter: int,
    gather: int,
    scatter_sizes: Sequence[int],
    gather_sizes: Sequence[int],
    *,
    ctx: SequenceContext,
    operation: str,
    node_size: int | None = None,
) -> Tensor:
    """Part j of dim `scatter` goes to rank j; what came is joined along dim `gather`. All checked before; differentiable.

    scatter_sizes: of the parts. gather_sizes: how many of dim `gather` come from each rank. scatter may equal gather; then each
    rank's sizes are its own, which two levels cannot have.
    """
    is_one_level = node_size is None or node_size == 1 or node_size >= ctx.size
    how = (operation, None if is_one_level else node_size)
    y: Tensor = _Transpose.apply(x, ctx, scatter, gather, scatter_sizes, gather_sizes, *how)  # type: ignore[no-untyped-call]
    return y


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: SequenceContext,
        scatter: int,
        gather: int,
        scatter_sizes: Sequence[int],
        gather_sizes: Sequence[int],
        operation: str,
        node_size: int | None,
    ) -> Tensor:
        ctx.arguments = (context, scatter, gather, scatter_sizes, gather_sizes, operation, node_size)
        parts = x.split(list(scatter_sizes), dim=scatter)
        if node_size is not None:
            shape = _without(x.shape, scatter, gather)
            received = _two_level(parts, (scatter, gather), shape, scatter_sizes, gather_sizes, context, node_size)
            return torch.cat(received, dim=gather)
        shapes = _received_shapes(x.shape, scatter, gather, scatter_sizes[context.rank], gather_sizes)
        received = comm.all_to_all(parts, shapes, context.require_group(), context.ledger(), operation)
        return torch.cat(received, dim=gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        context, scatter, gather, scatter_sizes, gather_sizes, *how = ctx.arguments
        dx: Tensor = _Transpose.apply(gradient, context, gather, scatter, gather_sizes, scatter_sizes, *how)  # type: ignore[no-untyped-call]
        return dx, *[None] * 7


def _received_shapes(
    shape: torch.Size, scatter: int, gather: int, mine: int, gather_sizes: Sequence[int]
) -> list[torch.Size]:
    """Of what comes from each rank, where this rank gets `mine` of dim `scatter`."""
    sizes = list(shape)
    sizes[scatter] = mine
    found = []
    for size in gather_sizes:
        sizes[gather] = size
        found.append(torch.Size(sizes))
    return found


def _without(shape: torch.Size, *dims: int) -> list[int]:
    """The shape with ones in these dims."""
    return [1 if dim in dims else size for dim, size in enumerate(shape)]


def _two_level(
    parts: Sequence[Tensor],
    dims: tuple[int, int],
    shape: list[int],
    scatter_sizes: Sequence[int],
    gather_sizes: Sequence[int],
    context: SequenceContext,
    node_size: int,
) -> list[Tensor]:
    """What each rank has for this one, through the ranks of both nodes; see `conv_cost.relay`."""
    P, rank = context.size, context.rank
    wire = (context.require_group(), context.ledger())
    start = rank // node_size * node_size
    node = range(start, min(start + node_size, P))

    def block_shape(source: int, target: int) -> torch.Size:
        sizes = list(shape)
        sizes[dims[0]], sizes[dims[1]] = scatter_sizes[target], gather_sizes[source]
        return torch.Size(sizes)

    def swap(
        sends: dict[int, list[Tensor]], receives: dict[int, list[torch.Size]], name: str
    ) -> dict[int, list[Tensor]]:
        """One message to each peer, of several blocks, and one from each."""
        outgoing = {peer: torch.cat([t.reshape(-1) for t in blocks]) for peer, blocks in sends.items()}
        incoming = {peer: parts[0].new_empty(sum(s.numel() for s in shapes)) for peer, shapes in receives.items()}
        out, came = ([(p, t) for p, t in x.items() if t.numel() > 0] for x in (outgoing, incoming))
        comm.send_and_receive(out, came, *wire, name)
        return {
            peer: [
                t.view(s) for t, s in zip(flat.split([s.numel() for s in receives[peer]]), receives[peer], strict=True)
            ]
            for peer, flat in incoming.items()
        }

    targets = {j: [q for q in range(P) if relay(P, node_size, rank, q) == j] for j in node}
    peers = [j for j in node if j != rank]
    mine = targets[rank]
    here = swap(
        {j: [parts[q] for q in targets[j]] for j in peers},
        {i: [block_shape(i, q) for q in mine] for i in peers},
        "transpose within",
    )
    here[rank] = [parts[q] for q in mine]
    sources = {relay(P, node_size, b, rank): range(b, min(b + node_size, P)) for b in range(0, P, node_size)}
    across = swap(
        {q: [here[i][n] for i in node] for n, q in enumerate(mine) if q not in node},
        {z: [block_shape(i, rank) for i in ranks] for z, ranks in sources.items() if z not in node},
        "transpose across",
    )
    found = {i: here[i][mine.index(rank)] for i in node}
    for z, blocks in across.items():
        found.update(zip(sources[z], blocks, strict=True))
    return [found[source] for source in range(P)]


def transpose_through(
    x: Tensor,
    work: Callable[[Tensor, slice], Tensor],
    *,
    ctx: SequenceContext,
    groups: int,
) -> Tensor:
    """x [B, D, T] to channels, `work`, and back to tokens, group by group of channels.

    work(all tokens of some of this rank's channels [B, C, total], those channels) -> the same shape. While it runs on a group,
    the groups after it are on their way here and those before it on their way back; in the backward the other way round.
    Every rank has a part of each group, so that the bytes are those of two transposes. Once differentiable.
    """
    P, rank = ctx.size, ctx.rank
    cuts = [split_sizes(channels, groups) for channels in split_sizes(x.shape[1], P)]
    pieces = x.split([size for cut in cuts for size in cut], dim=1)
    there = []
    for i in range(groups):
        shapes = _received_shapes(x.shape, 1, 2, cuts[rank][i], ctx.sizes)
        there.append(_Pending([pieces[r * groups + i] for r in range(P)], shapes, ctx))
    first = sum(sum(cut) for cut in cuts[:rank])
    edges = offsets(cuts[rank])
    back = []
    for i, pending in enumerate(there):
        y = work(torch.cat(pending.finish(), dim=2), slice(first + edges[i], first + edges[i + 1]))
        shapes = [torch.Size((x.shape[0], cut[i], ctx.local_tokens)) for cut in cuts]
        back.append(_Pending(list(y.split(ctx.sizes, dim=2)), shapes, ctx))
    came = [pending.finish() for pending in back]
    return torch.cat([came[i][r] for r in range(P) for i in range(groups)], dim=1)


class _Pending:
    """An all-to-all under way, in the graph: the backward of `finish` starts the inverse one, that of its start waits."""

    def __init__(self, parts: list[Tensor], shapes: list[torch.Size], context: SequenceContext):
        self.context, self.shapes = context, ([p.shape for p in parts], shapes)
        self.running: tuple[list[Tensor], list[comm.Work]] | None = None
        self._token: Tensor = _Start.apply(self, *parts)  # type: ignore[no-untyped-call]

    def finish(self) -> tuple[Tensor, ...]:
        """What came from each rank."""
        parts: tuple[Tensor, ...] = _Finish.apply(self, self._token)  # type: ignore[no-untyped-call]
        return parts

    def begin(self, parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
        context = self.context
        self.running = comm.start_all_to_all(parts, shapes, context.require_group(), context.ledger(), "transpose")

    def end(self) -> list[Tensor]:
        assert self.running is not None, "an exchange is begun before it ends"
        (received, works), self.running = self.running, None
        for work in works:
            work.wait()
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Pending, *parts: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(parts, exchange.shapes[1])
        return parts[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.end()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Pending, token: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.end())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.begin(gradients, ctx.exchange.shapes[0])
        return None, gradients[0].new_zeros(0)
