"""Projections that change the order of dims as they go."""

import torch
from torch import Tensor, nn


def channels_first(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x) with channels first: [B, T, D] -> [B, D', T], written contiguously by the product itself."""
    weight = layer.weight.expand(x.shape[0], -1, -1)
    bias: Tensor | None = layer.bias  # torch declares it as always there
    if bias is None:
        return torch.bmm(weight, x.transpose(1, 2))
    return torch.baddbmm(bias[None, :, None], weight, x.transpose(1, 2))
