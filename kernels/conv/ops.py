"""The two operators under every long convolution, registered with torch: they trace, compile and differentiate.

    causal_conv(x, k)                   y = k (*) x
    causal_conv_backward(g, x, k)       (A, W) with A[s] = sum_t g[t] k[t - s] and W[j] = sum_t g[t] x[t - j]

They are closed under differentiation. The backward of causal_conv is causal_conv_backward; the derivative of the latter, given
cotangents h of A and m of W, is

    dg = h (*) k + x (*) m        (dx, dk) = causal_conv_backward(g, h, m)

so that any order follows from these two. Both save their inputs only; spectra are computed again.
"""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.conv import spectral


@torch.library.custom_op("seqengine::causal_conv", mutates_args=())
def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s], x zero before its start: x [B, D, T], k [D, L] or [B, D, L]."""
    return spectral.convolve(x, k)


@torch.library.custom_op("seqengine::causal_conv_backward", mutates_args=())
def causal_conv_backward(dy: Tensor, x: Tensor, k: Tensor, need_x: bool, need_k: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and k for dy [B, D, T]; what is not needed comes back empty, of shape [0]."""
    return spectral.gradients(dy, x, k, need_x, need_k)


@causal_conv.register_fake
def _(x: Tensor, k: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@causal_conv_backward.register_fake
def _(dy: Tensor, x: Tensor, k: Tensor, need_x: bool, need_k: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(k.shape if need_k else (0,), dtype=k.dtype, device=k.device),
    )


def _save_for_conv(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, k = ctx.saved_tensors
    need_x, need_k = ctx.needs_input_grad
    dx, dk = causal_conv_backward(dy, x, k, need_x, need_k)
    return (dx if need_x else None), (dk if need_k else None)


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: tuple[Tensor, Tensor]
) -> None:
    dy, x, k, need_x, need_k = inputs
    ctx.save_for_backward(dy, x, k)
    ctx.needed = (need_x, need_k)


def _differentiate_backward(
    ctx: Any, h: Tensor, m: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """h is the cotangent of dx, shaped like x; m that of dk, shaped like k."""
    dy, x, k = ctx.saved_tensors
    had_x, had_k = ctx.needed
    need_dy, need_x, need_k = ctx.needs_input_grad[:3]
    d_dy: Tensor | None = None
    if need_dy and had_x:
        d_dy = causal_conv(h.to(dy.dtype), k)
    if need_dy and had_k:
        through_filter = causal_conv(x, m).to(dy.dtype)
        d_dy = through_filter if d_dy is None else d_dy + through_filter
    ask_x, ask_k = need_x and had_k, need_k and had_x
    if not (ask_x or ask_k):
        return d_dy, None, None, None, None
    dx, dk = causal_conv_backward(dy, h if had_x else x, m if had_k else k, ask_x, ask_k)
    return d_dy, (dx.to(x.dtype) if ask_x else None), (dk.to(k.dtype) if ask_k else None), None, None


causal_conv.register_autograd(_differentiate_conv, setup_context=_save_for_conv)
causal_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
