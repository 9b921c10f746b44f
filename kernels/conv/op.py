"""The public face of the convolutions: checks, choice of backend, states."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.kernels.conv import causal_conv1d, ops, reference, short
from seqengine.kernels.conv.packed import Documents
from seqengine.kernels.conv.plan import TRITON_FLOAT64_TAPS
from seqengine.kernels.conv.sparse import SparseSpectrum, sparse_conv, sparse_conv_reference
from seqengine.kernels.environment import runs_triton

DECODE_TOKENS = 4
"""So few tokens after a state are dot products of L terms each; more are a transform."""
Backend = Literal["auto", "torch", "triton", "reference"]
"""auto: torch on every device. torch: FFT for long filters, multiply-adds for short ones. triton: kernels for CUDA tensors.
reference: the definition."""
ShortBackend = Literal["auto", "torch", "triton", "causal-conv1d", "reference"]
"""Of short_conv also the package causal_conv1d: CUDA tensors, 2 to 4 taps, no state and no packing."""
Precision = Literal["auto", "fp16", "tf32", "bf16x3", "ieee"]
"""Operands of Triton's matrix products, sums in float32. auto: fp16 for 16-bit tensors, bf16x3 for float32, else ieee."""


def check_backend(name: str, backend: str, u: Tensor, precision: str = "auto", taps: int = 1) -> None:
    """Known names, and a backend that can work on u here."""
    known = ("auto", "torch", "triton", "reference")
    check(name, backend in known, "backend must be 'auto', 'torch', 'triton' or 'reference'", backend)
    precisions = ("auto", "fp16", "tf32", "bf16x3", "ieee")
    check(name, precision in precisions, "precision must be 'auto', 'fp16', 'tf32', 'bf16x3' or 'ieee'", precision)
    if backend == "triton":
        must = "backend 'triton' needs Triton and u on a CUDA device (or TRITON_INTERPRET=1 when Triton is imported)"
        check(name, runs_triton(u.device.type), must, u.device)
        has = u.dtype != torch.float64 or precision in ("auto", "ieee")
        check(name, has, "float64 has the precision 'ieee' only", precision)
        fits = u.dtype != torch.float64 or taps <= TRITON_FLOAT64_TAPS
        must = "backend 'triton' has float64 for at most {} taps; use backend='torch'"
        check(name, fits, must, taps, TRITON_FLOAT64_TAPS)
    else:
        exact = precision in ("auto", "ieee")
        check(name, exact, "backend '{}' computes in float32 or float64: precision 'ieee'", precision, backend)


def check_filter(name: str, what: str, k: Tensor, channels: int) -> None:
    """[D, L] or [G, L] with G dividing D, or [B, D, L]."""
    check(name, k.ndim in (2, 3) and k.shape[-1] >= 1, "{} must be [D, L], [G, L] or [B, D, L], L >= 1", k.shape, what)
    if k.ndim == 2:
        divides = k.shape[0] == channels or (k.shape[0] > 0 and channels % k.shape[0] == 0)
        check(name, divides, "a grouped filter {} [G, L] needs G dividing D={}", k.shape, what, channels)


def _check_conv(
    name: str, u: Tensor, k: Tensor, what: str, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None
) -> None:
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    check_filter(name, what, k, u.shape[1])
    if k.ndim == 3:
        check(name, k.shape[:2] == u.shape[:2], "{} [B, D, L] must have B, D = {}", k.shape, what, tuple(u.shape[:2]))
    check_shape(name, "pre_gate", pre_gate, "[B, D, T]", *u.shape)
    check_shape(name, "post_gate", post_gate, "[B, D, T]", *u.shape)
    check_shape(name, "skip", skip, "[D]", u.shape[1])
    check_floats(name, u=u, **{what: k}, skip=skip, pre_gate=pre_gate, post_gate=post_gate)


