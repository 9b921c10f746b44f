"""Derivatives of backward operators by torch: the gradients are written out by differentiable operations, and differentiated.

The operands are views of the saved tensors: differentiation stops at them, and two arguments that are one tensor keep their own
gradients; with the history of the saved tensors, so that a third derivative follows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_of(
    values: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], create_graph: bool
) -> Sequence[Tensor | None]:
    """torch.autograd.grad of (output, cotangent) pairs; None for an input that no output depends on."""
    if not values or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*values, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)


def fresh(x: Tensor) -> Tensor:
    """The same values, to differentiate by, still connected to where they came from."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def differentiate(
    written_out: Callable[..., Sequence[Tensor | None]],
    saved: Sequence[Tensor | None],
    asked: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of those of the saved tensors that are asked for, from the cotangents of written_out(*saved).

    A cotangent or a value of None counts as zero.
    """
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) if ask else t.detach() for t, ask in zip(saved, asked, strict=True)]
        found = zip(written_out(*own), cotangents, strict=True)
        pairs = [(v, h.to(v.dtype)) for v, h in found if v is not None and h is not None and v.requires_grad]
        wanted = [t for t, ask in zip(own, asked, strict=True) if ask and t is not None]
        gradients = iter(gradients_of(pairs, wanted, further))
    return [next(gradients) if ask and t is not None else None for t, ask in zip(own, asked, strict=True)]
