"""Triton kernels in Triton's interpreter, on a CPU: a session of its own, because Triton decides at its import.

TRITON_INTERPRET=1 python -m pytest tests/kernels/triton
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
