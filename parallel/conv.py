"""Convolutions over a sequence that is split across ranks: the twins of `seqengine.kernels.api`."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.api import SparseSpectrum
from seqengine.kernels.conv.op import Backend, Precision, ShortBackend, check_filter
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.halo import halo
from seqengine.parallel.exchange.transpose import transpose
from seqengine.parallel.layout import offsets, split_sizes


def short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    ctx: SequenceContext,
    activation: Literal["silu"] | None = None,
    backend: ShortBackend = "auto",
) -> tuple[Tensor, None]:
    """`kernels.short_conv` of the joined sequence, on this rank's part.

    Local in:  u [B, D, T], T = ctx.local_tokens; w [D, W]; bias [D]: the same on all ranks.
    Local out: (y [B, D, T], None). join(y) == kernels.short_conv(join(u), w, bias).
    Traffic:   a halo of W - 1 positions, B * D * (W - 1) elements, before the kernel.
    Gradients: du local; dw and dbias are this rank's partial sums.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    """
    if ctx.size == 1:
        y, _ = kernels.short_conv(u, w, bias, activation=activation, backend=backend)
        return y, None
    left = w.shape[1] - 1
    extended = halo(u, left, ctx=ctx, dim=2)
    past, part = extended.split([left, u.shape[2]], dim=2)
    y, _ = kernels.short_conv(part, w, bias, activation=activation, initial_state=past, backend=backend)
    return y, None


def long_conv(
    u: Tensor,
    k: Tensor | Callable[[slice], Tensor],
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    spectrum: SparseSpectrum | None = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
) -> tuple[Tensor, None]:
    """`kernels.long_conv` of the joined sequence, on this rank's part: filters of any length, as long as the whole.

    Local in:  u, pre_gate, post_gate [B, D, T], T = ctx.local_tokens; skip [D]; k [D, L], [G, L] or [B, D, L], the same on
               all ranks, or a function that makes the filters [C, L] of a slice of channels: each rank then makes only those
               of the channels that it convolves.
    Local out: (y [B, D, T], None). join(y) == kernels.long_conv(join(u), k, ...).
    Traffic:   two tensors change from tokens to channels and back, the gated input and the result: each 2 (P-1)/P * B*T*D
               elements, in u.dtype; the gates stay. D need not divide by P, nor T be even; ranks beyond D idle.
    Gradients: of u and the gates local; of k and skip this rank's partial sums (those of its channels).
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes disagree.
    References: Ku et al. 2025, arXiv:2503.01868 (channel all-to-all for long convolutions).
    """
    D = u.shape[1]
    if ctx.size == 1:
        whole = k if isinstance(k, Tensor) else k(slice(0, D))
        y, _ = kernels.long_conv(
            u,
            whole,
            skip=skip,
            pre_gate=pre_gate,
            post_gate=post_gate,
            spectrum=spectrum,
            backend=backend,
            precision=precision,
        )
        return y, None
    bounds = offsets(split_sizes(D, ctx.size))
    mine = slice(bounds[ctx.rank], bounds[ctx.rank + 1])
    x = u if pre_gate is None else pre_gate * u
    x = transpose(x, ctx=ctx, scatter=1, gather=2)
    filters = _filters_of(k, mine, D) if isinstance(k, Tensor) else k(mine)
    own_skip = None if skip is None else skip[mine]
    y, _ = kernels.long_conv(x, filters, skip=own_skip, spectrum=spectrum, backend=backend, precision=precision)
    y = transpose(y, ctx=ctx, scatter=2, gather=1, channels=D)
    return (y if post_gate is None else post_gate * y), None


def _filters_of(k: Tensor, channels: slice, D: int) -> Tensor:
    """The filters of some channels; of grouped filters only the groups that these channels use."""
    check_filter("long_conv", "k", k, D)
    if k.ndim == 3:
        return k[:, channels]
    per_filter = D // k.shape[0] if k.shape[0] else 1
    return k[torch.arange(channels.start, channels.stop, device=k.device) // per_filter]
