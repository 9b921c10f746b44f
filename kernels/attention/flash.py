"""The kernels of the package flash_attn (FlashAttention-2, version 2.8), called inside the operator `seqengine::attention`.

Not tested on a GPU here: the tests cover the refusals and, with a stand-in for the package, which arguments it gets. A
cotangent of lse, which these kernels do not take, goes through blocked.py.

References: Dao 2023, arXiv:2307.08691.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.packages import load_package

WIDEST = 256


def load() -> Any:
    """The package, 2.8 or a later 2.x, whose arguments are used here; else ValueError."""
    return load_package("attention", "flash-attn", "flash_attn", "flash_attn", "flash-attn", (2, 8))


def takes(q: Tensor, v: Tensor) -> bool:
    """Its heads: equally wide, a multiple of 8, at most 256."""
    return q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST


def _window(causal: bool, window: int | None) -> tuple[int, int]:
    """Keys to the left and to the right of a query; -1 is no limit."""
    reach = -1 if window is None else window - 1
    return reach, (0 if causal else reach)


def _lengths(cu_seqlens: Tensor) -> tuple[Tensor, int]:
    bounds = cu_seqlens.to(torch.int32)
    return bounds, int(bounds.diff().max())


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse). The package says +inf where a query sees no key; here that is -inf."""
    package = load()
    how = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window(causal, window),
        "return_attn_probs": True,
    }
    if cu_seqlens is None:
        out, lse, _ = package.flash_attn_func(q, k, v, **how)
    else:
        bounds, longest = _lengths(cu_seqlens.to(q.device))
        out, lse, _ = package.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, longest, longest, **how)
        out, lse = out[None], lse[None]
    return out.contiguous(), lse.masked_fill(lse == math.inf, -math.inf).contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for a cotangent of out alone, summed in a fixed order."""
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    left, right = _window(causal, window)
    how = {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
    }
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout = dout.to(q.dtype)
    if cu_seqlens is None:
        interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **how)
        return dq, dk, dv
    bounds, longest = _lengths(cu_seqlens.to(q.device))
    rows = [x[0] for x in (dout, q, k, v, out, lse, dq, dk, dv)]
    interface._flash_attn_varlen_backward(*rows, bounds, bounds, longest, longest, **how)
    return dq, dk, dv
