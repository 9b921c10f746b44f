"""Relayout: tokens from one cut of a sequence over the ranks to another, in one all-to-all.

Who sends which rows to whom follows from the two cuts alone. A twin that needs contiguous parts takes a zigzag context through
`on_contiguous`: its token tensors go there together, its output comes back.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from seqengine.kernels.checks import check
from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import Intervals, common_rows, count

Parts = tuple[Intervals, ...]
P = ParamSpec("P")
R = TypeVar("R")


def relayout(x: Tensor, *, ctx: SequenceContext, to: SequenceContext, dim: int) -> Tensor:
    """This rank's part of a sequence as `ctx` cuts it -> its part as `to` does: contiguous, zigzag, even, uneven, any to any.

    Local in:  x with ctx.local_tokens in dim; any other dims, equal on all ranks; any dtype.
    Local out: the same with to.local_tokens in dim; to.join(...) is ctx.join(x), bit by bit.
    Traffic:   each token whose rank changes once: `cost.relayout_bytes` of ctx.parts and to.parts, in ctx.ledger(). The
               backward is the way back. Nothing where the cuts are the same.
    Gradients: the inverse exchange, which is also the adjoint. Any derivative.
    Order:     every rank must call; checks come before any message. With ctx.size == 1 nothing is sent.
    Raises:    ValueError if the contexts are not of one group and number of tokens, or x is not this rank's part.
    """
    ctx.check_local("relayout", x, dim)
    (found,) = _together("relayout", [x], [dim], ctx, to)
    return found


def on_contiguous(
    tokens: Mapping[str, int], output: int, *, documents: bool
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a twin that needs contiguous parts one that takes zigzag contexts too, by `relayout` there and back.

    tokens:    its arguments that have a token dim, with that dim; one that is None or has fewer dims is left as it is.
    output:    the token dim of its result, or of the first of a tuple of results.
    documents: whether it knows ctx.documents; if not, a context with documents raises ValueError before any message.
    Traffic:   with a zigzag context one all-to-all of the token tensors of each dtype (`cost.relayout_bytes` with the bytes of
               a row of all), one of the output, and the same the other way in the backward; the twin's own checks come after
               the first of them, on all ranks alike. Else nothing.
    """

    def decorate(twin: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(twin), twin.__name__

        @wraps(twin)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            ctx = kwargs.get("ctx")
            if not isinstance(ctx, SequenceContext):
                return twin(*args, **kwargs)  # which says so
            must = "there is no form for packed documents: use a context without, or one document a call"
            check(name, documents or ctx.documents is None, must, ctx.documents)
            if ctx.layout == "contiguous":
                return twin(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            given = {n: call.arguments.get(n) for n in tokens}
            moved = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.ndim > tokens[n]}
            for n, x in moved.items():
                ctx.check_local(name, x, tokens[n])
            there = ctx.contiguous()
            found = _together(name, list(moved.values()), [tokens[n] for n in moved], ctx, there)
            call.arguments.update(zip(moved, found, strict=True))
            call.arguments["ctx"] = there
            result: Any = twin(*call.args, **call.kwargs)
            if isinstance(result, Tensor):
                return cast(R, relayout(result, ctx=there, to=ctx, dim=output))
            first, *others = result
            return cast(R, (relayout(first, ctx=there, to=ctx, dim=output), *others))

        return run

    return decorate


def _together(
    name: str, tensors: Sequence[Tensor], dims: Sequence[int], ctx: SequenceContext, to: SequenceContext
) -> list[Tensor]:
    """`relayout` of several tensors, those of one dtype in one exchange."""
    is_same = (ctx.group, ctx.rank, ctx.size, ctx.total_tokens) == (to.group, to.rank, to.size, to.total_tokens)
    must = "both contexts must be of one group and {} tokens"
    check(name, is_same, must, (to.size, to.total_tokens), ctx.total_tokens)
    if ctx.size == 1 or ctx.parts == to.parts:
        return list(tensors)
    found = list(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        some = [tensors[i] for i in places]
        some_dims = tuple(dims[i] % x.ndim for i, x in zip(places, some, strict=True))
        moved = _Relayout.apply(ctx, ctx.parts, to.parts, some_dims, *some)  # type: ignore[no-untyped-call]
        for i, x in zip(places, moved, strict=True):
            found[i] = x
    return found


class _Relayout(torch.autograd.Function):
    """Tensors of one dtype, from the parts `source` to the parts `target`."""

    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, source: Parts, target: Parts, dims: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.how = (context, source, target, dims)
        found = _exchange(context, source, target, dims, tensors)
        if not (tensors[0].is_floating_point() or tensors[0].is_complex()):
            ctx.mark_non_differentiable(*found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        context, source, target, dims = ctx.how
        places = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        some_dims = tuple(dims[i] for i in places)
        moved = _Relayout.apply(context, target, source, some_dims, *(gradients[i] for i in places))  # type: ignore[no-untyped-call]
        found: list[Tensor | None] = [None] * len(gradients)
        for i, x in zip(places, moved, strict=True):
            found[i] = x
        return (None, None, None, None, *found)


def _exchange(
    context: SequenceContext, source: Parts, target: Parts, dims: tuple[int, ...], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """To each rank its rows of each tensor in turn."""
    rank, example = context.rank, tensors[0]
    shapes = [
        torch.Size((*x.shape[:dim], count(target[rank]), *x.shape[dim + 1 :]))
        for x, dim in zip(tensors, dims, strict=True)
    ]
    results = [torch.empty(shape, dtype=example.dtype, device=example.device) for shape in shapes]
    outgoing, sizes, places = [], [], []
    for other in range(context.size):
        given = [rows for rows, _ in common_rows(source[rank], target[other])]
        pieces = [x.narrow(dim, a, b - a).reshape(-1) for x, dim in zip(tensors, dims, strict=True) for a, b in given]
        outgoing.append(torch.cat(pieces) if pieces else example.new_empty(0))
        taken = [rows for _, rows in common_rows(source[other], target[rank])]
        places.append([y.narrow(dim, a, b - a) for y, dim in zip(results, dims, strict=True) for a, b in taken])
        sizes.append(torch.Size([sum(place.numel() for place in places[-1])]))
    arrived = comm.all_to_all(outgoing, sizes, context.require_group(), context.ledger(), "relayout")
    for message, held in zip(arrived, places, strict=True):
        for part, place in zip(message.split([place.numel() for place in held]), held, strict=True):
            place.copy_(part.view(place.shape))
    return tuple(results)
