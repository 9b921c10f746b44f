"""Short depthwise convolution in plain torch: one multiply-add per tap, blocked over channels, hand-written backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 17
"""Elements of x worked on at once: half a megabyte in float32, which stays in the second-level cache of a core."""


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


class ShortConv(torch.autograd.Function):
    """y[b, d, t] = bias[d] + sum_s w[d, s] x[b, d, t - s], where x at negative times is `past`, or zero without one.

    x [B, D, T]; w [D, W]; bias [D] or None; past [B, D, W-1] or None. Returns y [B, D, T] in x.dtype. Saves x, w and past.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
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
        ctx.save_for_backward(x, w, past)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        x, w, past = ctx.saved_tensors
        W, T = w.shape[1], x.shape[-1]
        need_x, need_w, need_bias, need_past = ctx.needs_input_grad
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        dw = torch.zeros(w.shape, dtype=sums, device=w.device) if need_w else None
        dbias = torch.empty(w.shape[0], dtype=sums, device=w.device) if need_bias else None
        dpast = torch.zeros_like(past) if need_past else None
        taps = w.to(x.dtype)
        for block in _blocks(x):
            grad, source = dy[:, block], x[:, block]
            if dx is not None:
                out = dx[:, block]
                torch.mul(grad, taps[block, :1], out=out)
                for s in range(1, W):
                    out[..., : max(0, T - s)].addcmul_(grad[..., s:], taps[block, s, None])
            if dbias is not None:
                dbias[block] = grad.sum(dim=(0, 2), dtype=sums)
            for s in range(W):
                if dw is not None:
                    dw[block, s] = _dot(grad[..., s:], source[..., : max(0, T - s)], sums)
                if past is not None and s > 0:
                    read, reached = _reach(s, past, T)
                    if dw is not None:
                        dw[block, s] += _dot(grad[..., reached], past[:, block, read], sums)
                    if dpast is not None:
                        dpast[:, block, read].addcmul_(grad[..., reached], taps[block, s, None])
        return (
            dx,
            None if dw is None else dw.to(w.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            dpast,
        )


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over batch and time of a * b, [D]."""
    products: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return products.sum(dim=0)


def short_conv(x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """See `ShortConv`."""
    y: Tensor = ShortConv.apply(x, w, bias, past)  # type: ignore[no-untyped-call]
    return y
