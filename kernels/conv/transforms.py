"""Real Fourier transforms along the last axis: torch.fft, and on a CPU with MKL the same transforms by plans that are kept.

torch makes a plan in each call, with tables of sines for its size, which takes as long as two to five transforms of 2^15
points. MKL's functions (DFTI: Intel oneMKL developer reference, "Fourier Transform Functions") are part of torch's library;
where they are not found, and for tensors that are not plain ones of a CPU, torch.fft does it.
"""

import ctypes
import weakref
from functools import cache, lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_REAL, _NOT_IN_PLACE, _COMPLEX_COMPLEX = 33, 44, 39
_SINGLE, _DOUBLE = "DftiCreateDescriptor_s_1d", "DftiCreateDescriptor_d_1d"
_BACKWARD_SCALE, _NUMBER, _CONJUGATE_EVEN, _PLACEMENT, _INPUT_DISTANCE, _OUTPUT_DISTANCE = 5, 7, 10, 11, 14, 15
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
REAL = {values: key for key, values in COMPLEX.items()}
KEPT_PLANS = 32


class Transforms:
    """Transforms into memory that is used again: a result is good until the next one of its name.

    Memory that went back to the system is paid for page by page when it comes again, which costs as much as the transform.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def rfft(self, name: str, x: Tensor, n: int) -> Tensor:
        """torch.fft.rfft(x, n): x [..., L], cut or filled up with zeros to n, even -> [..., n / 2 + 1], contiguous."""
        if not _is_plain(x) or x.dtype not in COMPLEX or x.shape[-1] > n:
            return torch.fft.rfft(x, n=n)  # type: ignore[no-any-return]
        if x.shape[-1] < n or not x.is_contiguous():
            padded = self._memory(f"{name}, padded", (*x.shape[:-1], n), x)
            padded[..., : x.shape[-1]] = x
            padded[..., x.shape[-1] :] = 0
            x = padded
        out = self._memory(name, (*x.shape[:-1], n // 2 + 1), x, COMPLEX[x.dtype])
        _run(x, out, n, x.dtype, inverse=False)
        return out

    def irfft(self, name: str, spectrum: Tensor, n: int) -> Tensor:
        """torch.fft.irfft(spectrum, n): [..., n / 2 + 1], contiguous -> [..., n], n even, contiguous."""
        dtype = REAL.get(spectrum.dtype)
        if not _is_plain(spectrum) or dtype is None or not spectrum.is_contiguous():
            return torch.fft.irfft(spectrum, n=n)  # type: ignore[no-any-return]
        out = self._memory(name, (*spectrum.shape[:-1], n), spectrum, dtype)
        _run(spectrum, out, n, dtype, inverse=True)
        return out

    def _memory(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < prod(shape):
            kept = self._kept[name] = torch.empty(prod(shape), dtype=dtype or like.dtype, device=like.device)
        return kept[: prod(shape)].view(shape)


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0 and not x.is_conj() and _library() is not None


def _run(x: Tensor, out: Tensor, n: int, dtype: torch.dtype, *, inverse: bool) -> None:
    plan = _plan(n, prod(x.shape[:-1]), dtype, inverse, torch.get_num_threads())
    plan.run(x.data_ptr(), out.data_ptr())


class _Plan:
    """Of `count` transforms of n values, one after another in memory."""

    def __init__(self, library: ctypes.CDLL, n: int, count: int, dtype: torch.dtype, *, inverse: bool) -> None:
        self._handle = ctypes.c_void_p()
        create = getattr(library, _SINGLE if dtype == torch.float32 else _DOUBLE)
        _check(create(ctypes.byref(self._handle), _REAL, ctypes.c_long(n)))
        weakref.finalize(self, library.DftiFreeDescriptor, ctypes.byref(self._handle))
        distances = (n // 2 + 1, n) if inverse else (n, n // 2 + 1)
        settings: list[tuple[int, object]] = [
            *((_PLACEMENT, _NOT_IN_PLACE), (_CONJUGATE_EVEN, _COMPLEX_COMPLEX), (_NUMBER, ctypes.c_long(count))),
            *zip((_INPUT_DISTANCE, _OUTPUT_DISTANCE), map(ctypes.c_long, distances), strict=True),
            (_BACKWARD_SCALE, ctypes.c_double(1.0 / n)),
        ]
        for name, value in settings:
            _check(library.DftiSetValue(self._handle, name, value))
        _check(library.DftiCommitDescriptor(self._handle))
        self._compute = library.DftiComputeBackward if inverse else library.DftiComputeForward

    def run(self, source: int, target: int) -> None:
        _check(self._compute(self._handle, ctypes.c_void_p(source), ctypes.c_void_p(target)))


@lru_cache(maxsize=KEPT_PLANS)
def _plan(n: int, count: int, dtype: torch.dtype, inverse: bool, threads: int) -> _Plan:
    """threads: a plan is for as many as torch has."""
    library = _library()
    assert library is not None
    return _Plan(library, n, count, dtype, inverse=inverse)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"MKL: a transform must end with status 0; got {status}.")


@cache
def _library() -> ctypes.CDLL | None:
    """torch's own library, if it has MKL's transforms."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    return library if hasattr(library, _SINGLE) and hasattr(library, "DftiComputeForward") else None
