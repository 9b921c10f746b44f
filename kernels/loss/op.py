"""Cross-entropy of a linear head, tiled over tokens: the logits of all tokens never exist at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 20
"""Logits of one tile: 4 MB in float32."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of nats for hidden [N, D], weight [V, D], labels [N]. Saves its inputs; the backward computes the logits again.

    The gradients of hidden and of weight are both scaled by the upstream gradient, and summed in float32 or float64.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, tile: int) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(dtype).T
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], tile):
            wanted = labels[start : start + tile]
            logits = hidden[start : start + tile].to(dtype) @ head
            kept = wanted != ignore_index
            picked = logits.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            total += ((torch.logsumexp(logits, dim=1) - picked) * kept).sum()
        ctx.save_for_backward(hidden, weight, labels)
        ctx.settings = (ignore_index, tile, dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        ignore_index, tile, dtype = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            wanted = labels[rows]
            x = hidden[rows].to(dtype)
            d_logits = torch.softmax(x @ head.T, dim=1)
            d_logits[torch.arange(wanted.shape[0], device=x.device), wanted.clamp(min=0)] -= 1.0
            d_logits *= (wanted != ignore_index)[:, None] * upstream
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ head
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, x)
        return d_hidden, (None if d_weight is None else d_weight.to(weight.dtype)), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(hidden weight^T)[label] in nats, and the number of tokens counted.

    Shapes:   hidden [..., D]; weight [V, D]; labels [...] int64, each in [0, V) or ignore_index. Returns two scalars.
    Dtypes:   float32 arithmetic for bfloat16, float16 and float32; float64 for float64. The count is int64.
    Memory:   one tile of logits, tile * V; saves the inputs only. tile defaults to 4 MB of logits.
    Exact to: reference.linear_cross_entropy; gradients are exact for any upstream gradient, so sums over micro-batches
              divided by the total count weigh every token alike.
    Raises:   ValueError if shapes disagree, labels are not int64 or lie outside the vocabulary, or tile < 1.
    """
    name = "linear_cross_entropy"
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden [..., D] and weight [V, D] must agree in D; got {tuple(hidden.shape)}, {tuple(weight.shape)}."
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: labels must be int64 of shape {tuple(hidden.shape[:-1])}; got {labels.dtype} {tuple(labels.shape)}."
        )
    if tile is not None and tile < 1:
        raise ValueError(f"{name}: tile must be at least 1 token; got {tile}.")
    flat = labels.reshape(-1)
    kept = flat != ignore_index
    V = weight.shape[0]
    if flat.device.type == "cpu" and bool((kept & ((flat < 0) | (flat >= V))).any()):
        raise ValueError(
            f"{name}: labels must lie in [0, {V}) or be ignore_index={ignore_index}; got {int(flat.min())}..{int(flat.max())}."
        )
    size = tile or max(1, TILE_ELEMENTS // max(1, V))
    nats: Tensor = LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, flat, ignore_index, size)  # type: ignore[no-untyped-call]
    return nats, kept.sum()
