"""The two operators under `attention`, registered with torch: they trace, compile and differentiate.

    attention(q, k, v, ...)                                  out and lse
    attention_backward(dout, dlse, q, k, v, out, lse, ...)   dq, dk, dv for cotangents of both

Saved are q, k, v, out and lse. `attention_backward` reads out and lse as they are given: with those of all keys it gives the
gradients of one part of the keys. Its own derivative goes through reference.attention_gradients, which holds all scores;
out and lse are arguments of it, so that the derivative through them follows from the first operator.
"""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.attention import blocked, flash, reference, sdpa
from seqengine.kernels.attention.bounds import check_documents

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
        check_documents("attention", cu_seqlens, q.shape[1])
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
    saved, asked, further = ctx.saved_tensors, ctx.needs_input_grad[:7], torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(saved[2].device.type, enabled=False):
        own = [None if t is None else t.view_as(t) if ask else t.detach() for t, ask in zip(saved, asked, strict=False)]
        arguments: list[Any] = [*own, saved[7], *ctx.how]
        values = reference.attention_gradients(*arguments)
        pairs = [(x, h) for x, h in zip(values, cotangents, strict=True) if h is not None and x.requires_grad]
        wanted = [t for t, ask in zip(own, asked, strict=True) if ask and t is not None]
        found = iter(
            torch.autograd.grad(
                [x for x, _ in pairs], wanted, [h for _, h in pairs], create_graph=further, allow_unused=True
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
    gradients = (next(found) if ask and t is not None else None for t, ask in zip(own, asked, strict=True))
    return (*gradients, *[None] * 5)


attention.register_autograd(_differentiate_attention, setup_context=_save_for_attention)
attention_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
