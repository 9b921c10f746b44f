"""The public face of softmax attention: checks, choice of backend."""

from typing import Literal, overload

import torch
from torch import Tensor

from seqengine.kernels.attention import flash, flex, ops, reference, sdpa
from seqengine.kernels.attention.merge import merge_attention
from seqengine.kernels.checks import check, check_bounds, check_floats, check_shape

__all__ = ["attention", "merge_attention"]

KNOWN = ("auto", "torch", "sdpa", "flex", "flash-attn", "reference")
Backend = Literal["auto", "torch", "sdpa", "flex", "flash-attn", "reference"]
"""auto follows this table; "plain" is without window and documents, every query seeing all keys or causal with T = S:

    CPU, float32 or float64, plain, V = K                             sdpa
    CUDA, plain, no lse; bfloat16 or float16 with V = K, or H = G     sdpa     (heads of at most 256, no float64)
    everything else                                                   torch

torch: blocks of queries and keys, every feature on every device. sdpa: torch's fused kernels. flex: generated kernels for
windows and documents on CUDA; on a CPU forward only, with all scores. flash-attn: the package, on CUDA. reference: the
definition, with all scores. Only torch, sdpa on a CPU and reference have a second derivative.

One CPU thread, H = 8, K = 64, float32, T = 1024 to 8192: torch takes 1.4 to 1.7 times the time of sdpa forward and 1.2 to 1.5
times with the backward, the reference 7 to 9 and 4 to 6 times."""


def check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    check(name, q.ndim == 4, "q must be [B, T, H, K]", q.shape)
    B, _, H, K = q.shape
    check(name, K >= 1 and H >= 1, "q [B, T, H, K] must have H, K >= 1", q.shape)
    check(name, k.ndim == 4, "k must be [B, S, G, K]", k.shape)
    check(name, k.shape[0] == B and k.shape[3] == K, "k [B, S, G, K] must have B={}, K={}", k.shape, B, K)
    G = k.shape[2]
    check(name, G >= 1 and H % max(1, G) == 0, "k [B, S, G, K] must have G dividing H={}", k.shape, H)
    check(name, v.ndim == 4 and v.shape[3] >= 1, "v must be [B, S, G, V], V >= 1", v.shape)
    check_shape(name, "v", v, "[B, S, G, V]", *k.shape[:3], v.shape[3])
    check_floats(name, q=q, k=k, v=v)
    for what, x in (("k", k), ("v", v)):
        check(name, x.dtype == q.dtype, "{} must have q's dtype {}", x.dtype, what, q.dtype)


def check_options(
    name: str, q: Tensor, k: Tensor, causal: bool, window: int | None, scale: float | None, cu_seqlens: Tensor | None
) -> None:
    check(name, isinstance(causal, bool), "causal must be a bool", causal)
    if window is not None:
        is_count = isinstance(window, int) and not isinstance(window, bool) and window >= 1
        check(name, is_count, "window must be None or an int >= 1", window)
    check(name, scale is None or isinstance(scale, (int, float)), "scale must be None or a number", scale)
    if cu_seqlens is not None:
        check(name, q.shape[0] == 1, "with cu_seqlens q, k, v must be one row, B = 1", q.shape)
        check(name, k.shape[1] == q.shape[1], "with cu_seqlens k must have as many tokens as q, S = T", k.shape)
        integers = cu_seqlens.dtype in (torch.int32, torch.int64)
        must = "cu_seqlens must be an int32 or int64 vector [N + 1], N >= 1"
        check(name, integers, must, cu_seqlens.dtype)
        check(name, cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2, must, cu_seqlens.shape)


def _is_plain(q: Tensor, k: Tensor, causal: bool, window: int | None, cu_seqlens: Tensor | None) -> bool:
    """What the fused kernels of torch know: all keys, or causal with T = S. One query after its keys sees all of them."""
    T, S = q.shape[1], k.shape[1]
    return window is None and cu_seqlens is None and (not causal or T == S or (T == 1 and S >= 1))


def _choose(q: Tensor, k: Tensor, v: Tensor, plain: bool, return_lse: bool) -> str:
    """The table of `Backend`."""
    if not plain:
        return "torch"
    if q.device.type == "cpu":
        exact = q.dtype in (torch.float32, torch.float64) and v.shape[-1] == q.shape[-1]
        return "sdpa" if exact else "torch"
    has_kernel = q.device.type == "cuda" and not return_lse and sdpa.fits_device(q, k, v)
    return "sdpa" if has_kernel and q.numel() > 0 and k.numel() > 0 else "torch"


