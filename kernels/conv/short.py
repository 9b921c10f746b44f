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


class ShortConv(torch.autograd.Function):
    """y[b, d, t] = bias[d] + sum_s w[d, s] x[b, d, t + W - 1 - s] for x [B, D, T + W - 1] whose first W-1 columns are the past.

    Returns y [B, D, T] in x.dtype. Saves x and w.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        W = w.shape[1]
        T = x.shape[-1] - W + 1
        y = torch.empty(*x.shape[:2], T, dtype=x.dtype, device=x.device)
        taps = w.to(x.dtype)
        for block in _blocks(x):
            out = y[:, block]
            torch.mul(x[:, block, W - 1 :], taps[block, :1], out=out)
            for s in range(1, W):
                out.addcmul_(x[:, block, W - 1 - s : W - 1 - s + T], taps[block, s, None])
            if bias is not None:
                out.add_(bias[block, None].to(x.dtype))
        ctx.save_for_backward(x, w)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        W, T = w.shape[1], dy.shape[-1]
        need_x, need_w, need_bias = ctx.needs_input_grad
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.empty_like(x) if need_x else None
        dw = torch.empty(w.shape, dtype=sums, device=w.device) if need_w else None
        dbias = torch.empty(w.shape[0], dtype=sums, device=w.device) if need_bias else None
        taps = w.to(x.dtype)
        for block in _blocks(x):
            grad = dy[:, block]
            if dx is not None:
                out = dx[:, block].zero_()
                for s in range(W):
                    out[..., W - 1 - s : W - 1 - s + T].addcmul_(grad, taps[block, s, None])
            if dw is not None:
                for s in range(W):
                    product = grad * x[:, block, W - 1 - s : W - 1 - s + T]
                    dw[block, s] = product.sum(dim=(0, 2), dtype=sums)
            if dbias is not None:
                dbias[block] = grad.sum(dim=(0, 2), dtype=sums)
        return (
            dx,
            None if dw is None else dw.to(w.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
        )


def short_conv(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """See `ShortConv`."""
    y: Tensor = ShortConv.apply(x, w, bias)  # type: ignore[no-untyped-call]
    return y
