"""The language-model loss over a sequence that is split across ranks."""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.parallel import comm
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext


@breaks_graph
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: SequenceContext,
    ignore_index: int = -100,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_cross_entropy` of the joined sequence: (sum of nats, number of tokens), the same on every rank.

    Local in:  hidden [..., D], labels [...] of this rank's tokens, in any layout. Labels are shifted before the sequence is
               split.
    Traffic:   one all-reduce of two numbers; none in the backward.
    Gradients: d hidden local; d weight this rank's partial sum. The result counts once: call backward on every rank with the
               same upstream gradient, for example (nats / total).backward() with the total over all micro-batches.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    """
    nats, tokens = kernels.linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, tile=tile)
    if ctx.size == 1:
        return nats, tokens
    both = torch.stack([nats.detach().double(), tokens.double()])
    comm.all_reduce_sum(both, ctx.require_group(), ctx.ledger())
    total: Tensor = _Replicated.apply(nats, both[0].to(nats.dtype))  # type: ignore[no-untyped-call]
    return total, both[1].round().to(torch.int64)


class _Replicated(torch.autograd.Function):
    """The total of all ranks in place of this rank's share; the gradient of the share is that of the total."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
