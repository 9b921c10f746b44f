"""How kernels run here. The only file of this floor that reads the environment, and it does so when asked."""

import os


def is_interpreted() -> bool:
    """Triton runs kernels in its interpreter, on CPU tensors. Triton itself decides this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
