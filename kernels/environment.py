"""How kernels run here. The only file of this floor that reads the environment, and it does so when asked."""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

HAS_TRITON = find_spec("triton") is not None


def is_interpreted() -> bool:
    """Triton runs kernels in its interpreter, on CPU tensors. Triton itself decides this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(device_type: str) -> bool:
    """A Triton kernel can work on tensors of this device."""
    return HAS_TRITON and (device_type == "cuda" or (device_type == "cpu" and is_interpreted()))


@cache
def torch_library() -> ctypes.CDLL | None:
    """torch's own library of what runs on a CPU, with the functions of MKL and OpenMP that it has; on Linux."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(path)) if path.is_file() else None
