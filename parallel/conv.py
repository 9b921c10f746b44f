"""Convolutions over a sequence that is split across ranks: the twins of `seqengine.kernels.api`."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.api import SparseSpectrum
from seqengine.kernels.checks import check, check_shape
from seqengine.kernels.conv.op import Backend, Precision, ShortBackend, check_filter
from seqengine.parallel import cost
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.transpose import transpose
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.window import inputs_before, last_inputs, shared


def short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    ctx: SequenceContext,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: ShortBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`kernels.short_conv` of the joined sequence, on this rank's part.

    Local in:  u [B, D, T], T = ctx.local_tokens; w [D, W]; bias [D]; initial_state [B, D, W-1], the inputs before the global
               first token: the same on all ranks.
    Local out: (y [B, D, T], the last W-1 inputs of the joined sequence, on every rank, or None).
               join(y) == kernels.short_conv(join(u), w, bias, ...).
    Traffic:   a halo of W - 1 positions, B * D * (W - 1) elements, before the kernel; the final state goes to all ranks.
    Gradients: du local; dw and dbias are this rank's partial sums; that of initial_state is the whole one on every rank.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    """
    settings: dict[str, Any] = {"activation": activation, "backend": backend}
    if ctx.size == 1:
        states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernels.short_conv(u, w, bias, **settings, **states)
    keep = w.shape[1] - 1
    check_shape("short_conv", "initial_state", initial_state, "[B, D, W-1]", *u.shape[:2], keep)
    ctx.check_local("short_conv", u, 2)
    past = inputs_before(u, keep, initial_state, ctx)
    y, _ = kernels.short_conv(u, w, bias, **settings, initial_state=past)
    return y, (last_inputs(u, keep, initial_state, ctx) if output_final_state else None)


def long_conv(
    u: Tensor,
    k: Tensor | Callable[[slice], Tensor],
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    spectrum: SparseSpectrum | None = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    algorithm: Literal["auto", "halo", "transpose"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`kernels.long_conv` of the joined sequence, on this rank's part: filters of any length, as long as the whole.

    Local in:  u, pre_gate, post_gate [B, D, T], T = ctx.local_tokens; skip [D]; k [D, L], [G, L] or [B, D, L], the same on
               all ranks, or a function that makes the filters [C, L] of a slice of channels: each rank then makes only those
               of the channels that it convolves. initial_state [B, D, L-1]: the gated inputs before the global first token.
    Local out: (y [B, D, T], the last L-1 gated inputs of the joined sequence, on every rank, or None).
               join(y) == kernels.long_conv(join(u), k, ...).
    Algorithm: halo: the L-1 inputs before the part come from the ranks that hold them. transpose: two tensors change from
               tokens to channels and back, the gated input and the result; the gates stay. auto: the one that sends less
               (`cost.long_conv_algorithm`); transpose for a function k and with a spectrum. D need not divide by P, nor T
               be even; with transpose, ranks beyond D idle.
    Traffic:   halo B*D*(L-1) elements, transpose 2 (P-1)/P * B*T*D, in u.dtype; the final state goes to all ranks.
    Gradients: of u and the gates local; of k and skip this rank's partial sums (of its tokens, or of its channels); of
               initial_state the whole one on every rank.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes disagree, or the algorithm is unknown or cannot do this; before any message.
    References: Ku et al. 2025, arXiv:2503.01868 (channel all-to-all for long convolutions).
    """
    name, D = "long_conv", u.shape[1]
    check(
        name, algorithm in ("auto", "halo", "transpose"), "algorithm must be 'auto', 'halo' or 'transpose'", algorithm
    )
    settings: dict[str, Any] = {"spectrum": spectrum, "backend": backend, "precision": precision}
    gates: dict[str, Any] = {"pre_gate": pre_gate, "post_gate": post_gate}
    if ctx.size == 1:
        whole = k if isinstance(k, Tensor) else k(slice(0, D))
        states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernels.long_conv(u, whole, skip=skip, **gates, **states, **settings)
    ctx.check_local(name, u, 2)
    stateless = initial_state is None and not output_final_state
    check(name, spectrum is None or stateless, "a spectrum has no states: leave them out", "one of them")
    must = "with a spectrum or a function k the algorithm must be 'transpose'"
    check(name, algorithm != "halo" or (spectrum is None and isinstance(k, Tensor)), must, algorithm)
    if isinstance(k, Tensor):
        check_filter(name, "k", k, D)
        check_shape(name, "initial_state", initial_state, "[B, D, L-1]", *u.shape[:2], k.shape[-1] - 1)
        if algorithm == "auto" and spectrum is None:
            algorithm = cost.long_conv_algorithm(ctx.bounds, k.shape[-1])
    x = u if pre_gate is None else pre_gate * u
    if algorithm == "halo" and isinstance(k, Tensor):
        past = inputs_before(x, k.shape[-1] - 1, initial_state, ctx)
        y, _ = kernels.long_conv(u, k, skip=skip, **gates, initial_state=past, **settings)
        taps = k.shape[-1]
    else:
        y, taps = _by_channels(x, k, skip, initial_state, ctx, settings)
        y = y if post_gate is None else post_gate * y
    return y, (last_inputs(x, taps - 1, initial_state, ctx) if output_final_state else None)


def _by_channels(
    x: Tensor,
    k: Tensor | Callable[[slice], Tensor],
    skip: Tensor | None,
    initial_state: Tensor | None,
    ctx: SequenceContext,
    settings: dict[str, Any],
) -> tuple[Tensor, int]:
    """The convolution of the gated input x, each rank all tokens of its channels; and the number of taps."""
    D = x.shape[1]
    bounds = offsets(split_sizes(D, ctx.size))
    mine = slice(bounds[ctx.rank], bounds[ctx.rank + 1])
    columns = transpose(x, ctx=ctx, scatter=1, gather=2)
    filters = _filters_of(k, mine, D) if isinstance(k, Tensor) else k(mine)
    before = None if initial_state is None else shared(initial_state, ctx)[:, mine]
    own_skip = None if skip is None else skip[mine]
    y, _ = kernels.long_conv(columns, filters, skip=own_skip, initial_state=before, **settings)
    return transpose(y, ctx=ctx, scatter=2, gather=1, channels=D), filters.shape[-1]


def _filters_of(k: Tensor, channels: slice, D: int) -> Tensor:
    """The filters of some channels; of grouped filters only the groups that these channels use."""
    if k.ndim == 3:
        return k[:, channels]
    per_filter = D // k.shape[0] if k.shape[0] else 1
    return k[torch.arange(channels.start, channels.stop, device=k.device) // per_filter]