def check_runs(name: str, backend: str, q: Tensor, k: Tensor, v: Tensor, plain: bool, return_lse: bool) -> None:
    """ValueError if an explicit backend cannot do this here."""
    where = q.device.type
    if backend == "sdpa":
        must = "backend 'sdpa' has no window, no cu_seqlens, and if causal T = S; use backend='torch'"
        check(name, plain, must, (tuple(q.shape), tuple(k.shape)))
        same = where != "cpu" or v.shape[-1] == q.shape[-1]
        check(name, same, "backend 'sdpa' on a CPU needs V = K={}; use backend='torch'", v.shape, q.shape[-1])
        has_lse = where == "cpu" or not return_lse
        check(name, has_lse, "backend 'sdpa' returns no lse on {}; use backend='torch'", return_lse, where)
    if backend == "flex":
        check(name, q.numel() > 0 and k.numel() > 0, "backend 'flex' needs B, T, S >= 1", (q.shape, k.shape))
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        must = "backend 'flex' has no backward on a CPU: it needs tensors without requires_grad, or CUDA"
        check(name, where != "cpu" or not differentiable, must, where)
        single = where == "cpu" or q.dtype != torch.float64
        check(name, single, "backend 'flex' has float64 on a CPU only; use backend='torch'", q.dtype)
    if backend == "flash-attn":
        if not torch.compiler.is_compiling():  # else the operator does it when it runs
            flash.load()
        check(name, where == "cuda", "backend 'flash-attn' needs q, k, v on a CUDA device", q.device)
        half = q.dtype in (torch.bfloat16, torch.float16)
        check(name, half, "backend 'flash-attn' needs bfloat16 or float16", q.dtype)
        check(name, flash.takes(q, v), "backend 'flash-attn' needs V = K, a multiple of 8, <= 256", (q.shape, v.shape))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention out_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys that query t sees.

    Shapes:   q [B, T, H, K]; k [B, S, G, K]; v [B, S, G, V], G dividing H: head h uses group h // (H / G). Returns
              out [B, T, H, V] or, with return_lse, (out, lse [B, H, T]), lse_t = log sum_s exp(scale q_t . k_s).
              Any B, T, S >= 0.
    Keys:     query t stands at p = t + S - T: the last query at the last key. causal: s <= p; decoding is T = 1. window w:
              p - w < s, the w newest keys with its own, and if not causal |p - s| < w. A query without a key has out = 0,
              lse = -inf and zero gradients.
    Dtypes:   float64, float32, bfloat16 or float16, one for q, k and v; out has it too; lse float32, or float64 for float64.
              Autocast changes nothing. Backend torch: float32 arithmetic below float64. scale defaults to K ** -0.5.
    Memory:   saves q, k, v, out and lse; the backward makes the scores again. torch: one block of scores and, for the groups at
              work, k, v, dk, dv in the dtype of the arithmetic. A second derivative holds all scores [B, H, T, S].
    Time:     T S K H, half of it if causal, T window K H with a window, the sum of squared lengths with documents.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: B = 1 and S = T, N documents end to end, none of which sees another.
    Exact to: reference.attention within 1e-12 relative in float64: out, lse, and gradients for cotangents of both.
    Raises:   ValueError if shapes, dtypes or devices do not fit, an option is out of range, or the backend is unknown or cannot
              do this here.
    References: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; grouped heads: Ainslie et al. 2023,
              arXiv:2305.13245.
    """
    name = "attention"
    check(name, backend in KNOWN, "backend must be one of {}", backend, ", ".join(map(repr, KNOWN)))
    check_tensors(name, q, k, v)
    check_options(name, q, k, causal, window, scale, cu_seqlens)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if window is not None and window >= (k.shape[1] if causal else max(q.shape[1], k.shape[1])):
        window = None  # no query stands further from a key
    plain = _is_plain(q, k, causal, window, cu_seqlens)
    chosen = _choose(q, k, v, plain, return_lse) if backend == "auto" else backend
    check_runs(name, chosen, q, k, v, plain, return_lse)
    if chosen == "sdpa" and q.device.type != "cpu":
        with torch.autocast(q.device.type, enabled=False):
            return sdpa.on_device(q, k, v, causal, factor)
    if chosen in ("reference", "flex"):
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            check_bounds(name, cu_seqlens, q.shape[1])
        compute = reference.attention if chosen == "reference" else flex.attention
        with torch.autocast(q.device.type, enabled=False):
            out, lse = compute(q, k, v, cu_seqlens, causal, window, factor)
    else:
        out, lse = ops.attention(q, k, v, cu_seqlens, causal, window, factor, chosen)
    return (out, lse) if return_lse else out
