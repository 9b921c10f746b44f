"""The public face of the convolutions: checks, choice of backend, states."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.kernels.conv import ops, reference, short
from seqengine.kernels.conv.packed import Documents

DECODE_TOKENS = 4
"""So few tokens after a state are dot products of L terms each; more are a transform."""
Backend = Literal["auto", "torch", "reference"]
"""auto: torch on every device. torch: FFT for long filters, multiply-adds for short ones. reference: the definition."""


def _check_backend(name: str, backend: str) -> None:
    check(name, backend in ("auto", "torch", "reference"), "backend must be 'auto', 'torch' or 'reference'", backend)


def _check_filter(name: str, what: str, k: Tensor, u: Tensor) -> None:
    check(name, k.ndim in (2, 3) and k.shape[-1] >= 1, "{} must be [D, L], [G, L] or [B, D, L], L >= 1", k.shape, what)
    if k.ndim == 3:
        check(name, k.shape[:2] == u.shape[:2], "{} [B, D, L] must have B, D = {}", k.shape, what, tuple(u.shape[:2]))


def expand_groups(k: Tensor, channels: int, name: str = "long_conv") -> Tensor:
    """[G, L] filters of `channels / G` neighbouring channels each -> [channels, L]; other shapes pass."""
    if k.ndim == 2 and k.shape[0] != channels:
        divides = k.shape[0] > 0 and channels % k.shape[0] == 0
        check(name, divides, "a grouped filter k [G, L] needs G dividing D={}", k.shape, channels)
        return k.repeat_interleave(channels // k.shape[0], dim=0)
    return k


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
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated causal convolution y = post_gate * (k (*) x + skip * x), x = pre_gate * u, in O(T log T).

    Shapes:   u, pre_gate, post_gate [B, D, T]; k [D, L], [G, L] with G dividing D (neighbouring channels share a filter),
              or [B, D, L]; k[..., s] is the tap at lag s; skip [D]; state [B, D, L-1]. Returns (y [B, D, T], state or None).
              Any T >= 0, any L >= 1, L > T included.
    Dtypes:   u float64, float32, bfloat16 or float16; float32 arithmetic for the halves; y in u.dtype.
    Memory:   saves x, k and the gates; the backward computes spectra again, block of channels by block. Any order of
              derivative; torch.compile traces it whole.
    State:    the last L-1 values of x. Cutting T anywhere and handing the state on gives the uncut result. A few tokens
              after a state (decoding) cost O(L) each.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: u is one row [1, D, T] of N documents, none of which sees another; states
              are then [N, D, L-1]. Costs what the batch padded to the longest document costs.
    Exact to: reference.long_conv within 1e-12 relative in float64; causal to the rounding of an FFT.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown.
    References: Poli et al. 2023, arXiv:2302.10866; overlap-save state: kernels of Fu et al. 2023, arXiv:2311.05908.
    """
    name = "long_conv"
    _check_backend(name, backend)
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    _check_filter(name, "k", k, u)
    B, D, T = u.shape
    check_shape(name, "pre_gate", pre_gate, "[B, D, T]", B, D, T)
    check_shape(name, "post_gate", post_gate, "[B, D, T]", B, D, T)
    check_shape(name, "skip", skip, "[D]", D)
    check_floats(name, u=u, k=k, skip=skip, pre_gate=pre_gate, post_gate=post_gate, initial_state=initial_state)
    k = expand_groups(k, D)
    keep = k.shape[-1] - 1
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, u, name)
    rows = B if documents is None else documents.lengths.numel()
    check_shape(name, "initial_state", initial_state, "[B, D, L-1]", rows, D, keep)
    if backend == "reference" and documents is None:
        y, state = reference.long_conv(u, k, skip, pre_gate, post_gate, initial_state)
        return y, (state if output_final_state else None)
    x = u if pre_gate is None else pre_gate * u
    if documents is None:
        y, final = _convolve(x, k, skip, initial_state, output_final_state)
    else:
        check(name, k.ndim == 2, "with cu_seqlens all documents share the filter k [D, L] or [G, L]", k.shape)
        batch = documents.to_batch(x)
        y, _ = long_conv(batch, k, skip=skip, initial_state=initial_state, backend=backend)
        y = documents.from_batch(y)
        final = documents.last(batch, initial_state, keep) if output_final_state else None
    return (y if post_gate is None else post_gate * y), final


