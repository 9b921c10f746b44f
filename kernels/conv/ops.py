"""The two operators under every long convolution, registered with torch: they trace, compile and differentiate.

    causal_conv(x, k, skip)                y = (k + skip at lag 0) (*) x
    causal_conv_backward(g, x, k, skip)    (A, W): A[s] = sum_t g[t] k[t - s] + skip g[s], W[j] = sum_t g[t] x[t - j]

They are closed under differentiation. The backward of causal_conv is causal_conv_backward, and the gradient of skip is
W[0]; the derivative of causal_conv_backward, given cotangents h of A and m of W, is

    dg = causal_conv(h, k, skip) + causal_conv(x, m, 0)        (dx, dk) = causal_conv_backward(g, h, m), dskip = dk[0]

so that any order follows from these two. Both save their inputs only; spectra are computed again.
"""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.conv import spectral


@torch.library.custom_op("seqengine::causal_conv", mutates_args=())
def causal_conv(x: Tensor, k: Tensor, skip: Tensor | None) -> Tensor:
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s] + skip[d] x[b, d, t]: x [B, D, T], k [D, L] or [B, D, L], skip [D]."""
    return spectral.convolve(x, k, skip)


@torch.library.custom_op("seqengine::causal_conv_backward", mutates_args=())
def causal_conv_backward(
    dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and k for dy [B, D, T]; what is not needed comes back empty, of shape [0]."""
    return spectral.gradients(dy, x, k, skip, need_x, need_k)


@causal_conv.register_fake
def _(x: Tensor, k: Tensor, skip: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@causal_conv_backward.register_fake
def _(dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, need_x: bool, need_k: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(k.shape if need_k else (0,), dtype=k.dtype, device=k.device),
    )


def _at_lag_0(dk: Tensor, skip: Tensor) -> Tensor:
    """The gradient of skip [D] from that of the filter."""
    first = dk[..., 0]
    return (first.sum(dim=0) if first.ndim == 2 else first.clone()).to(skip.dtype)


def _save_for_conv(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, k, skip = ctx.saved_tensors
    need_x, need_k, need_skip = ctx.needs_input_grad
    dx, dk = causal_conv_backward(dy, x, k, skip, need_x, need_k or need_skip)
    d_skip = _at_lag_0(dk, skip) if need_skip else None
    return dx if need_x else None, dk if need_k else None, d_skip


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool, bool], output: tuple[Tensor, Tensor]
) -> None:
    dy, x, k, skip, need_x, need_k = inputs
    ctx.save_for_backward(dy, x, k, skip)
    ctx.had = (need_x, need_k)


def _differentiate_backward(ctx: Any, h: Tensor, m: Tensor) -> tuple[Tensor | None, ...]:
    """h is the cotangent of dx, shaped like x; m that of dk, shaped like k. One that was not needed counts as zero."""
    dy, x, k, skip = ctx.saved_tensors
    had_x, had_k = ctx.had
    need_dy, need_x, need_k, need_skip = ctx.needs_input_grad[:4]
    d_dy: Tensor | None = None
    if need_dy and had_x:
        d_dy = causal_conv(h.to(dy.dtype), k, skip)
    if need_dy and had_k:
        through_filter = causal_conv(x, m, None).to(dy.dtype)
        d_dy = through_filter if d_dy is None else d_dy + through_filter
    ask_x, ask_k = need_x and had_k, (need_k or need_skip) and had_x
    dx: Tensor | None = None
    dk: Tensor | None = None
    if ask_x or ask_k:
        found = causal_conv_backward(dy, h if had_x else x, m if had_k else k, None, ask_x, ask_k)
        dx = found[0].to(x.dtype) if ask_x else None
        dk = found[1].to(k.dtype) if ask_k else None
    d_skip = _at_lag_0(dk, skip) if need_skip and dk is not None else None
    return d_dy, dx, dk if need_k else None, d_skip, None, None


causal_conv.register_autograd(_differentiate_conv, setup_context=_save_for_conv)
causal_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
