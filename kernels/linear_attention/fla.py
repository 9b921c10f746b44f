"""The forward kernels of the package fla-core (flash-linear-attention), called inside the operator `seqengine::gla`.

Not tested on a GPU here: the tests cover the refusals and, with a stand-in for the package, which arguments it gets. The
backward is that of backend 'triton', the same function: inside an operator nothing of the package can be differentiated.
"""

import importlib
from typing import Any

from torch import Tensor

from seqengine.kernels.checks import check
from seqengine.kernels.packages import load_package

WIDEST = 256


def load(name: str) -> Any:
    """The package, 0.5 or a later 0.x, whose arguments are used here; else ValueError."""
    return load_package(name, "fla", "fla", "fla-core", "fla", (0, 5))


def check_runs(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless the package can do this."""
    check(name, q.device.type == "cuda", "backend 'fla' needs q, k, v on a CUDA device", q.device)
    single = all(t.element_size() <= 4 for t in (q, k, v))
    check(name, single, "backend 'fla' has no float64; use backend='torch'", q.dtype)
    check(name, q.shape[-1] <= WIDEST, "backend 'fla' has K <= 256; use backend='torch'", q.shape)
    load(name)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial: Tensor | None, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o and the final states: gates [B, T, H, K] by chunk_gla, the others by chunk_simple_gla."""
    per_channel = g is not None and g.ndim == 4
    module = importlib.import_module("fla.ops.gla" if per_channel else "fla.ops.simple_gla")
    how: dict[str, Any] = {
        "scale": scale,
        "initial_state": None if initial is None else initial.float(),
        "output_final_state": True,
        "cu_seqlens": None if bounds is None else bounds.to(q.device),
    }
    if per_channel:
        how["g"] = g
    elif g is not None:
        how["g" if g.ndim == 3 else "g_gamma"] = g
    function = module.chunk_gla if per_channel else module.chunk_simple_gla
    o, final = function(q, k, v, **how)
    return o, final
