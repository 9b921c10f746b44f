"""The forward kernel of the package causal_conv1d, called inside the operator `seqengine::short_conv`.

Not tested on a GPU here: the tests cover the refusals and, with a stand-in for the package, which arguments it gets. The
backward is that of backend 'triton': the same function, without the package's atomics.
"""

from typing import Any

from torch import Tensor

from seqengine.kernels.checks import check
from seqengine.kernels.packages import load_package

NAME = "short_conv"


def load() -> Any:
    """The package, 1.4 or a later 1.x, whose arguments are used here; else ValueError."""
    return load_package(NAME, "causal-conv1d", "causal_conv1d", "causal_conv1d", "causal-conv1d", (1, 4))


def check_runs(u: Tensor, w: Tensor, has_past_or_documents: bool) -> None:
    """ValueError unless the package can do this."""
    check(NAME, u.device.type == "cuda", "backend 'causal-conv1d' needs u on a CUDA device", u.device)
    check(NAME, 2 <= w.shape[1] <= 4, "backend 'causal-conv1d' has 2 to 4 taps; use backend='triton'", w.shape)
    check(NAME, u.element_size() <= 4, "backend 'causal-conv1d' has no float64; use backend='torch'", u.dtype)
    must = "backend 'causal-conv1d' takes no initial_state and no cu_seqlens; use backend='triton'"
    check(NAME, not has_past_or_documents, must, "one of them")
    load()


def forward(x: Tensor, w: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """act(bias + sum_s w[s] x[t - s]), contiguous. The package has the tap at lag 0 in its last column."""
    taps, level = w.flip(1).contiguous(), None if bias is None else bias.to(w.dtype)
    y: Tensor = load().causal_conv1d_fn(x, taps, level, activation="silu" if silu else None)
    return y.contiguous()
