"""Cross-entropy of a linear head as two operators, tiled over tokens and over the vocabulary.

    linear_cross_entropy(h, W, labels)          (sum of lse - logit[label], lse [N]), lse = log sum exp of a token's logits
    linear_cross_entropy_backward(up, ...)      p = exp(logits - lse), one less at the label;  dh = up p W,  dW = up p^T h

lse may be used too, as the z-loss does: d lse / d logits = exp(logits - lse), so a token whose lse has the gradient g adds
g exp(logits - lse) to the gradient of its logits.

The logits exist one tile at a time. Over the tiles of the vocabulary the sum of exponentials is kept with its running maximum
(Milakov and Gimelshein 2018, arXiv:1805.02867). Saved are the inputs and lse, so that the backward computes the logits once.
Both gradients are multiplied by the upstream gradient at the end, in the dtype of the sums; with gradients of lse, by a scale
under which what is rounded to 16 bits is at most about one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.derivatives import differentiate


def tiles(N: int, V: int, tile_tokens: int, tile_words: int) -> Iterator[tuple[slice, list[slice]]]:
    """Tokens, and the words to go through for them."""
    words = [slice(v, min(v + tile_words, V)) for v in range(0, V, tile_words)]
    for start in range(0, N, tile_tokens):
        yield slice(start, min(start + tile_tokens, N)), words


def accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b summed in `dtype`. On a GPU equal 16-bit operands stay what they are: tensor cores sum them in float32."""
    if a.device.type == "cuda" and a.dtype == b.dtype and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _check_labels(labels: Tensor, V: int, ignore_index: int) -> None:
    """On a GPU the check does not wait: a wrong label then stops the process."""
    fits = ((labels == ignore_index) | ((labels >= 0) & (labels < V))).all()
    must = f"linear_cross_entropy: labels must lie in [0, {V}) or be ignore_index={ignore_index}"
    if labels.device.type == "cuda":
        torch._assert_async(fits, must)
    elif not bool(fits):
        raise ValueError(f"{must}; got {int(labels.min())}..{int(labels.max())}.")


@torch.library.custom_op("seqengine::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, tile_tokens: int, tile_words: int
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], labels [N]: the sum of nats and lse [N], in float32 or float64."""
    N, V = hidden.shape[0], weight.shape[0]
    _check_labels(labels, V, ignore_index)
    dtype = accumulation_dtype(hidden, weight)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    lse = torch.empty(N, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for some, words in tiles(N, V, tile_tokens, tile_words):
            x, wanted = hidden[some], labels[some]
            largest = torch.full(wanted.shape, -torch.inf, dtype=dtype, device=x.device)
            summed, picked = torch.zeros_like(largest), torch.zeros_like(largest)
            for own in words:
                logits = _product(x, weight[own].T, dtype)
                above = torch.maximum(largest, logits.amax(dim=1))
                here = (wanted >= own.start) & (wanted < own.stop)
                column = (wanted - own.start).clamp(0, logits.shape[1] - 1)
                picked = torch.where(here, logits.gather(1, column[:, None])[:, 0], picked)
                summed = summed * (largest - above).exp() + logits.sub_(above[:, None]).exp_().sum(dim=1)
                largest = above
            lse[some] = largest + summed.log()
            total += torch.where(wanted != ignore_index, lse[some] - picked, 0).sum()
    return total, lse


@torch.library.custom_op("seqengine::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    tile_tokens: int,
    tile_words: int,
    need_hidden: bool,
    need_weight: bool,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight in their dtypes; one that is not needed is empty, of shape [0].

    upstream, d_lse: gradients of the two results of the forward, [] and [N]; no d_lse means zeros.
    """
    N, V = hidden.shape[0], weight.shape[0]
    dtype = accumulation_dtype(hidden, weight)
    scale, of_label, of_all = _token_weights(upstream.to(dtype), labels != ignore_index, d_lse)
    d_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=dtype, device=weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for some, words in tiles(N, V, tile_tokens, tile_words):
            x, wanted = hidden[some], labels[some]
            summed = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_hidden else None
            for own in words:
                part = weight[own]
                p = _product(x, part.T, dtype).sub_(lse[some, None]).exp_()
                here = (wanted >= own.start) & (wanted < own.stop)
                column = (wanted - own.start).clamp(0, p.shape[1] - 1)
                p *= of_all[some, None]
                p.scatter_add_(1, column[:, None], -(here * of_label[some])[:, None])
                p = p.to(x.dtype) if x.device.type == "cuda" else p
                if summed is not None:
                    summed += _product(p, part, dtype)
                if need_weight:
                    d_weight[own] += _product(p.T, x, dtype)
            if summed is not None:
                d_hidden[some] = summed.mul_(scale)
    return d_hidden, d_weight.mul_(scale).to(weight.dtype)


def _token_weights(upstream: Tensor, kept: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [], a [N], b [N]): the gradient of the logits is scale (b exp(logits - lse) - a at the label)."""
    counted = kept.to(upstream.dtype)
    if d_lse is None or d_lse.numel() == 0:
        return upstream, counted, counted
    largest = upstream.abs() + d_lse.abs().amax()
    scale = torch.where(largest == 0, torch.ones_like(largest), largest)
    of_label = counted * (upstream / scale)
    return scale, of_label, of_label + d_lse / scale


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, tile_tokens: int, tile_words: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden, weight)
    return (
        torch.empty((), dtype=dtype, device=hidden.device),
        torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device),
    )


@linear_cross_entropy_backward.register_fake
def _(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    tile_tokens: int,
    tile_words: int,
    need_hidden: bool,
    need_weight: bool,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=weight.device),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])
    ctx.set_materialize_grads(False)  # an lse that nobody uses then has the gradient None, not zeros


def _differentiate(ctx: Any, upstream: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors  # once: a checkpointed region gives them once
    given = saved[3].new_zeros(()) if upstream is None else upstream
    found = linear_cross_entropy_backward(given, *saved, *ctx.settings, *needs, d_lse)
    return (*(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    upstream, hidden, weight, labels, _, ctx.ignore_index, *_, need_hidden, need_weight, d_lse = inputs
    ctx.save_for_backward(upstream, hidden, weight, d_lse, labels)
    ctx.had = (need_hidden, need_weight)


def _differentiate_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """By torch, through the gradients of the definition: whole logits, which only second derivatives need."""
    *saved, labels = ctx.saved_tensors
    dtype = accumulation_dtype(saved[1], saved[2])

    def written_out(upstream: Tensor, hidden: Tensor, weight: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor]:
        x, w = hidden.to(dtype), weight.to(dtype)
        shares = torch.softmax(x @ w.T, dim=1)
        p = shares - F.one_hot(labels.clamp(min=0), w.shape[0]).to(dtype)
        p = p * (labels != ctx.ignore_index)[:, None] * upstream
        p = p if d_lse is None else p + shares * d_lse[:, None]
        return p @ w, p.T @ x

    asked_for = [h if had else None for h, had in zip(cotangents, ctx.had, strict=True)]
    needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[10])
    *found, d_lse = differentiate(written_out, saved, needs, asked_for)
    return (*found, *[None] * 7, d_lse)


linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)
linear_cross_entropy_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
