"""The public face of the language-model loss: checks and the sizes of tiles."""

from typing import Literal, overload

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_floats
from seqengine.kernels.loss import ops

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits of one tile: 4 MB in float32 on a CPU, half a gigabyte on a GPU."""
LARGEST_TILE_WORDS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""A larger vocabulary is cut: then a tile still has enough tokens for its products to be worth reading the weights."""


def tile_sizes(V: int, device_type: str, tile: int | None) -> tuple[int, int]:
    """(tokens, words) of a tile; `tile`, if given, is the number of tokens."""
    words = max(1, min(V, LARGEST_TILE_WORDS.get(device_type, 1 << 16)))
    return tile or max(1, TILE_ELEMENTS.get(device_type, 1 << 27) // words), words


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    tile: int | None = None,
    output_squares: bool = False,
) -> tuple[Tensor, ...]:
    """Sum over tokens of -log softmax(hidden weight^T)[label] in nats, and the number of tokens counted.

    Shapes:   hidden [..., D]; weight [V, D]; labels [...] int64, each in [0, V) or ignore_index. Returns two scalars; with
              output_squares a third, the sum over the same tokens of logsumexp(logits)^2: the z-loss before its weight.
    Dtypes:   float64, float32, bfloat16 or float16. Sums in float32, or in float64 where an input is; on a GPU products of
              16-bit numbers by tensor cores, whose gradients of the logits are rounded to 16 bits too. The count is int64.
    Memory:   one tile of logits at a time, over tokens and, beyond 4,096 words (65,536 on a GPU), over the vocabulary; tile
              is its number of tokens, by default 4 MB of logits (512 MB). Saves the inputs and one number a token (two and
              a flag with output_squares). The gradient of weight is summed in [V, D] of float32. Second derivatives alone make
              whole logits.
    Exact to: reference.linear_cross_entropy within 1e-12 relative in float64; gradients are exact for any upstream gradient,
              so sums over micro-batches divided by the total count weigh every token alike.
    Raises:   ValueError if shapes or devices disagree, a dtype is not supported, labels are not int64 or (on a CPU; a GPU
              stops with an assertion) lie outside the vocabulary, or tile < 1.
    References: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867. z-loss, Chowdhery et al. 2022,
              arXiv:2204.02311, section 5.
    """
    name = "linear_cross_entropy"
    agree = weight.ndim == 2 and hidden.ndim >= 1 and hidden.shape[-1] == weight.shape[1]
    check(name, agree, "hidden [..., D] and weight [V, D] must agree in D", (tuple(hidden.shape), tuple(weight.shape)))
    check_floats(name, hidden=hidden, weight=weight)
    fits = labels.shape == hidden.shape[:-1] and labels.dtype == torch.int64
    must = "labels must be int64 of shape {}"
    check(name, fits, must, (labels.dtype, tuple(labels.shape)), tuple(hidden.shape[:-1]))
    check(name, labels.device == hidden.device, "labels must be on {}, like hidden", labels.device, hidden.device)
    check(name, tile is None or tile >= 1, "tile must be at least 1 token", tile)
    flat = labels.reshape(-1)
    sizes = tile_sizes(weight.shape[0], hidden.device.type, tile)
    nats, lse = ops.linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, flat, ignore_index, *sizes)
    counted = flat != ignore_index
    if output_squares:
        return nats, counted.sum(), torch.where(counted, lse, 0).square().sum()
    return nats, counted.sum()
