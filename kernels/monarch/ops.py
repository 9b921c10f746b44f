"""The two operators under the learned Monarch convolution, registered with torch: they trace, compile and differentiate.

    monarch_conv(*arguments)                         y
    monarch_conv_backward(dy, *arguments, needs)     a gradient for each of the arguments

Both save their inputs only; the backward computes the spectra again. The derivative of the backward is torch's own, of the
gradient of the composition of all channels at once, so that any order follows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.monarch import blocks
from seqengine.kernels.monarch.blocks import Arguments


@torch.library.custom_op("seqengine::monarch_conv", mutates_args=())
def monarch_conv(
    u: Tensor,
    k: Tensor,
    outer: Tensor,
    twiddle: Tensor,
    inner: Tensor,
    inverse_outer: Tensor,
    inverse_twiddle: Tensor,
    inverse_inner: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
) -> Tensor:
    """y [B, D, T] in u.dtype, of the fields of `Arguments`."""
    factors = (outer, twiddle, inner, inverse_outer, inverse_twiddle, inverse_inner)
    return blocks.convolve(Arguments(u, k, *factors, skip, pre_gate, post_gate))


@torch.library.custom_op("seqengine::monarch_conv_backward", mutates_args=())
def monarch_conv_backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    outer: Tensor,
    twiddle: Tensor,
    inner: Tensor,
    inverse_outer: Tensor,
    inverse_twiddle: Tensor,
    inverse_inner: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of all eleven arguments for dy [B, D, T]; what is not needed comes back empty, of shape [0]."""
    factors = (outer, twiddle, inner, inverse_outer, inverse_twiddle, inverse_inner)
    a = Arguments(u, k, *factors, skip, pre_gate, post_gate)
    return blocks.gradients(dy, a, dict(zip(Arguments._fields, needs, strict=True)))


@monarch_conv.register_fake
def _(u: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@monarch_conv_backward.register_fake
def _(dy: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, needs = arguments
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else dy.new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    ]


def _save_for_conv(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    found = monarch_conv_backward(dy, *ctx.saved_tensors, needs)
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, had = inputs
    ctx.save_for_backward(*tensors)
    ctx.had = had


def _differentiate_backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """By torch's autograd, of the gradient of the composition."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
        # views, so that what depends on the saved tensors elsewhere is not reached; with their history, for higher orders
        inputs = [
            None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in ctx.saved_tensors
        ]
        dy, a = inputs[0], Arguments._make(inputs[1:])
        asked = [
            (x, h) for x, had, h in zip(a, ctx.had, cotangents, strict=True) if had and x is not None and h is not None
        ]
        y = blocks.compose(a.to(a.dtype)).to(a.u.dtype)
        first = torch.autograd.grad(y, [x for x, _ in asked], dy, create_graph=True)
        targets = [x for x, need in zip(inputs, ctx.needs_input_grad) if need and x is not None]
        found = torch.autograd.grad(first, targets, [h for _, h in asked], create_graph=create_graph, allow_unused=True)
    remaining = iter(found)
    return tuple(next(remaining) if need else None for need in ctx.needs_input_grad)


monarch_conv.register_autograd(_differentiate_conv, setup_context=_save_for_conv)
monarch_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
