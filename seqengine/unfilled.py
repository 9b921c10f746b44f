"""Tensors without data: what runs on them shows what it would allocate and keep, and costs next to nothing.

Each holds a tensor of torch's meta device and says that it lies on the CPU, so code goes the ways it goes there. This is what
torch's FakeTensorMode is for; that one imports torch's compiler, as many of the meta kernels do that are written in Python,
and takes longer for that, and for its checks and caches, than for all that is traced here.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqengine.unfilled_results import RESULTS, Result

CPU, META = torch.device("cpu"), torch.device("meta")
_aten, _device = torch.ops.aten, torch.ops.prim.device.default
LOOKS = frozenset(
    {_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default, _aten.equal.default}
)
_LIKE = (_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.clone.default)
ELEMENTWISE = frozenset(
    {
        *(_aten.__and__.Tensor, _aten.__or__.Tensor, *_LIKE),
        *(_aten.log_sigmoid.default, _aten.log_sigmoid_backward.default, _aten.softplus_backward.default),
    }
)
"""Besides those that torch tags as pointwise: one result, of the shape that the tensors have together."""


class NeedsDataError(RuntimeError):
    """What was run looks at a value."""


class Unfilled(Tensor):
    """Of the meta device, taken for one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Unfilled":
        self: Unfilled = Tensor._make_subclass(cls, held, dispatch_device=True, device_for_backend_keys=CPU)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return CPU if func is _device else run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> list[Any]:
        raise NeedsDataError("tolist looks at values, and a tensor without data has none.")


class Unfilling(TorchDispatchMode):
    """In a `with` block all tensors that are made are without data, but those made of numbers that are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports the compiler, to tell it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CPU if func is _device else run(func, args, kwargs or {})


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation of torch, or one of ours: its results without data, or what it gives where all it takes has data.

    Raises NeedsDataError if the operation looks at a value that is not there.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if tensors and not any(isinstance(x, Unfilled) for x in tensors):
        return func(*args, **kwargs)
    if func in LOOKS:
        raise NeedsDataError(f"{func} looks at a value, and a tensor without data has none.")
    if func.namespace == "seqengine":
        with Unfilling():
            return OPDEFS[func.name()]._abstract_fn(*args, **kwargs)
    if func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:
        if "out" in kwargs:
            return kwargs["out"]
        if func._opname.endswith("_"):
            return args[0]
    if func in RESULTS:
        found = RESULTS[func](*args, **kwargs)
        return _made(found) if isinstance(found, Result) else tuple(None if x is None else _made(x) for x in found)
    if _is_elementwise(func) and "memory_format" not in kwargs:
        return _elementwise(func, args, kwargs)
    return _on_meta(func, args, kwargs)


@cache
def _is_elementwise(func: Any) -> bool:
    return func in ELEMENTWISE or (torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1)


def _elementwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """As torch's kernels in C++ find it, which on the meta device are hidden behind slower ones in Python."""
    tensors = [_held(x) for x in args if isinstance(x, Tensor)]
    shape = np.broadcast_shapes(*(tuple(x.shape) for x in tensors))
    signature = tuple((x.dtype, x.dim()) if isinstance(x, Tensor) else x for x in args)
    dtype = _dtype(func, signature, tuple(kwargs.items()))
    if all(x.shape == shape and x.is_contiguous() for x in tensors):
        return _made(Result(shape, dtype))
    strides = [x.expand(shape).stride() for x in tensors]
    return Unfilled(torch.empty_strided(shape, _dense_strides(shape, strides), dtype=dtype, device=META))


def _dense_strides(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """Of an elementwise result: dense, its axes in the inputs' order in memory (torch's TensorIterator, reorder_dimensions)."""
    axes = list(reversed(range(len(shape))))
    for end in range(1, len(axes)):
        at = end
        for i in reversed(range(end)):
            order = _order(axes[i], axes[at], shape, strides)
            if order < 0:
                break
            if order > 0:
                axes[i], axes[at], at = axes[at], axes[i], i
    found, size = [0] * len(shape), 1
    for axis in axes:
        found[axis], size = size, size * shape[axis]
    return found


def _order(a: int, b: int, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """Below 0: axis a lies inside of b; above: b of a; 0: no input tells."""
    for stride in strides:
        if stride[a] and stride[b] and stride[a] != stride[b]:
            return stride[a] - stride[b]
        if stride[a] and stride[b] and shape[a] > shape[b]:
            return 1
    return 0


@cache
def _dtype(func: Any, signature: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> torch.dtype:
    """Of what torch gives for tensors of no elements. signature: a tensor's dtype and rank, or another argument."""
    args = [torch.ones((0,) * x[1], dtype=x[0]) if isinstance(x, tuple) else x for x in signature]
    found: torch.dtype = func(*args, **dict(kwargs)).dtype
    return found


def _on_meta(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """By torch's own meta kernel."""
    given: dict[int, Tensor] = {}
    kwargs = {k: _opened(x, given) for k, x in kwargs.items() if k != "pin_memory"}
    if _takes_device(func):
        kwargs["device"] = META
    return _closed(func(*(_opened(x, given) for x in args), **kwargs), given)


def _opened(x: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        held = _held(x)
        given[id(held)] = x
        return held
    return [_opened(y, given) for y in x] if isinstance(x, (list, tuple)) else x


def _closed(x: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return given[id(x)] if id(x) in given else Unfilled(x)
    return [_closed(y, given) for y in x] if isinstance(x, (list, tuple)) else x


def _made(result: Result) -> Tensor:
    return Unfilled(torch.empty(result.shape, dtype=result.dtype, device=META))


@cache
def _takes_device(func: Any) -> bool:
    return any(x.name == "device" for x in func._schema.arguments)


def _held(x: Tensor) -> Tensor:
    if not isinstance(x, Unfilled):
        return x.to(META)
    if x.held.shape != x.shape or x.held.dtype != x.dtype:
        raise RuntimeError(f"A tensor without data became {x.dtype} {list(x.shape)} in place, which is not followed.")
    return x.held
