"""The definition of the language-model loss: whole logits, log-softmax, sum."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden weight^T)[label] in nats over labels != ignore_index, and their number.

    Shapes: hidden [..., D]; weight [V, D]; labels [...] int64. Returns (scalar in float32 or float64, scalar int64).
    """
    logits = _logits(hidden, weight)
    nats = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return nats, (labels != ignore_index).sum()


def squares(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Sum over labels != ignore_index of logsumexp(hidden weight^T)^2; shapes and dtypes as above."""
    return torch.logsumexp(_logits(hidden, weight), dim=1)[labels.flatten() != ignore_index].square().sum()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.to(dtype).flatten(0, -2) @ weight.to(dtype).T
