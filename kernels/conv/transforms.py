"""Real Fourier transforms along the last axis: torch.fft, and on a CPU with MKL the same ones in place, by plans that are kept.

torch makes a plan in each call, with tables of sines for its size, which takes as long as two to five transforms of 2^15
points, and its result is new memory. In place half as much passes through the caches. MKL's functions (DFTI: Intel oneMKL
developer reference, "Fourier Transform Functions") are part of torch's library; where they are not found, and for tensors
that are not plain ones of a CPU, torch.fft does it.
"""

import ctypes
import weakref
from functools import cache, lru_cache

import torch
from torch import Tensor

from seqengine.kernels.environment import torch_library

_REAL, _IN_PLACE, _COMPLEX_COMPLEX = 33, 43, 39
_SINGLE, _DOUBLE = "DftiCreateDescriptor_s_1d", "DftiCreateDescriptor_d_1d"
_BACKWARD_SCALE, _NUMBER, _CONJUGATE_EVEN, _PLACEMENT, _INPUT_DISTANCE, _OUTPUT_DISTANCE = 5, 7, 10, 11, 14, 15
_THREAD_LIMIT = 27
_DTYPES = (torch.float32, torch.float64)
KEPT_PLANS = 32


def row_length(n: int, device_type: str) -> int:
    """Reals of a row whose first n are transformed: on a CPU n/2 + 1 complex values come where it lay."""
    return n + 2 if device_type == "cpu" else n


def rfft_(rows: Tensor, n: int) -> Tensor:
    """torch.fft.rfft of the first n values, n even, of rows [..., row_length(n)] -> [..., n/2 + 1], in their memory or not.

    What the rows hold is lost.
    """
    if not _is_plain(rows) or rows.dtype not in _DTYPES or rows.shape[-1] != n + 2:
        return torch.fft.rfft(rows[..., :n])  # type: ignore[no-any-return]
    _run(rows, n, inverse=False)
    return torch.view_as_complex(rows.unflatten(-1, (-1, 2)))


def irfft_(spectrum: Tensor, n: int) -> Tensor:
    """torch.fft.irfft(spectrum, n), n even: [..., n/2 + 1] -> [..., n], in its memory or not. The spectrum is lost."""
    if not _is_plain(spectrum) or not spectrum.is_complex() or spectrum.shape[-1] != n // 2 + 1:
        return torch.fft.irfft(spectrum, n=n)  # type: ignore[no-any-return]
    rows = torch.view_as_real(spectrum).flatten(-2)
    _run(rows, n, inverse=True)
    return rows[..., :n]


def _is_plain(x: Tensor) -> bool:
    """Of a CPU, one value after another, transformed by MKL. Also a tensor without data, which shows what memory is used."""
    if x.device.type != "cpu" or x.numel() == 0 or not x.is_contiguous() or x.is_conj() or _library() is None:
        return False
    return type(x) is Tensor or x.data_ptr() == 0


def _run(rows: Tensor, n: int, *, inverse: bool) -> None:
    if type(rows) is not Tensor:
        return
    plan = _plan(n, rows.numel() // rows.shape[-1], rows.dtype, inverse, torch.get_num_threads())
    plan.run(rows.data_ptr())


class _Plan:
    """Of `count` transforms of n values, one after another in memory. Threads may run it at the same time."""

    def __init__(
        self, library: ctypes.CDLL, n: int, count: int, dtype: torch.dtype, threads: int, *, inverse: bool
    ) -> None:
        self._handle = ctypes.c_void_p()
        create = getattr(library, _SINGLE if dtype == torch.float32 else _DOUBLE)
        _check(create(ctypes.byref(self._handle), _REAL, ctypes.c_long(n)))
        weakref.finalize(self, library.DftiFreeDescriptor, ctypes.byref(self._handle))
        distances = (n // 2 + 1, n + 2) if inverse else (n + 2, n // 2 + 1)
        settings: list[tuple[int, object]] = [
            *((_PLACEMENT, _IN_PLACE), (_CONJUGATE_EVEN, _COMPLEX_COMPLEX), (_NUMBER, ctypes.c_long(count))),
            (_THREAD_LIMIT, ctypes.c_long(threads)),
            *zip((_INPUT_DISTANCE, _OUTPUT_DISTANCE), map(ctypes.c_long, distances), strict=True),
            (_BACKWARD_SCALE, ctypes.c_double(1.0 / n)),
        ]
        for name, value in settings:
            _check(library.DftiSetValue(self._handle, name, value))
        _check(library.DftiCommitDescriptor(self._handle))
        self._compute = library.DftiComputeBackward if inverse else library.DftiComputeForward

    def run(self, rows: int) -> None:
        _check(self._compute(self._handle, ctypes.c_void_p(rows)))


@lru_cache(maxsize=KEPT_PLANS)
def _plan(n: int, count: int, dtype: torch.dtype, inverse: bool, threads: int) -> _Plan:
    """threads: a plan is for as many as the calling thread has."""
    library = _library()
    assert library is not None
    return _Plan(library, n, count, dtype, threads, inverse=inverse)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"MKL: a transform must end with status 0; got {status}.")


@cache
def _library() -> ctypes.CDLL | None:
    """torch's own library, if it has MKL's transforms."""
    library = torch_library()
    has_plans = hasattr(library, _SINGLE) and hasattr(library, "DftiComputeForward")
    return library if torch.backends.mkl.is_available() and has_plans else None
