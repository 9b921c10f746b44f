"""The two operators under delta_rule, registered with torch: they trace, compile and differentiate.

    delta_rule(q, k, v, beta, g, scale, initial, bounds)    (o, final states, state before each segment)
    delta_rule_backward(do, d_final, q, ..)                 gradients of q, k, v, beta, g and of the initial states

Without q there are no outputs, only states. The backward of delta_rule is delta_rule_backward, computed by hand. The derivative
of delta_rule_backward is taken by torch, of `composed.delta_rule`; so is any higher one.
"""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.delta_rule import chunked, composed
from seqengine.kernels.delta_rule.chunked import Arguments, dtype_of, starts_shape, states_shape
from seqengine.kernels.derivatives import fresh

NAME = "delta_rule"
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("seqengine::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V] ([0] without q), final states, and the state before each segment, for the backward. T >= 1."""
    return chunked.forward(Arguments(q, k, v, beta, g, scale, initial, bounds), NAME)


@torch.library.custom_op("seqengine::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    do: Tensor | None,
    d_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    starts: Tensor,
) -> Six:
    """Gradients of q, k, v, beta, g ([0] for what there is not) and the initial states."""
    return chunked.backward(do, d_final, Arguments(q, k, v, beta, g, scale, initial, bounds), starts, NAME)


@delta_rule.register_fake
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    a = Arguments(q, k, v, beta, g, scale, initial, bounds)
    return (
        v.new_empty(0) if q is None else torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(states_shape(a), dtype=dtype_of(a), device=v.device),
        torch.empty(starts_shape(a), dtype=dtype_of(a), device=v.device),
    )


@delta_rule_backward.register_fake
def _(
    do: Tensor | None,
    d_final: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    starts: Tensor,
) -> Six:
    a = Arguments(q, k, v, beta, g, scale, initial, bounds)
    return *chunked.empty_gradients(a), torch.empty(states_shape(a), dtype=dtype_of(a), device=k.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, g, scale, initial, bounds = inputs
    ctx.save_for_backward(q, k, v, beta, g, initial, bounds, output[2])
    ctx.scale = scale
    ctx.final = (output[1].shape, output[1].dtype)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, g, initial, bounds, starts = ctx.saved_tensors
    if d_final is None:
        d_final = torch.zeros(ctx.final[0], dtype=ctx.final[1], device=k.device)
    if q is None:
        do = None
    found = delta_rule_backward(do, d_final, q, k, v, beta, g, ctx.scale, initial, bounds, starts)
    dq, dk, dv, d_beta, dg, d_initial = found
    return (
        None if q is None else dq,
        dk,
        dv,
        d_beta,
        None if g is None else dg,
        None,
        None if initial is None else d_initial.to(initial.dtype),
        None,
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    do, d_final, q, k, v, beta, g, scale, initial, bounds, _ = inputs
    ctx.save_for_backward(do, d_final, q, k, v, beta, g, initial, bounds)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _fix_sizes(*tensors: Tensor | None) -> list[int]:
    """A traced second derivative is for the sizes at hand: with symbolic ones tracing takes several times as long."""
    return [int(n) for t in tensors if t is not None for n in t.shape]


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of delta_rule_backward, by writing it as the gradient of composed.delta_rule. `starts` follows from the others."""
    if all(c is None for c in cotangents):
        return (None,) * 11
    *given, bounds = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    _fix_sizes(*given)
    with torch.enable_grad(), torch.autocast(given[1].device.type, enabled=False):
        do, d_final, q, k, v, beta, g, initial = leaves = [None if x is None else fresh(x) for x in given]
        assert k is not None
        assert v is not None
        assert beta is not None
        o, final = composed.delta_rule(Arguments(q, k, v, beta, g, ctx.scale, initial, bounds))
        reached = [(y, dy) for y, dy in ((o, do), (final, d_final)) if y is not None and dy is not None]
        of = zip((q, k, v, beta, g, initial), cotangents, strict=True)
        asked = [(x, c) for x, c in of if x is not None and c is not None]
        first = torch.autograd.grad(
            [y for y, _ in reached],
            [x for x, _ in asked],
            [dy for _, dy in reached],
            create_graph=True,
            materialize_grads=True,
        )
        pairs = [(y, c.to(y.dtype)) for y, (_, c) in zip(first, asked, strict=True) if y.requires_grad]
        if not pairs:
            return (None,) * 11
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [x for x in leaves if x is not None],
            [c for _, c in pairs],
            create_graph=keep_graph,
            allow_unused=True,
        )
    by_leaf = iter(found)
    d_do, d_d_final, dq, dk, dv, d_beta, dg, d_initial = (None if x is None else next(by_leaf) for x in leaves)
    return d_do, d_d_final, dq, dk, dv, d_beta, dg, None, d_initial, None, None


delta_rule.register_autograd(_differentiate, setup_context=_save)
delta_rule_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
