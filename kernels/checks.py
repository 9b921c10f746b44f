"""Checks of arguments that can be traced: messages are put together only when they are raised."""

import itertools

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(name: str, ok: bool, must: str, got: object, *expected: object) -> None:
    """ValueError "name: must; got ..." unless ok. `must` is filled with `expected` only then: symbolic sizes are no text."""
    if not ok:
        shown = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{name}: {must.format(*expected)}; got {shown}.")


def check_shape(name: str, what: str, x: Tensor | None, letters: str, *shape: int) -> None:
    """x, if there is one, has exactly this shape."""
    if x is not None:
        check(name, x.shape == shape, "{} must be {} = {}", x.shape, what, letters, list(shape))


def check_floats(name: str, **tensors: Tensor | None) -> None:
    """All tensors are real floating-point numbers on the device of the first."""
    given = {what: x for what, x in tensors.items() if x is not None}
    first = next(iter(given.values()))
    for what, x in given.items():
        check(name, x.dtype in FLOATS, "{} must be float64, float32, bfloat16 or float16", x.dtype, what)
        check(
            name, x.device == first.device, "{} must be on {}, like the other arguments", x.device, what, first.device
        )


def check_bounds(name: str, cu_seqlens: Tensor, T: int) -> list[int]:
    """The boundaries of documents as numbers; ValueError unless they ascend from 0 to T."""
    ends: list[int] = cu_seqlens.tolist()
    ascend = all(a <= b for a, b in itertools.pairwise(ends))
    check(name, ascend and ends[0] == 0 and ends[-1] == T, "cu_seqlens must ascend from 0 to T={}", ends, T)
    return ends
