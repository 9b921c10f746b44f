"""The two operators under gla and simple_gla, registered with torch: they trace, compile and differentiate.

    gla(q, k, v, g, scale, initial, bounds)    (o, final states, state before each segment)
    gla_backward(do, d_final, q, ..)           gradients of q, k, v, g and of the initial states

g is [B, T, H, K], [B, T, H], [H] or None. The backward of gla is gla_backward, computed by hand. The derivative of
gla_backward is taken by torch, of `composed.gla`; so is any higher one.

backend: "torch" (chunked.py), "triton" or "fla"; the last two keep no states and share the backward, which computes them again.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from seqengine.kernels.checks import check_bounds
from seqengine.kernels.derivatives import fresh
from seqengine.kernels.linear_attention import chunked, composed, fla


def _name(g: Tensor | None) -> str:
    return "gla" if g is not None and g.ndim == 4 else "simple_gla"


def _precision(q: Tensor) -> Literal["ieee", "tf32"]:
    """Of Triton's products: TF32 loses nothing that 16-bit inputs have."""
    return "tf32" if q.element_size() == 2 else "ieee"


@torch.library.custom_op("seqengine::gla", mutates_args=())
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V], final states, and the state before each segment, which only the backward reads. T >= 1."""
    if backend != "torch":
        if bounds is not None:
            check_bounds(_name(g), bounds, q.shape[1])
        o, final = _forward_on_gpu(q, k, v, g, scale, initial, bounds, backend)
        return o, final, final.new_empty(0)
    return chunked.forward(q, k, v, g, scale, initial, bounds, _name(g))


@torch.library.custom_op("seqengine::gla_backward", mutates_args=())
def gla_backward(
    do: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    starts: Tensor,
    bounds: Tensor | None,
    backend: str = "torch",
    of_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g ([0] if there is none or without of_gates) and the initial states."""
    if backend != "torch":
        dq, dk, dv, dg, d_initial = _backward_by_triton(do, d_final, q, k, v, g, scale, initial, bounds)
        return dq, dk, dv, dg if of_gates else q.new_empty(0), d_initial  # one kernel finds all of them at once
    return chunked.backward(do, d_final, q, k, v, g, scale, initial, starts, bounds, _name(g), of_gates=of_gates)


def _forward_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "fla":
        return fla.forward(q, k, v, g, scale, initial, bounds)
    with torch.cuda.device_of(q):
        if g is not None and g.ndim == 4:
            from seqengine.kernels.linear_attention.triton_gla import gla_forward

            return gla_forward(q, k, v, g, scale, initial, bounds, _precision(q))
        from seqengine.kernels.linear_attention.triton_simple_gla import simple_gla_forward

        return simple_gla_forward(q, k, v, g, scale, initial, bounds, _precision(q))


def _backward_by_triton(
    do: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg: Tensor | None
    with torch.cuda.device_of(q):
        if g is not None and g.ndim == 4:
            from seqengine.kernels.linear_attention.triton_gla_backward import gla_backward as by_triton

            dq, dk, dv, dg, d_initial = by_triton(do, d_final, q, k, v, g, scale, initial, bounds, _precision(q))
        else:
            from seqengine.kernels.linear_attention.triton_simple_gla import simple_gla_backward

            found = simple_gla_backward(do, d_final, q, k, v, g, scale, initial, bounds, _precision(q))
            dq, dk, dv, dg, d_initial = found
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, d_initial.to(d_final.dtype)


def _states_shape(q: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[int, int, int, int]:
    return (q.shape[0] if bounds is None else bounds.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3])


@gla.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = chunked.compute_dtype(q, k, v, g, initial)
    B, _, H, K = q.shape
    kept = (chunked.plan_of(q, v, bounds).segments, B, H, K, v.shape[-1]) if backend == "torch" else (0,)
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(_states_shape(q, v, bounds), dtype=dtype, device=v.device),
        torch.empty(kept, dtype=dtype, device=v.device),
    )


@gla_backward.register_fake
def _(
    do: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    starts: Tensor,
    bounds: Tensor | None,
    backend: str = "torch",
    of_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device) if g is not None and of_gates else q.new_empty(0)
    return dq, dk, dv, dg, torch.empty(_states_shape(q, v, bounds), dtype=starts.dtype, device=q.device)


def _save_for_gla(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, scale, initial, bounds, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, g, initial, output[2], bounds)
    ctx.scale = scale
    ctx.final = (output[1].shape, output[1].dtype)
    ctx.set_materialize_grads(False)


def _differentiate_gla(ctx: Any, do: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, initial, starts, bounds = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if d_final is None:
        d_final = torch.zeros(ctx.final[0], dtype=ctx.final[1], device=q.device)
    of_gates = ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_initial = gla_backward(
        do, d_final, q, k, v, g, ctx.scale, initial, starts, bounds, ctx.backend, of_gates
    )
    dg_or_none, d_state = dg if of_gates else None, None if initial is None else d_initial.to(initial.dtype)
    return dq, dk, dv, dg_or_none, None, d_state, None, None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    do, d_final, q, k, v, g, scale, initial, _, bounds, _, ctx.of_gates = inputs
    ctx.save_for_backward(do, d_final, q, k, v, g, initial, bounds)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of gla_backward, by writing it as the gradient of composed.gla. `starts` follows from the other arguments."""
    if not ctx.of_gates:
        cotangents = (*cotangents[:3], None, cotangents[4])
    if all(c is None for c in cotangents):
        return (None,) * 12
    *needed, g, initial, bounds = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(needed[0].device.type, enabled=False):
        do, d_final, q, k, v = (fresh(x) for x in needed)
        g, initial = (None if x is None else fresh(x) for x in (g, initial))
        outputs = composed.gla(q, k, v, g, ctx.scale, initial, bounds)
        asked = [
            (x, c) for x, c in zip((q, k, v, g, initial), cotangents, strict=True) if x is not None and c is not None
        ]
        first = torch.autograd.grad(
            outputs, [x for x, _ in asked], (do, d_final), create_graph=True, materialize_grads=True
        )
        leaves = [x for x in (do, d_final, q, k, v, g, initial) if x is not None]
        pairs = [(y, c.to(y.dtype)) for y, (_, c) in zip(first, asked, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], leaves, [c for _, c in pairs], create_graph=keep_graph, allow_unused=True
        )
    by_leaf = iter(found)
    d_do, d_d_final, dq, dk, dv, dg, d_initial = (
        None if x is None else next(by_leaf) for x in (do, d_final, q, k, v, g, initial)
    )
    return d_do, d_d_final, dq, dk, dv, dg, None, d_initial, None, None, None, None


gla.register_autograd(_differentiate_gla, setup_context=_save_for_gla)
gla_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
