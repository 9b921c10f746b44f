"""The two operators under `attention`, registered with torch: they trace, compile and differentiate.

    attention(q, k, v, ...)                                  out and lse
    attention_backward(dout, dlse, q, k, v, out, lse, ...)   dq, dk, dv for cotangents of both

Saved are q, k, v, out and lse. `attention_backward` reads out and lse as they are given: with those of all keys it gives the
gradients of one part of the keys. Its own derivative goes through reference.attention_gradients, which holds all scores;
out and lse are arguments of it, so that the derivative through them follows from the first operator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.attention import blocked, flash, reference, sdpa
from seqengine.kernels.checks import check_bounds
from seqengine.kernels.derivatives import differentiate

Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("seqengine::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K]; k [B, S, G, K]; v [B, S, G, V]. Returns (out [B, T, H, V], lse [B, H, T])."""
    if cu_seqlens is not None:
        check_bounds("attention", cu_seqlens, q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        if _has_scores(q, k) and backend == "sdpa":
            return sdpa.cpu_forward(q, k, v, causal, scale)
        if _has_scores(q, k) and backend == "flash-attn":
            return flash.forward(q, k, v, cu_seqlens, causal, window, scale)
        return blocked.forward(q, k, v, cu_seqlens, causal, window, scale)


@torch.library.custom_op("seqengine::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> Three:
    """(dq, dk, dv). A fused backend takes no cotangent of lse: with one, the blocks of blocked.py do the work."""
    with torch.autocast(q.device.type, enabled=False):
        if _has_scores(q, k) and dlse is None and backend == "sdpa":
            return sdpa.cpu_backward(dout, q, k, v, out, lse, causal, scale)
        if _has_scores(q, k) and dlse is None and backend == "flash-attn":
            return flash.backward(dout, q, k, v, out, lse, cu_seqlens, causal, window, scale)
        return blocked.backward(dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale)


def _has_scores(q: Tensor, k: Tensor) -> bool:
    return q.numel() > 0 and k.numel() > 0


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    out = torch.empty(B, T, H, v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(B, H, T, dtype=reference.arithmetic_dtype(q), device=q.device)


@attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> Three:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save_for_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.how = inputs[4:]
    ctx.set_materialize_grads(False)  # a cotangent of lse that does not exist costs nothing


def _differentiate_attention(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    given = torch.zeros_like(out) if dout is None else dout
    found = attention_backward(given, dlse, q, k, v, out, lse, cu_seqlens, *ctx.how)
    wanted = (gradient if need else None for gradient, need in zip(found, ctx.needs_input_grad[:3], strict=True))
    return (*wanted, None, None, None, None, None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.how = inputs[8:11]
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """By torch, through the written-out gradients."""
    saved = ctx.saved_tensors

    def written_out(*own: Any) -> Sequence[Tensor | None]:
        arguments: list[Any] = [*own, saved[7], *ctx.how]
        return reference.attention_gradients(*arguments)

    with torch.autocast(saved[2].device.type, enabled=False):
        found = differentiate(written_out, saved[:7], ctx.needs_input_grad[:7], cotangents)
    return (*found, *[None] * 5)


attention.register_autograd(_differentiate_attention, setup_context=_save_for_attention)
attention_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
