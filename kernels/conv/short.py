"""Short depthwise convolution in plain torch, as two operators: one multiply-add per tap, blocked over channels.

    short_conv(x, w, bias, past)              y[t] = bias + sum_s w[s] x[t - s], x at negative times being `past`
    short_conv_backward(dy, x, w, past, ...)  the gradients of x, w, bias and past

Closed under differentiation, like the operators of `ops.py`: with cotangents (hx, hw, hb, hp) of the four gradients,

    d dy = short_conv(hx, w, hb, hp) + short_conv(x, hw, past)      (dx, dw, dpast) = short_conv_backward(dy, hx, hw, hp)
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Elements of x worked on at once: half a megabyte in float32, which stays in the second-level cache of a core."""

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _blocks(x: Tensor) -> list[slice]:
    if x.device.type != "cpu":
        return [slice(0, x.shape[1])]
    width = max(1, BLOCK_ELEMENTS // max(1, x.shape[0] * x.shape[2]))
    return [slice(start, min(start + width, x.shape[1])) for start in range(0, x.shape[1], width)]


def _reach(s: int, past: Tensor, length: int) -> tuple[slice, slice]:
    """Where tap s reads the past: columns of `past`, and the columns of y that they reach."""
    count = min(s, length)
    first = past.shape[-1] - s
    return slice(first, first + count), slice(0, count)


@torch.library.custom_op("seqengine::short_conv", mutates_args=())
def short_conv(x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """x [B, D, T]; w [D, W], the tap at lag s in column s; bias [D]; past [B, D, W-1]. Returns [B, D, T] in x.dtype."""
    W, T = w.shape[1], x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = w.to(x.dtype)
    for block in _blocks(x):
        out, source = y[:, block], x[:, block]
        torch.mul(source, taps[block, :1], out=out)
        for s in range(1, W):
            tap = taps[block, s, None]
            out[..., s:].addcmul_(source[..., : max(0, T - s)], tap)
            if past is not None:
                read, reached = _reach(s, past, T)
                out[..., reached].addcmul_(past[:, block, read], tap)
        if bias is not None:
            out.add_(bias[block, None].to(x.dtype))
    return y


@torch.library.custom_op("seqengine::short_conv_backward", mutates_args=())
def short_conv_backward(dy: Tensor, x: Tensor, w: Tensor, past: Tensor | None, needed: list[bool]) -> Four:
    """Gradients of (x, w, bias, past), in the dtypes of x, w, w and past; one that is not needed is empty, of shape [0].

    The sums of dw and dbias are in float32, or float64 for float64.
    """
    need_x, need_w, need_bias, need_past = needed
    W, T = w.shape[1], x.shape[-1]
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    dw = torch.zeros(w.shape if need_w else (0,), dtype=sums, device=w.device)
    dbias = torch.empty(w.shape[0] if need_bias else 0, dtype=sums, device=w.device)
    dpast = torch.zeros(past.shape if need_past and past is not None else (0,), dtype=x.dtype, device=x.device)
    taps = w.to(x.dtype)
    for block in _blocks(x):
        grad, source = dy[:, block], x[:, block]
        if need_x:
            out = dx[:, block]
            torch.mul(grad, taps[block, :1], out=out)
            for s in range(1, W):
                out[..., : max(0, T - s)].addcmul_(grad[..., s:], taps[block, s, None])
        if need_bias:
            dbias[block] = grad.sum(dim=(0, 2), dtype=sums)
        for s in range(W if need_w else 0):
            dw[block, s] = _dot(grad[..., s:], source[..., : max(0, T - s)], sums)
        for s in range(1, W if past is not None else 0):
            assert past is not None
            read, reached = _reach(s, past, T)
            if need_w:
                dw[block, s] += _dot(grad[..., reached], past[:, block, read], sums)
            if need_past:
                dpast[:, block, read].addcmul_(grad[..., reached], taps[block, s, None])
    return dx, dw.to(w.dtype), dbias.to(w.dtype), dpast


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over batch and time of a * b, [D]."""
    products: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return products.sum(dim=0)


@short_conv.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@short_conv_backward.register_fake
def _(dy: Tensor, x: Tensor, w: Tensor, past: Tensor | None, needed: list[bool]) -> Four:
    need_x, need_w, need_bias, need_past = needed
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(w.shape if need_w else (0,), dtype=w.dtype, device=w.device),
        torch.empty(w.shape[0] if need_bias else 0, dtype=w.dtype, device=w.device),
        torch.empty(past.shape if need_past and past is not None else (0,), dtype=x.dtype, device=x.device),
    )


def _save_forward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, w, bias, past = inputs
    ctx.save_for_backward(x, w, past)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_forward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, past = ctx.saved_tensors
    needed = list(ctx.needs_input_grad)
    dx, dw, dbias, dpast = short_conv_backward(dy, x, w, past, needed)
    found = (dx, dw, dbias if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), dpast)
    return tuple(gradient if need else None for gradient, need in zip(found, needed, strict=True))


def _save_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, list[bool]], output: Four) -> None:
    dy, x, w, past, needed = inputs
    ctx.save_for_backward(dy, x, w, past)
    ctx.needed = needed


def _differentiate_backward(ctx: Any, hx: Tensor, hw: Tensor, hb: Tensor, hp: Tensor) -> tuple[Tensor | None, ...]:
    """The cotangents are shaped like the gradients; those of gradients that were not needed are empty, and count as zero."""
    dy, x, w, past = ctx.saved_tensors
    had_x, had_w, had_bias, had_past = ctx.needed
    need_dy, need_x, need_w, need_past = ctx.needs_input_grad[:4]
    zeros = torch.zeros_like
    at_x = hx if had_x else zeros(x)
    at_past = None if past is None else (hp if had_past else zeros(past))
    d_dy: Tensor | None = None
    if need_dy:
        d_dy = short_conv(at_x.to(dy.dtype), w, hb if had_bias else None, at_past)
        if had_w:
            d_dy = d_dy + short_conv(x, hw, None, past).to(dy.dtype)
    at_w = hw if had_w else zeros(w)
    asked = [need_x, need_w, False, need_past and past is not None]
    dx, dw, _, dpast = short_conv_backward(dy, at_x, at_w, at_past, asked)
    return d_dy, dx if need_x else None, dw if need_w else None, dpast if asked[3] else None, None


short_conv.register_autograd(_differentiate_forward, setup_context=_save_forward)
short_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
