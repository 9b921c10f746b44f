"""Convolutions over a sequence that is split across ranks: the twins of `seqengine.kernels.api`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.api import SparseSpectrum
from seqengine.kernels.checks import check, check_bounds, check_shape
from seqengine.kernels.conv import causal_conv1d
from seqengine.kernels.conv.op import Backend, Precision, ShortBackend, check_filter
from seqengine.parallel import conv_cost
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.distributed_fft import fft_long_conv
from seqengine.parallel.documents import documents_of
from seqengine.parallel.exchange.relayout import on_contiguous
from seqengine.parallel.exchange.transpose import transpose, transpose_through
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.window import Window, convolve_after, last_inputs, shared

Filter = Tensor | Callable[[slice], Tensor]
TOKENS = {"u": 2, "pre_gate": 2, "post_gate": 2}
"""Arguments with a token dim."""


@breaks_graph
@on_contiguous({"u": 2}, output=2, documents=True)
def short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    ctx: SequenceContext,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: ShortBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`kernels.short_conv` of the joined sequence, on this rank's part.

    Local in:  u [B, D, T], T = ctx.local_tokens; w [D, W]; bias [D]; initial_state [B, D, W-1], the inputs before the global
               first token: the same on all ranks. With cu_seqlens [M + 1], B is 1: the boundaries of documents in the joined
               sequence, the same on all ranks, wherever the ranks cut it; initial_state is [M, D, W-1], one a document. None:
               ctx.documents, if it has some.
    Local out: (y [B, D, T], the last W-1 inputs of the joined sequence or of each document, on every rank, or None).
               join(y) == kernels.short_conv(join(u), w, bias, ...).
    Traffic:   a halo of W - 1 positions, B * D * (W - 1) elements, none of another document: `cost.halo_bytes`; the final
               states go to all ranks: `conv_cost.final_state_bytes`. A zigzag context: u and y by `relayout` more.
    Overlap:   the halo is on its way while the part is convolved; then its first W - 1 outputs are made again. In the backward
               the gradient of the halo travels meanwhile.
    Gradients: du local; dw and dbias are this rank's partial sums; that of initial_state is the whole one on every rank. A
               second derivative raises RuntimeError if P > 1.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes or dtypes do not fit, before any message.
    """
    name = "short_conv"
    cu_seqlens = documents_of(name, cu_seqlens, ctx, u.device)
    settings: dict[str, Any] = {"activation": activation, "backend": backend}
    states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
    if ctx.size == 1:
        return kernels.short_conv(u, w, bias, **settings, **states, cu_seqlens=cu_seqlens)
    documents = _documents(name, cu_seqlens, ctx)
    if backend == "causal-conv1d":
        causal_conv1d.check_runs(u, w, initial_state is not None or documents is not None)
        reaching = {**settings, "backend": "auto"}  # it has no state: the few outputs with one are made in torch
    else:
        reaching = settings
    _try(kernels.short_conv, u, w, bias, **reaching, **states, cu_seqlens=cu_seqlens)
    ctx.check_local(name, u, 2)

    def convolve(state: Tensor | None, bounds: Tensor | None) -> Tensor:
        how = settings if state is None else reaching
        return kernels.short_conv(u, w, bias, **how, initial_state=state, cu_seqlens=bounds)[0]

    def convolve_head(x: Tensor, _: Tensor | None, state: Tensor | None) -> Tensor:
        return kernels.short_conv(x, w, bias, **reaching, initial_state=state)[0]

    keep = w.shape[1] - 1
    y = convolve_after(convolve, convolve_head, u, None, keep, initial_state, documents, ctx)
    return y, (last_inputs(u, keep, initial_state, documents, ctx) if output_final_state else None)