def long_conv(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    spectrum: SparseSpectrum | None = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated causal convolution y = post_gate * (k (*) x + skip * x), x = pre_gate * u, in O(T log T).

    Shapes:   u, pre_gate, post_gate [B, D, T]; k [D, L], [G, L] with G dividing D (neighbouring channels share a filter),
              or [B, D, L]; k[..., s] is the tap at lag s; skip [D]; state [B, D, L-1]. Returns (y [B, D, T], state or None).
              Any T >= 0, any L >= 1, L > T included.
    Dtypes:   u float64, float32, bfloat16 or float16; float32 arithmetic for the halves; y in u.dtype.
              Triton: operands of its products by `precision`; see the errors in kernels/README.md.
    Memory:   saves its arguments, 6 bytes per element of gated bfloat16; the backward computes products and spectra again,
              block of channels by block. Any order of derivative; torch.compile traces it whole.
    State:    the last L-1 values of x. Cutting T anywhere and handing the state on gives the uncut result. A few tokens
              after a state (decoding) cost O(L) each.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: u is one row [1, D, T] of N documents, none of which sees another; states
              are then [N, D, L-1]. Costs what the batch padded to the longest document costs.
    Sparse:   spectrum, a SparseSpectrum, keeps some bands of frequencies, and no work is done for the others. Then the filter
              also reaches ahead, by no more than spectrum.error(k): there is no state and no packing.
    Exact to: reference.long_conv within 1e-12 relative in float64; causal to the rounding of an FFT.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown or cannot run here.
    References: Poli et al. 2023, arXiv:2302.10866; overlap-save state: kernels of Fu et al. 2023, arXiv:2311.05908.
    """
    name = "long_conv"
    _check_conv(name, u, k, "k", skip, pre_gate, post_gate)
    check_backend(name, backend, u, precision, k.shape[-1])
    keep = k.shape[-1] - 1
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, u, name)
    rows = u.shape[0] if documents is None else documents.lengths.numel()
    check_shape(name, "initial_state", initial_state, "[B, D, L-1]", rows, u.shape[1], keep)
    check_floats(name, u=u, initial_state=initial_state)
    final: Tensor | None = None
    if spectrum is not None:
        alone = initial_state is None and not output_final_state and cu_seqlens is None
        must = "a spectrum has no states and no packed documents: leave out initial_state, output_final_state and cu_seqlens"
        check(name, alone, must, "one of them")
        check(name, backend != "triton", "a spectrum needs backend 'auto', 'torch' or 'reference'", backend)
        sparse = sparse_conv_reference if backend == "reference" else sparse_conv
        y = sparse(u if pre_gate is None else pre_gate * u, _each(k, u.shape[1]), skip, spectrum)
        return (y if post_gate is None else post_gate * y), None
    if documents is not None:
        check(name, k.ndim == 2, "with cu_seqlens all documents share the filter k [D, L] or [G, L]", k.shape)
        batch = documents.to_batch(u if pre_gate is None else pre_gate * u)
        y, _ = long_conv(batch, k, skip=skip, initial_state=initial_state, backend=backend, precision=precision)
        y = documents.from_batch(y)
        if output_final_state:
            final = documents.last(batch, initial_state, keep)
        return (y if post_gate is None else post_gate * y), final
    if backend == "reference":
        own = _each(k, u.shape[1])
        y, state = reference.long_conv(u, own, skip, pre_gate, post_gate, initial_state)
        return y, (state if output_final_state else None)
    if initial_state is not None and 0 < u.shape[-1] <= DECODE_TOKENS:
        y = _decode(u, k, skip, pre_gate, post_gate, initial_state)
    else:
        where = "triton" if backend == "triton" else "torch"
        y = ops.causal_conv(u, k, skip, pre_gate, post_gate, initial_state, where, precision)
    if output_final_state:
        final = _last_inputs(u, pre_gate, initial_state, keep)
    return y, final


def _each(k: Tensor, channels: int) -> Tensor:
    """Grouped filters [G, L] -> [D, L]; others as they are."""
    return k if k.ndim == 3 or k.shape[0] == channels else k.repeat_interleave(channels // k.shape[0], dim=0)


def _decode(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, past: Tensor
) -> Tensor:
    """A few tokens after the past, a dot product of L terms each."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    x = u if pre_gate is None else pre_gate * u
    reach = torch.cat([past.to(dtype), x.to(dtype)], dim=-1).unfold(-1, k.shape[-1], 1)  # [B, D, T, L], a view
    own = _each(k, u.shape[1])
    y = torch.einsum("bdtl,bdl->bdt" if k.ndim == 3 else "bdtl,dl->bdt", reach, own.to(dtype).flip(-1))
    y = y if skip is None else torch.addcmul(y, x.to(dtype), skip[:, None].to(dtype))
    return (y if post_gate is None else post_gate * y).to(u.dtype)


def _last_inputs(u: Tensor, pre_gate: Tensor | None, past: Tensor | None, keep: int) -> Tensor:
    """The last `keep` gated inputs; those of the past, or zeros, precede them."""
    first = max(0, u.shape[-1] - keep)
    x = u[..., first:] if pre_gate is None else pre_gate[..., first:] * u[..., first:]
    missing = keep - x.shape[-1]
    if missing == 0:
        return x.to(u.dtype).clone()
    before = F.pad(x, (missing, 0)) if past is None else torch.cat([past[..., keep - missing :].to(x.dtype), x], dim=-1)
    return before.to(u.dtype)


def long_conv_bidirectional(
    u: Tensor,
    k_forward: Tensor,
    k_backward: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Two-sided gated convolution: y[t] = post_gate * (sum_s k_forward[s] x[t - s] + sum_s k_backward[s] x[t + s] + skip x[t]).

    Shapes:   as in `long_conv`; k_forward and k_backward may differ in length. Lag 0 is in both filters: set
              k_backward[..., 0] = 0 to count it once.
    Exact to: long_conv(x, k_forward) + flip(long_conv(flip(x), k_backward)) within 1e-12 relative in float64.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown or cannot run here.
    """
    name = "long_conv_bidirectional"
    _check_conv(name, u, k_forward, "k_forward", skip, pre_gate, post_gate)
    _check_conv(name, u, k_backward, "k_backward", None, None, None)
    check_backend(name, backend, u, taps=max(k_forward.shape[-1], k_backward.shape[-1]))
    x = u if pre_gate is None else pre_gate * u
    y, _ = long_conv(x, k_forward, skip=skip, backend=backend)
    if backend == "reference":
        mirrored, _ = long_conv(x.flip(-1), k_backward, backend=backend)
        y = y + mirrored.flip(-1)
    else:
        where = "triton" if backend == "triton" else "torch"
        needed = [True, False, False, False, False, False]
        ahead, *_ = ops.causal_conv_backward(x, x, k_backward, None, None, None, None, needed, where, "auto")
        y = y + ahead
    return y if post_gate is None else post_gate * y


def short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: ShortBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Short depthwise causal convolution y[t] = act(bias + sum_s w[:, s] u[t - s]).

    Shapes:   u [B, D, T]; w [D, W], the tap at lag s in column s (a Conv1d weight has them in reverse); bias [D];
              state [B, D, W-1]. Returns (y [B, D, T], state or None). Any T >= 0 and W >= 1.
    Dtypes:   u float64, float32, bfloat16 or float16; sums of the weight gradient in float32 or float64; y in u.dtype.
    Memory:   saves u, w and the state.
    State:    the last W-1 values of u.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: u is one row [1, D, T] of N documents; states are then [N, D, W-1].
    Exact to: reference.short_conv within 1e-12 relative in float64.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the activation or backend is unknown.
    """
    name = "short_conv"
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    B, D, _ = u.shape
    check(name, w.ndim == 2 and w.shape[0] == D and w.shape[1] >= 1, "w must be [D, W] with D={}, W >= 1", w.shape, D)
    check_shape(name, "bias", bias, "[D]", D)
    check_floats(name, u=u, w=w, bias=bias, initial_state=initial_state)
    check(name, activation in (None, "silu"), "activation must be None or 'silu'", activation)
    if backend == "causal-conv1d":
        causal_conv1d.check_runs(u, w, initial_state is not None or cu_seqlens is not None)
    else:
        check_backend(name, backend, u)
    keep = w.shape[1] - 1
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, u, name)
    rows = B if documents is None else documents.lengths.numel()
    check_shape(name, "initial_state", initial_state, "[B, D, W-1]", rows, D, keep)
    where, silu = "torch" if backend in ("auto", "reference") else backend, activation == "silu"
    past = None if initial_state is None else initial_state.to(u.dtype)
    if documents is not None:
        return _packed_short_conv(u, w, bias, silu, past, output_final_state, documents, backend)
    if backend == "reference":
        y, state = reference.short_conv(u, w, bias, initial_state)
        return (F.silu(y) if silu else y), (state if output_final_state else None)
    y = short.short_conv(u, w, bias, past, silu, None, where)
    return y, (_last_inputs(u, None, past, keep) if output_final_state else None)


def _packed_short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None,
    silu: bool,
    past: Tensor | None,
    output_final_state: bool,
    documents: Documents,
    backend: ShortBackend,
) -> tuple[Tensor, Tensor | None]:
    """One pass over the row; with states a padded batch, whose rows each have a past."""
    keep = w.shape[1] - 1
    state: Tensor | None = None
    batch = documents.to_batch(u) if output_final_state or past is not None or backend == "reference" else None
    if batch is not None and output_final_state:
        state = documents.last(batch, past, keep)
    if batch is not None and (past is not None or backend == "reference"):
        activation: Literal["silu"] | None = "silu" if silu else None
        y, _ = short_conv(batch, w, bias, activation=activation, initial_state=past, backend=backend)
        return documents.from_batch(y), state
    positions = documents.position.to(torch.int32)
    return short.short_conv(u, w, bias, None, silu, positions, "triton" if backend == "triton" else "torch"), state
