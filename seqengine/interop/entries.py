"""What every published layout is made of: keys, each with a tensor of the model that it reads and writes."""

from collections.abc import Callable, Mapping

from torch import Tensor


class Entry:
    """One key of a layout: a tensor of the model, or rows of it, under a shape of its own."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...] | None = None, *, required: bool = True) -> None:
        self.tensor, self.required = tensor, required
        self.shape = shape or tuple(tensor.shape)

    def read(self) -> Tensor:
        return self.tensor.detach().reshape(self.shape).clone()

    def write(self, value: Tensor) -> None:
        self.tensor.copy_(value.reshape(self.tensor.shape))


class ShortFilter(Entry):
    """A Conv1d weight [D, 1, W] has the tap at the largest lag first; ours [D, W] has lag 0 first."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor, (tensor.shape[0], 1, tensor.shape[1]))

    def read(self) -> Tensor:
        return self.tensor.detach().flip(1).reshape(self.shape).clone()

    def write(self, value: Tensor) -> None:
        self.tensor.copy_(value[:, 0].flip(1))


def no_hint(key: str) -> str:
    return ""


def key_problems(
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Entry],
    *,
    prefix: str | None = None,
    source: str = "",
    hint: Callable[[str], str] = no_hint,
) -> list[str]:
    """A message for every key that is missing, unknown, or of the wrong shape.

    name: of the function that reads. prefix: of the layout, for unknown keys. source: what the shape follows from.
    hint: what to add for a key of the wrong shape.
    """
    problems = []
    for key, entry in expected.items():
        if key not in tensors:
            if entry.required:
                problems.append(f"{name}: {key} is missing; its shape must be {entry.shape}.")
        elif tuple(tensors[key].shape) != entry.shape:
            got = tuple(tensors[key].shape)
            problems.append(f"{name}: {key} must have shape {entry.shape}{source}; got {got}.{hint(key)}")
    of = "" if prefix is None else f" (prefix {prefix!r})"
    return problems + [f"{name}: {key} is not a key of this model{of}." for key in tensors if key not in expected]
