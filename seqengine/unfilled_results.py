"""Shapes and dtypes of what operations of torch give, for those whose meta kernels in torch import its compiler, or sympy.

All results are contiguous. Arguments are named and ordered as in torch's schemas.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_aten = torch.ops.aten


class Result(NamedTuple):
    """A tensor to be made."""

    shape: Sequence[int]
    dtype: torch.dtype


def _sum(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Result:
    return Result(_reduced(x.shape, dim, keepdim), dtype or _summed(x))


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Result:
    return Result(x.shape, dtype or _summed(x))


def _summed(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64


def _tril(x: Tensor, diagonal: int = 0) -> Result:
    return Result(x.shape, x.dtype)


def _truth(x: Tensor) -> Result:
    return Result((), torch.bool)


def _vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Result:
    return Result(_reduced(x.shape, dim, keepdim), dtype or x.dtype.to_real())


def _vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Result:
    return Result(_reduced(np.broadcast_shapes(x.shape, y.shape), [dim], False), x.dtype)


def _reduced(shape: Sequence[int], dim: Sequence[int] | None, keepdim: bool) -> list[int]:
    gone = {i % len(shape) for i in (dim or range(len(shape)))}
    return [1 if i in gone else n for i, n in enumerate(shape) if keepdim or i not in gone]


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Result:
    return Result((a.shape[0], b.shape[1]), added.dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Result:
    shown = [x for x in tensors if x.shape != (0,)] or tensors[:1]
    shape = list(shown[0].shape)
    shape[dim] = sum(x.shape[dim] for x in shown)
    return Result(shape, reduce(torch.promote_types, (x.dtype for x in tensors)))


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Result:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return Result(shape, reduce(torch.promote_types, (x.dtype for x in tensors)))


def _glu(x: Tensor, dim: int = -1) -> Result:
    shape = list(x.shape)
    shape[dim] //= 2
    return Result(shape, x.dtype)


def _glu_backward(grad: Tensor, x: Tensor, dim: int) -> Result:
    return Result(x.shape, x.dtype)


def _log_sigmoid(x: Tensor) -> tuple[Result, Result]:
    return Result(x.shape, x.dtype), Result(x.shape, x.dtype)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, *_: Any) -> tuple[Result, ...]:
    ahead = x.dim() - len(shape)
    of_rows = Result((*x.shape[:ahead], *(1 for _ in shape)), x.dtype if weight is None else weight.dtype)
    return Result(x.shape, x.dtype), of_rows, of_rows


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Result | None, ...]:
    asked = zip((x, weight, bias), output_mask, strict=True)
    return tuple(Result(y.shape, y.dtype) if y is not None and is_asked else None for y, is_asked in asked)


def _arange(*bounds: float, dtype: torch.dtype | None = None, **_: Any) -> Result:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    is_whole = all(isinstance(x, int) for x in bounds)
    return Result((math.ceil((end - start) / step),), dtype or (torch.int64 if is_whole else torch.get_default_dtype()))


def _linspace(start: float, end: float, steps: int, *, dtype: torch.dtype | None = None, **_: Any) -> Result:
    return Result((steps,), dtype or torch.get_default_dtype())


def _randn(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Result:
    return Result(size, dtype or torch.get_default_dtype())


RESULTS: dict[Any, Callable[..., Result | tuple[Result | None, ...]]] = {
    _aten.sum.dim_IntList: _sum,
    _aten.mean.dim: _sum,
    _aten.cumsum.default: _cumsum,
    _aten.tril.default: _tril,
    _aten.all.default: _truth,
    _aten.any.default: _truth,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten.linalg_vecdot.default: _vecdot,
    _aten.addmm.default: _addmm,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.glu.default: _glu,
    _aten.glu_backward.default: _glu_backward,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.arange.default: _arange,
    _aten.arange.start: _arange,
    _aten.arange.start_step: _arange,
    _aten.linspace.default: _linspace,
    _aten.randn.default: _randn,
    _aten.rand.default: _randn,
}