@breaks_graph
@on_contiguous(TOKENS, output=2, documents=True)
def long_conv(
    u: Tensor,
    k: Filter,
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    spectrum: SparseSpectrum | None = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    algorithm: Literal["auto", "halo", "transpose", "fft"] = "auto",
    groups: int | None = None,
    node_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.long_conv` of the joined sequence, on this rank's part: filters of any length, as long as the whole.

    Local in:  u, pre_gate, post_gate [B, D, T], T = ctx.local_tokens; skip [D]; k [D, L], [G, L] or [B, D, L], the same on
               all ranks, or a function that makes the filters [C, L] of a slice of channels: each rank then makes only those
               of the channels that it convolves. initial_state [B, D, L-1]: the gated inputs before the global first token.
               With cu_seqlens [M + 1], B is 1: boundaries of documents as in `short_conv`; initial_state is [M, D, L-1].
    Local out: (y [B, D, T], the last L-1 gated inputs of the joined sequence or of each document, on every rank, or None).
               join(y) == kernels.long_conv(join(u), k, ...).
    Algorithm: halo: the L-1 inputs before the part come from the ranks that hold them. transpose: two tensors change from
               tokens to channels and back, the gated input and the result; the gates stay. fft: a Fourier transform over ranks,
               each with a share of every channel; float32 arithmetic for halves; no cu_seqlens. auto: halo or transpose, the
               one that sends less; where channels are fewer than ranks, so that transpose leaves P - D ranks idle, the shorter
               modelled time of transpose and fft (`conv_cost.long_conv_algorithm`). transpose for a function k and with a
               spectrum. D need not divide by P, nor T be even.
    Traffic:   halo B*D*(L-1) elements, none of another document; transpose 2 (P-1)/P * B*T*D, in u.dtype
               (`conv_cost.long_conv_bytes`); fft 6 (P-1)/P * B*T*D numbers and the filter's spectrum
               (`conv_cost.FourStep.sent_bytes`). The final states go to all ranks: `conv_cost.final_state_bytes`. A zigzag
               context: u and the gates to contiguous parts and y back by `relayout` more.
    Overlap:   halo: on its way while the part is convolved, where the filter is short against the part. transpose: in `groups`
               of channels, one of which is convolved while others travel, forward and backward, the same bytes; None:
               `conv_cost.long_conv_groups`.
    Nodes:     node_size: of consecutive ranks on one node; transpose then takes two levels (see `transpose`), in one group.
    Gradients: of u and the gates local; of k and skip this rank's partial sums (of its tokens, or of its channels); of
               initial_state the whole one on every rank. A second derivative raises RuntimeError for halo and groups > 1.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes disagree, or the algorithm is unknown or cannot do this; before any message.
    References: Ku et al. 2025, arXiv:2503.01868 (channel all-to-all for long convolutions).
    """
    name = "long_conv"
    cu_seqlens = documents_of(name, cu_seqlens, ctx, u.device)
    known = ("auto", "halo", "transpose", "fft")
    check(name, algorithm in known, "algorithm must be 'auto', 'halo', 'transpose' or 'fft'", algorithm)
    settings: dict[str, Any] = {"spectrum": spectrum, "backend": backend, "precision": precision}
    states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
    gates: dict[str, Any] = {"pre_gate": pre_gate, "post_gate": post_gate}
    if ctx.size == 1:
        whole = k if isinstance(k, Tensor) else k(slice(0, u.shape[1]))
        return kernels.long_conv(u, whole, skip=skip, **gates, **states, cu_seqlens=cu_seqlens, **settings)
    stateless = initial_state is None and not output_final_state and cu_seqlens is None
    must = "a spectrum has no states and no cu_seqlens: leave them out"
    check(name, spectrum is None or stateless, must, "one of them")
    documents = _documents(name, cu_seqlens, ctx)
    if isinstance(k, Tensor):
        on_nothing = {**gates, **states, **settings, "cu_seqlens": cu_seqlens, "spectrum": None}
        _try(kernels.long_conv, u, k, skip=skip, **on_nothing)
    for x in (u, pre_gate, post_gate):
        if x is not None:
            ctx.check_local(name, x, 2)
    must = "with a spectrum or a function k the algorithm must not be 'halo'"
    check(name, algorithm != "halo" or (spectrum is None and isinstance(k, Tensor)), must, algorithm)
    must = "'fft' has no spectrum, no cu_seqlens and no backend but 'auto': use 'transpose'"
    plain = spectrum is None and documents is None and backend == "auto" and precision == "auto"
    check(name, algorithm != "fft" or plain, must, algorithm)
    if algorithm == "auto":
        algorithm = _algorithm(u, k, spectrum, plain, ctx)
    x = u if pre_gate is None else pre_gate * u
    if algorithm == "halo":
        assert isinstance(k, Tensor)
        taps, settings["skip"] = k.shape[-1], skip
        y = _by_halo(u, x, k, gates, initial_state, documents, ctx, settings)
    else:
        make = _Filters(k, u.shape[1], initial_state)
        if algorithm == "fft":
            before = None if initial_state is None else shared(initial_state, ctx)
            y = fft_long_conv(x, make(slice(0, u.shape[1])), skip, before, ctx)
        else:
            shape = (node_size, _groups(name, groups, u, node_size, ctx))
            y = _by_channels(x, make, skip, initial_state, cu_seqlens, shape, ctx, settings)
        taps = make.taps
        y = (y if post_gate is None else post_gate * y).to(u.dtype)
    return y, (last_inputs(x, taps - 1, initial_state, documents, ctx) if output_final_state else None)


@breaks_graph
@on_contiguous(TOKENS, output=2, documents=False)
def long_conv_bidirectional(
    u: Tensor,
    k_forward: Tensor,
    k_backward: Tensor,
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    backend: Backend = "auto",
    algorithm: Literal["auto", "halo", "transpose"] = "auto",
    node_size: int | None = None,
) -> Tensor:
    """`kernels.long_conv_bidirectional` of the joined sequence, on this rank's part.

    Local in:  as in `long_conv`; k_forward and k_backward [D, L], [G, L] or [B, D, L], which may differ in length.
    Local out: y [B, D, T]; join(y) == kernels.long_conv_bidirectional(join(u), k_forward, k_backward, ...).
    Algorithm: halo: the inputs before the part and those after it come in one exchange. transpose: as in `long_conv`, the two
               tensors for both directions. auto: the one that sends less.
    Traffic:   halo B*D*(L_forward + L_backward - 2) elements (`conv_cost.window_bytes`), transpose 2 (P-1)/P * B*T*D
               (`conv_cost.long_conv_bytes`), in u.dtype. node_size, and a zigzag context, as in `long_conv`.
    Gradients: of u and the gates local; of the filters and skip this rank's partial sums. A second derivative raises
               RuntimeError for halo.
    Order:     every rank must call. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes disagree, the algorithm is unknown or the context has documents; before any message.
    """
    name, kernel = "long_conv_bidirectional", kernels.long_conv_bidirectional
    gates: dict[str, Any] = {"pre_gate": pre_gate, "post_gate": post_gate}
    known = ("auto", "halo", "transpose")
    check(name, algorithm in known, "algorithm must be 'auto', 'halo' or 'transpose'", algorithm)
    if ctx.size == 1:
        return kernel(u, k_forward, k_backward, skip=skip, **gates, backend=backend)
    _try(kernel, u, k_forward, k_backward, skip=skip, **gates, backend=backend)
    for given in (u, pre_gate, post_gate):
        if given is not None:
            ctx.check_local(name, given, 2)
    left, right = k_forward.shape[-1] - 1, k_backward.shape[-1] - 1
    x = u if pre_gate is None else pre_gate * u
    if algorithm == "auto":
        algorithm = "halo" if conv_cost.long_conv_algorithm(ctx.bounds, left + right + 1) == "halo" else "transpose"
    if algorithm == "halo":
        before, after = Window(x, conv_cost.windows(ctx.bounds, left, right), ctx).finish()
        y = kernel(torch.cat([before, x, after], dim=-1), k_forward, k_backward, skip=skip, backend=backend)
        y = y.narrow(-1, before.shape[-1], ctx.local_tokens)
    else:
        D = u.shape[1]
        bounds = offsets(split_sizes(D, ctx.size))
        mine = slice(bounds[ctx.rank], bounds[ctx.rank + 1])
        filters = [_filters_of(k, mine, D) for k in (k_forward, k_backward)]
        columns = transpose(x, ctx=ctx, scatter=1, gather=2, node_size=node_size)
        columns = kernel(columns, *filters, skip=None if skip is None else skip[mine], backend=backend)
        y = transpose(columns, ctx=ctx, scatter=2, gather=1, channels=D, node_size=node_size)
    return y if post_gate is None else post_gate * y


def _documents(name: str, cu_seqlens: Tensor | None, ctx: SequenceContext) -> Sequence[int] | None:
    """The boundaries as numbers; ValueError if they are no integers that ascend from 0 to the last token."""
    if cu_seqlens is None:
        return None
    is_vector = cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 2 and not cu_seqlens.is_floating_point()
    check(name, is_vector, "cu_seqlens must be integers [M + 1], M >= 1", cu_seqlens.tolist())
    return check_bounds(name, cu_seqlens, ctx.total_tokens)


def _try(kernel: Callable[..., Any], u: Tensor, *arguments: Any, **options: Any) -> None:
    """The kernel's own checks, on no token: what does not fit raises before any message."""
    for name in ("pre_gate", "post_gate"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name][..., :0]
    if isinstance(options.get("cu_seqlens"), Tensor):
        options["cu_seqlens"] = torch.zeros_like(options["cu_seqlens"])
    with torch.no_grad():
        kernel(u[..., :0], *arguments, **options)


def _algorithm(
    u: Tensor, k: Filter, spectrum: SparseSpectrum | None, plain: bool, ctx: SequenceContext
) -> conv_cost.LongConvAlgorithm:
    """What auto is. From what all ranks share."""
    if not isinstance(k, Tensor) or spectrum is not None:
        return "transpose"
    channels = u.shape[1] if plain and u.shape[0] > 0 else None
    size = (channels, max(1, u.shape[0]), u.element_size(), u.device.type)
    return conv_cost.long_conv_algorithm(ctx.bounds, k.shape[-1], *size)


def _groups(name: str, groups: int | None, u: Tensor, node_size: int | None, ctx: SequenceContext) -> int:
    B, D, _ = u.shape
    if groups is None:
        return 1 if node_size is not None else conv_cost.long_conv_groups(ctx.bounds, D, B, u.element_size())
    check(name, 1 <= groups <= max(1, D), "groups must be from 1 to D = {}", groups, D)
    check(name, groups == 1 or node_size is None, "a two-level transpose (node_size) has one group", groups)
    return groups


def _by_halo(
    u: Tensor,
    x: Tensor,
    k: Tensor,
    gates: dict[str, Tensor | None],
    initial_state: Tensor | None,
    documents: Sequence[int] | None,
    ctx: SequenceContext,
    settings: dict[str, Any],
) -> Tensor:
    def convolve(state: Tensor | None, bounds: Tensor | None) -> Tensor:
        return kernels.long_conv(u, k, **gates, initial_state=state, cu_seqlens=bounds, **settings)[0]  # type: ignore[arg-type]

    def convolve_head(first: Tensor, gate: Tensor | None, state: Tensor | None) -> Tensor:
        return kernels.long_conv(first, k, post_gate=gate, initial_state=state, **settings)[0]

    post_gate, keep = gates["post_gate"], k.shape[-1] - 1
    return convolve_after(convolve, convolve_head, x, post_gate, keep, initial_state, documents, ctx)


class _Filters:
    """The filters of some channels; of grouped filters only the groups that these channels use."""

    def __init__(self, k: Filter, channels: int, state: Tensor | None):
        self._k, self._channels, self._state, self.taps = k, channels, state, 1

    def __call__(self, channels: slice) -> Tensor:
        found = _filters_of(self._k, channels, self._channels) if isinstance(self._k, Tensor) else self._k(channels)
        if not isinstance(self._k, Tensor):
            check_filter("long_conv", "k(channels)", found, channels.stop - channels.start)
            rows = 0 if self._state is None else self._state.shape[0]
            shape = (rows, self._channels, found.shape[-1] - 1)
            check_shape("long_conv", "initial_state", self._state, "[B, D, L-1]", *shape)
        self.taps = found.shape[-1]
        return found


def _filters_of(k: Tensor, channels: slice, D: int) -> Tensor:
    if k.ndim == 3:
        return k[:, channels]
    if channels == slice(0, D):
        return k
    per_filter = D // k.shape[0] if k.shape[0] else 1
    return k[torch.arange(channels.start, channels.stop, device=k.device) // per_filter]


def _by_channels(
    x: Tensor,
    make: _Filters,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    shape: tuple[int | None, int],
    ctx: SequenceContext,
    settings: dict[str, Any],
) -> Tensor:
    """The convolution of the gated input x, each rank all tokens of its channels. shape: node_size and groups."""
    D, (node_size, groups) = x.shape[1], shape
    bounds = offsets(split_sizes(D, ctx.size))
    mine = slice(bounds[ctx.rank], bounds[ctx.rank + 1])
    filters = make(mine)
    if initial_state is not None:
        check_shape(
            "long_conv", "initial_state", initial_state, "[.., D, L-1]", *initial_state.shape[:2], make.taps - 1
        )
    before = None if initial_state is None else shared(initial_state, ctx)

    def work(columns: Tensor, channels: slice) -> Tensor:
        own = slice(channels.start - mine.start, channels.stop - mine.start)
        state = None if before is None else before[:, channels]
        options = {"skip": None if skip is None else skip[channels], "cu_seqlens": cu_seqlens, **settings}
        return kernels.long_conv(columns, filters[..., own, :], initial_state=state, **options)[0]

    if groups > 1:
        return transpose_through(x, work, ctx=ctx, groups=groups)
    columns = work(transpose(x, ctx=ctx, scatter=1, gather=2, node_size=node_size), mine)
    return transpose(columns, ctx=ctx, scatter=2, gather=1, channels=D, node_size=node_size)
