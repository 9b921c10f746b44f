"""Model states of several samples: put together, taken apart, counted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.mixers.mixer import Shared


def is_record(part: Any) -> bool:
    """A NamedTuple."""
    return isinstance(part, tuple) and hasattr(part, "_fields")


def zip_states(function: Callable[[list[Tensor]], Tensor], states: Sequence[Any]) -> Any:
    """One state from several of the same form: `function` of the tensors at each place; what is Shared is the first's."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(list(states))
    if isinstance(first, Shared):
        return first
    if not isinstance(first, tuple):
        raise TypeError(f"a state must be made of tuples of tensors; got {type(first).__name__}.")
    parts = [zip_states(function, part) for part in zip(*states, strict=True)]
    return type(first)(*parts) if is_record(first) else tuple(parts)


def stack_states(states: Sequence[Any]) -> Any:
    """The state of all samples of several states. Caches of different length (dim 1) are filled up with zeros."""
    return zip_states(_stack, states)


def select_rows(state: Any, rows: Tensor) -> Any:
    """The state of some samples; rows: their numbers, or a bool for each."""
    return zip_states(lambda tensors: tensors[0][rows], [state])


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim > 1:
        longest = max(t.shape[1] for t in tensors)
        tail = [0, 0] * (tensors[0].ndim - 2)
        tensors = [F.pad(t, [*tail, 0, longest - t.shape[1]]) for t in tensors]
    return torch.cat(tensors)


class Size(NamedTuple):
    """Bytes of a state: of each sample alone, and of what they share."""

    own: int
    shared: int


def size_of(state: Any) -> Size:
    if isinstance(state, Tensor):
        return Size(state.nbytes, 0)
    if isinstance(state, Shared):
        return Size(0, sum(t.nbytes for t in state.tensors))
    sizes = [size_of(part) for part in state]
    return Size(sum(s.own for s in sizes), sum(s.shared for s in sizes))
