"""The two operators under every long convolution, registered with torch: they trace, compile and differentiate.

    causal_conv(u, k, ...)               y = post * ((k + skip at lag 0) (*) x), x = pre * u after `past`
    causal_conv_backward(dy, u, k, ...)  the gradients of u, k, skip, the gates and past

Both save their inputs only; products and spectra are computed again. They are closed under differentiation. Without gates and
past the gradients are bilinear, (A, W, S) with A[s] = sum_t g[t] k[t - s] + skip g[s], W[j] = sum_t g[t] x[t - j] and
S = sum_t g[t] x[t], whose derivative, given cotangents h, m, n of the three, is

    dg = causal_conv(h, k, skip) + causal_conv(x, m, n)        (dx, dk, dskip) = causal_conv_backward(g, (x: h, k: m, skip: n))

With them, the gradients are written out as products of these two and differentiated by torch. So any order follows.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.conv import spectral
from seqengine.kernels.conv.spectral import Six, empty_gradients
from seqengine.kernels.derivatives import differentiate


@torch.library.custom_op("seqengine::causal_conv", mutates_args=())
def causal_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    past: Tensor | None = None,
    backend: str = "torch",
    precision: str = "auto",
) -> Tensor:
    """u, gates [B, D, T]; k [G, L] with G dividing D, or [B, D, L]; skip [D]; past [B, D, L-1]. Returns y like u."""
    if backend == "triton":
        from seqengine.kernels.conv import triton_dispatch

        return triton_dispatch.convolve(u, k, skip, pre_gate, post_gate, past, precision)
    return spectral.convolve(u, k, skip, pre_gate, post_gate, past)


@torch.library.custom_op("seqengine::causal_conv_backward", mutates_args=())
def causal_conv_backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    backend: str = "torch",
    precision: str = "auto",
) -> Six:
    """The gradients of (u, k, skip, pre_gate, post_gate, past) for dy; those not needed come back empty, of shape [0]."""
    arguments = (dy, u, k, skip, pre_gate, post_gate, past, needed)
    if backend == "triton":
        from seqengine.kernels.conv import triton_dispatch

        return triton_dispatch.gradients(*arguments, precision)
    return spectral.gradients(*arguments)


@causal_conv.register_fake
def _(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    past: Tensor | None = None,
    backend: str = "torch",
    precision: str = "auto",
) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@causal_conv_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    backend: str = "torch",
    precision: str = "auto",
) -> Six:
    return empty_gradients(u, k, skip, pre_gate, post_gate, past, needed)


def _save_for_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.how = inputs[6:]


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    flags = ctx.needs_input_grad  # without arguments that have their default value
    needed = [*flags[:6], *[False] * (6 - len(flags))]
    found = causal_conv_backward(dy, *ctx.saved_tensors, needed, *ctx.how)
    return (*(gradient if need else None for gradient, need in zip(found, needed, strict=True)), None, None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.had, ctx.how = inputs[7], inputs[8:]


def _differentiate_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    saved, asked = ctx.saved_tensors, ctx.needs_input_grad[:7]
    if all(t is None for t in saved[4:]):
        found = _second_plain(saved[:4], asked, ctx.had, cotangents, ctx.how)
    else:
        written_out = partial(_gradients_written_out, had=ctx.had, how=ctx.how)
        found = differentiate(written_out, saved, asked, cotangents)
    return (*found, None, None, None)


def _second_plain(
    saved: tuple[Tensor, ...],
    asked: tuple[bool, ...],
    had: list[bool],
    cotangents: tuple[Tensor, ...],
    how: tuple[str, str],
) -> list[Tensor | None]:
    """By the formula above. The cotangent of a gradient that was not needed counts as zero."""
    dy, u, k, skip = saved
    h = cotangents[0] if had[0] else None
    m = cotangents[1] if had[1] else (torch.zeros_like(k) if had[2] else None)
    n = cotangents[2] if had[2] else None
    d_dy: Tensor | None = None
    if asked[0] and h is not None:
        d_dy = causal_conv(h.to(dy.dtype), k, skip, None, None, None, *how)
    if asked[0] and m is not None:
        through_filter = causal_conv(u, m, n, None, None, None, *how).to(dy.dtype)
        d_dy = through_filter if d_dy is None else d_dy + through_filter
    needed = [asked[1] and m is not None, asked[2] and h is not None, asked[3] and h is not None, False, False, False]
    if not any(needed):
        return [d_dy, *[None] * 6]
    at_skip = n if n is not None or not needed[2] else torch.zeros_like(skip)
    found = causal_conv_backward(
        dy, u if h is None else h, k if m is None else m, at_skip, None, None, None, needed, *how
    )
    wanted = [t.to(like.dtype) if need else None for t, like, need in zip(found, (u, k, skip), needed, strict=False)]
    return [d_dy, *wanted, None, None, None]


def _gradients_written_out(
    dy: Any,
    u: Any,
    k: Any,
    skip: Any,
    pre_gate: Any,
    post_gate: Any,
    past: Any,
    *,
    had: list[bool],
    how: tuple[str, str],
) -> list[Tensor | None]:
    """What causal_conv_backward computed, by differentiable operations, in the dtype of the arithmetic."""
    dtype = spectral.accumulation_dtype(u, k, skip, pre_gate, post_gate, past)
    dy, u, pre_gate, post_gate, past = (None if t is None else t.to(dtype) for t in (dy, u, pre_gate, post_gate, past))
    keep = 0 if past is None else past.shape[-1]
    x = u if pre_gate is None else pre_gate * u
    stream = x if past is None else torch.cat([past, x], dim=-1)
    dz = dy if post_gate is None else post_gate * dy
    plain = (None, None, None)
    needed = [had[0] or had[3] or had[5], had[1], had[2], False, False, False]
    ahead = F.pad(dz, (keep, 0))
    dstream, dk, dskip, *_ = causal_conv_backward(ahead, stream, k, skip, *plain, needed, *how)
    dx = dstream[..., keep:]
    return [
        dx * (1 if pre_gate is None else pre_gate) if had[0] else None,
        dk if had[1] else None,
        dskip if had[2] else None,
        u * dx if had[3] else None,
        dy * causal_conv(stream, k, skip, *plain, *how)[..., keep:] if had[4] else None,
        dstream[..., :keep] if had[5] else None,
    ]


causal_conv.register_autograd(_differentiate_conv, setup_context=_save_for_conv)
causal_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