def _convolve(
    x: Tensor, k: Tensor, skip: Tensor | None, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """k (*) x + skip x after the state, and the state after x."""
    keep = k.shape[-1] - 1
    if initial_state is None:
        return ops.causal_conv(x, k, skip), (_tail(x, keep) if output_final_state else None)
    stream = torch.cat([initial_state.to(x.dtype), x], dim=-1)
    if 0 < x.shape[-1] <= DECODE_TOKENS:
        dtype = torch.promote_types(torch.promote_types(x.dtype, k.dtype), torch.float32)
        reach = stream.to(dtype).unfold(-1, keep + 1, 1)  # [B, D, T, L], a view
        y = torch.einsum("bdtl,bdl->bdt" if k.ndim == 3 else "bdtl,dl->bdt", reach, k.to(dtype).flip(-1)).to(x.dtype)
        y = y if skip is None else torch.addcmul(y, x, skip[:, None].to(x.dtype))
    else:
        y = ops.causal_conv(stream, k, skip)[..., keep:]
    return y, (_tail(stream, keep) if output_final_state else None)


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
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown.
    """
    name = "long_conv_bidirectional"
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    _check_filter(name, "k_backward", k_backward, u)
    check_shape(name, "pre_gate", pre_gate, "[B, D, T]", *u.shape)
    check_shape(name, "post_gate", post_gate, "[B, D, T]", *u.shape)
    check_floats(name, u=u, k_backward=k_backward, pre_gate=pre_gate, post_gate=post_gate)
    x = u if pre_gate is None else pre_gate * u
    y, _ = long_conv(x, k_forward, skip=skip, backend=backend)
    if backend == "reference":
        mirrored, _ = long_conv(x.flip(-1), k_backward, backend=backend)
        y = y + mirrored.flip(-1)
    else:
        ahead, _ = ops.causal_conv_backward(x, x, expand_groups(k_backward, u.shape[1], name), None, True, False)
        y = y + ahead
    return y if post_gate is None else post_gate * y


def _tail(stream: Tensor, keep: int) -> Tensor:
    """The last `keep` columns, with zeros in front where there are fewer."""
    missing = max(0, keep - stream.shape[-1])
    return F.pad(stream, (missing, 0))[..., stream.shape[-1] + missing - keep :]


def short_conv(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
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
    _check_backend(name, backend)
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    B, D, _ = u.shape
    check(name, w.ndim == 2 and w.shape[0] == D and w.shape[1] >= 1, "w must be [D, W] with D={}, W >= 1", w.shape, D)
    check_shape(name, "bias", bias, "[D]", D)
    check_floats(name, u=u, w=w, bias=bias, initial_state=initial_state)
    check(name, activation in (None, "silu"), "activation must be None or 'silu'", activation)
    keep = w.shape[1] - 1
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, u, name)
    rows = B if documents is None else documents.lengths.numel()
    check_shape(name, "initial_state", initial_state, "[B, D, W-1]", rows, D, keep)
    state: Tensor | None
    if documents is not None:
        batch = documents.to_batch(u)
        y, _ = short_conv(batch, w, bias, initial_state=initial_state, backend=backend)
        y = documents.from_batch(y)
        state = documents.last(batch, initial_state, keep)
    elif backend == "reference":
        y, state = reference.short_conv(u, w, bias, initial_state)
    else:
        past = None if initial_state is None else initial_state.to(u.dtype)
        y = short.short_conv(u, w, bias, past)
        state = _tail(u if past is None else torch.cat([past, u], dim=-1), keep) if output_final_state else None
    if activation == "silu":
        y = F.silu(y)
    return y, (state if output_final_state else None)
