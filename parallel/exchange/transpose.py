"""Transpose: all-to-all between 'my tokens of all channels' and 'all tokens of my channels'."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import split_sizes


def transpose(
    x: Tensor,
    *,
    ctx: SequenceContext,
    scatter: int,
    gather: int,
    token_dim: int | None = None,
    channels: int | None = None,
) -> Tensor:
    """Cut dim `scatter` over the ranks and join dim `gather` from them; one of the two holds the tokens.

    Local in:  to channels (gather = token dim): ctx.local_tokens tokens of all C channels;
               to tokens (scatter = token dim): all tokens of this rank's channels.
    Local out: all tokens of `split_sizes(C, P)[rank]` channels, or ctx.local_tokens tokens of all channels.
    token_dim: by default the last of a 3-dimensional tensor [B, D, T], and 1 of a 4-dimensional one [B, T, H, K].
    channels:  C, for the way back when C is not P times this rank's channels; without it the ranks tell each other.
    Traffic:   forward and backward each send x but for this rank's own part, (P - 1) / P of it when even.
    Gradients: the inverse exchange, which is also the adjoint.
    Order:     every rank must call; checks come before any message.
    Raises:    ValueError if neither or both dims hold the tokens, or sizes do not fit the context.
    References: Jacobs et al. 2023, arXiv:2309.14509 (all-to-all between sequence and heads).
    """
    scatter, gather = scatter % x.ndim, gather % x.ndim
    tokens = _token_dim(x, token_dim)
    if scatter == gather or tokens not in (scatter, gather):
        raise ValueError(
            f"transpose: scatter and gather must be two dims, one of them the tokens' (dim {tokens} of {tuple(x.shape)}); "
            f"got scatter={scatter}, gather={gather}. Name it with token_dim if it is another."
        )
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
    y: Tensor = _Transpose.apply(x, ctx, scatter, gather, *sizes)  # type: ignore[no-untyped-call]
    return y


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
    ) -> Tensor:
        ctx.arguments = (context, scatter, gather, scatter_sizes, gather_sizes)
        parts = x.split(list(scatter_sizes), dim=scatter)
        shape = list(x.shape)
        shape[scatter] = scatter_sizes[context.rank]
        shapes = []
        for size in gather_sizes:
            shape[gather] = size
            shapes.append(torch.Size(shape))
        received = comm.all_to_all(parts, shapes, context.require_group(), context.ledger(), "transpose")
        return torch.cat(received, dim=gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        context, scatter, gather, scatter_sizes, gather_sizes = ctx.arguments
        dx: Tensor = _Transpose.apply(gradient, context, gather, scatter, gather_sizes, scatter_sizes)  # type: ignore[no-untyped-call]
        return dx, None, None, None, None, None
