"""The operators under modal_filter and modal_conv, registered with torch: they trace, compile and differentiate.

    modal_filter(log_poles, residues, length)            the taps k [D, length]
    modal_filter_backward(dk, log_poles, residues)       the gradients of both
    modal_conv(u, ..., state)                            (y, final state, one state a segment for the backward)
    modal_conv_backward(dy, d_final, u, ..., needed)     the gradients of every argument that is needed

The derivative of a backward operator computes the forward again in operations that torch differentiates (`whole_taps`,
`whole_convolve`), takes its gradients and differentiates these: second derivatives and any order beyond. Saved are the
arguments, for modal_conv also the states at the segments' starts.

The arithmetic below calls conj_physical, never conj: inside an operator of a compiled graph torch does not dispatch on pending
conjugation, and a product with such a tensor leaves it out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.derivatives import gradients_of
from seqengine.kernels.modal import filter as taps_of
from seqengine.kernels.modal import scan

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("seqengine::modal_filter", mutates_args=())
def modal_filter(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """k[d, t] = Re sum_n residues[d, n] exp(log_poles[d, n] t), [D, length]: both real or both complex, length >= 1."""
    return taps_of.taps(log_poles, residues, length)


@torch.library.custom_op("seqengine::modal_filter_backward", mutates_args=())
def modal_filter_backward(dk: Tensor, log_poles: Tensor, residues: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of log_poles and residues for dk [D, length]."""
    return taps_of.gradients(dk, log_poles, residues)


@torch.library.custom_op("seqengine::modal_conv", mutates_args=())
def modal_conv(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, D, T], the state after the last token [B, D, N], the states before each segment [S, B, D, N]); u not empty.

    u, gates [B, D, T]; log_poles, residues [D, N], both real or both complex; state [B, D, N], complex if they are.
    """
    return scan.convolve((u, log_poles, residues, skip, pre_gate, post_gate, state))


@torch.library.custom_op("seqengine::modal_conv_backward", mutates_args=())
def modal_conv_backward(
    dy: Tensor,
    d_final: Tensor,
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
    starts: Tensor,
    needed: list[bool],
) -> Seven:
    """Gradients of u .. state, in their dtypes, from those of y and of the state after the last token.

    One that is not needed is empty, of shape [0]. `starts` are the third result of modal_conv.
    """
    arguments = (u, log_poles, residues, skip, pre_gate, post_gate, state)
    found = scan.gradients(dy, d_final, arguments, starts, needed)
    du, d_poles, d_residues, d_skip, d_pre, d_post, d_state = (u.new_empty(0) if g is None else g for g in found)
    return du, d_poles, d_residues, d_skip, d_pre, d_post, d_state


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


@modal_filter.register_fake
def _(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    dtype = taps_of.real_dtype(log_poles, residues)
    return torch.empty(log_poles.shape[0], length, dtype=dtype, device=log_poles.device)


@modal_filter_backward.register_fake
def _(dk: Tensor, log_poles: Tensor, residues: Tensor) -> tuple[Tensor, Tensor]:
    return _like(log_poles), _like(residues)


@modal_conv.register_fake
def _(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(u), _like(state), state.new_empty(scan.num_segments(u, log_poles), *state.shape)


@modal_conv_backward.register_fake
def _(
    dy: Tensor,
    d_final: Tensor,
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
    starts: Tensor,
    needed: list[bool],
) -> Seven:
    arguments = (u, log_poles, residues, skip, pre_gate, post_gate, state)
    found = (_like(t) if need and t is not None else None for t, need in zip(arguments, needed, strict=True))
    du, d_poles, d_residues, d_skip, d_pre, d_post, d_state = (u.new_empty(0) if g is None else g for g in found)
    return du, d_poles, d_residues, d_skip, d_pre, d_post, d_state


def _save_filter(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_filter(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
    need_poles, need_residues, _ = ctx.needs_input_grad
    d_poles, d_residues = modal_filter_backward(dk, *ctx.saved_tensors)
    return d_poles if need_poles else None, d_residues if need_residues else None, None


def _save_filter_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_filter_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    dk, log_poles, residues = ctx.saved_tensors

    def function(log_poles: Tensor, residues: Tensor) -> tuple[Tensor]:
        return (taps_of.whole_taps(log_poles, residues, dk.shape[-1]),)

    had = [True, True]
    return tuple(second_order(function, [log_poles, residues], [dk], had, cotangents, ctx.needs_input_grad))


def _save_conv(ctx: Any, inputs: scan.Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs, output[2])


def _differentiate_conv(ctx: Any, dy: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad)
    found = modal_conv_backward(dy, d_final, *ctx.saved_tensors, needed)
    return tuple(g if need else None for g, need in zip(found, needed, strict=True))


def _save_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.needed = inputs[-1]


def _differentiate_conv_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """`starts` is a function of the other arguments, and computed again with them: nothing flows to it."""
    dy, d_final, *arguments = ctx.saved_tensors
    had = [need and t is not None for t, need in zip(arguments, ctx.needed, strict=True)]
    found = second_order(
        scan.whole_convolve, arguments, [dy, d_final], had, cotangents, ctx.needs_input_grad[: 2 + len(arguments)]
    )
    return (*found, None, None)


def second_order(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    upstream: Sequence[Tensor],
    had: Sequence[bool],
    cotangents: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """What flows to (*upstream, *arguments) when `cotangents` flow to the gradients of the function's arguments.

    had: whose gradients were computed, that is, which cotangents count. wanted: for whom a result is asked. The results are
    differentiable again if gradients are recorded. Aliases keep two arguments apart that are one tensor.
    """
    again = torch.is_grad_enabled()
    _fix_sizes(*upstream, *arguments, *cotangents)
    with torch.enable_grad(), torch.autocast(upstream[0].device.type, enabled=False):
        given = [_alias(t) for t in upstream]
        inputs = [None if t is None else _alias(t) for t in arguments]
        chosen = [t for t, was in zip(inputs, had, strict=True) if was and t is not None]
        for t in chosen:
            if not t.requires_grad:
                t.requires_grad_()
        reached = [(y, g) for y, g in zip(function(*inputs), given, strict=True) if y.requires_grad]
        first = gradients_of(reached, chosen, create_graph=True)
        counted = [h for h, was in zip(cotangents, had, strict=True) if was]
        pairs = [(g, h) for g, h in zip(first, counted, strict=True) if g is not None and g.requires_grad]
        asked = [t if want else None for t, want in zip((*given, *inputs), wanted, strict=True)]
        found = iter(gradients_of(pairs, [t for t in asked if t is not None], create_graph=again))
    return [None if t is None else next(found) for t in asked]


def _fix_sizes(*tensors: Tensor | None) -> list[int]:
    """A traced second derivative is for the sizes at hand: with symbolic ones tracing takes several times as long."""
    return [int(n) for t in tensors if t is not None for n in t.shape]


def _alias(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach()


modal_filter.register_autograd(_differentiate_filter, setup_context=_save_filter)
modal_filter_backward.register_autograd(_differentiate_filter_backward, setup_context=_save_filter_backward)
modal_conv.register_autograd(_differentiate_conv, setup_context=_save_conv)
modal_conv_backward.register_autograd(_differentiate_conv_backward, setup_context=_save_conv_backward)
