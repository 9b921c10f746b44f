"""The language-model loss over a sequence that is split across ranks."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.parallel import comm
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: SequenceContext,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: SequenceContext,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


@breaks_graph
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: SequenceContext,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: bool = False,
) -> tuple[Tensor, ...]:
    """`kernels.linear_cross_entropy` of the joined sequence: (sum of nats, number of tokens), the same on every rank.

    Local in:  hidden [..., D], labels [...] of this rank's tokens, in any layout. Labels are shifted before the sequence is
               split. With output_squares a third result, the sum over tokens of logsumexp^2.
    Traffic:   one all-reduce of two numbers, or three; none in the backward.
    Gradients: d hidden local; d weight this rank's partial sum. Each result counts once: call backward on every rank with the
               same upstream gradient, for example (nats / total).backward() with the total over all micro-batches.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    """
    sums: list[Tensor] = []
    if output_squares:
        nats, tokens, squares = kernels.linear_cross_entropy(
            hidden, weight, labels, ignore_index=ignore_index, tile=tile, output_squares=True
        )
        sums = [nats, squares]
    else:
        nats, tokens = kernels.linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, tile=tile)
        sums = [nats]
    if ctx.size == 1:
        return (nats, tokens, *sums[1:])
    everything = torch.stack([*(share.detach().double() for share in sums), tokens.double()])
    comm.all_reduce_sum(everything, ctx.require_group(), ctx.ledger())
    joined: list[Tensor] = [
        _Replicated.apply(share, total.to(share.dtype))  # type: ignore[no-untyped-call]
        for share, total in zip(sums, everything, strict=False)
    ]
    return (joined[0], everything[-1].round().to(torch.int64), *joined[1:])


class _Replicated(torch.autograd.Function):
    """The total of all ranks in place of this rank's share; the gradient of the share is that of the total."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
