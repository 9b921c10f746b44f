"""The two operators under rnn, registered with torch: they trace, compile and differentiate.

    rnn_forward(gates, recurrent, state)    h, the state after the last token, the states before each chunk
    rnn_backward(dh, d_final, ...)          the gradients of gates, recurrent and state

The forward saves its inputs, h and one state for each chunk. The derivative of the backward differentiates the definition
twice, token by token: slow and large, but right, to any order.
"""

from typing import Any, cast

import torch
from torch import Tensor

from seqengine.kernels.rnn import loop, reference


@torch.library.custom_op("seqengine::rnn_forward", mutates_args=())
def rnn_forward(
    gates: Tensor, recurrent: Tensor, state: Tensor, cell: str, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gates [B, T, G, H, K], recurrent [G, H, K, K], state [S, B, H, K]; h [B, T, H, K] is in the dtype of the state."""
    if gates.numel() == 0:
        h, _, starts = _forward_like(gates, state)
        return h, state.clone(), starts
    with torch.autocast(gates.device.type, enabled=False):
        if triton:
            from seqengine.kernels.rnn import triton_rnn

            return triton_rnn.forward(gates, recurrent, state, cast(reference.Cell, cell))
        return loop.forward(gates, recurrent, state, cast(reference.Cell, cell))


@torch.library.custom_op("seqengine::rnn_backward", mutates_args=())
def rnn_backward(
    dh: Tensor,
    d_final: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    starts: Tensor,
    cell: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent and state; h and starts are what the forward returned."""
    if gates.numel() == 0:
        return torch.zeros_like(gates), torch.zeros_like(recurrent), d_final.clone()
    with torch.autocast(gates.device.type, enabled=False):
        if triton:
            from seqengine.kernels.rnn import triton_rnn

            return triton_rnn.backward(dh, d_final, gates, recurrent, h, starts, cast(reference.Cell, cell))
        return loop.backward(dh, d_final, gates, recurrent, h, starts, cast(reference.Cell, cell))


def _forward_like(gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, H, K = gates.shape
    S = state.shape[0]
    return (
        state.new_empty(B, T, H, K),
        state.new_empty(S, B, H, K),
        state.new_empty(loop.num_chunks(T), S, H, B, K),
    )


@rnn_forward.register_fake
def _(gates: Tensor, recurrent: Tensor, state: Tensor, cell: str, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_like(gates, state)


@rnn_backward.register_fake
def _(
    dh: Tensor,
    d_final: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    starts: Tensor,
    cell: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return gates.new_empty(gates.shape), recurrent.new_empty(recurrent.shape), state.new_empty(state.shape)


def _save_for_forward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str, bool], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    gates, recurrent, state, *ctx.how = inputs
    ctx.save_for_backward(gates, recurrent, state, output[0], output[2])


def _differentiate_forward(ctx: Any, dh: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *rnn_backward(dh, d_final, *ctx.saved_tensors, *ctx.how), None, None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.cell = inputs[7]


def _differentiate_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Through the definition: h and starts are functions of the other arguments, so that nothing is left for them."""
    dtype = ctx.saved_tensors[4].dtype
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that differentiation stops here; what asks for no gradient gets one that is thrown away
        given = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        dh, d_final, *inputs = given
        gates, recurrent, state = (x.to(dtype) for x in inputs)
        h, final = reference.rnn(gates, recurrent, tuple(state.unbind(0)), ctx.cell)
        outputs, upstream = (h, torch.stack(final)), (dh, d_final)
        first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first, given, cotangents, create_graph=create_graph, materialize_grads=True)
    return *second, None, None, None, None


rnn_forward.register_autograd(_differentiate_forward, setup_context=_save_for_forward)
rnn_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
