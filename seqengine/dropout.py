"""Dropout whose mask depends on the token, not on the rank that holds it: any split of a batch draws the same mask.

The mask of one element is a hash of (key of the window, site in the model, position in the sequence, channel), mixed with
the finaliser of splitmix64 (Steele, Lea and Flood 2014, OOPSLA).
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of signed 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64; wraps around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keep_mask(shape: torch.Size, p: float, keys: Tensor, positions: Tensor, site: int) -> Tensor:
    """Bool mask [B, T, D], False with probability p.

    keys [B] int64, one per window (for example a hash of seed, step and window); positions [T] int64, global.
    """
    B, T, D = shape
    token = mix(mix(keys + torch.full_like(keys, site + 1) * _GOLDEN)[:, None] + positions.view(1, T) * _GOLDEN)
    channel = mix(torch.arange(D, device=keys.device) * _GOLDEN + 1)
    bits = mix(token.view(B, T, 1) ^ channel.view(1, 1, D))
    return _shift_right(bits, 40) >= int(p * (1 << 24))


def token_dropout(x: Tensor, p: float, keys: Tensor | None, positions: Tensor, site: int, *, training: bool) -> Tensor:
    """x [B, T, D] with elements dropped with probability p and the rest scaled by 1 / (1 - p).

    Without keys the mask comes from torch's own generator, and depends on how the batch is split.
    """
    if not training or p == 0.0:
        return x
    if keys is None:
        return torch.nn.functional.dropout(x, p)
    return x * keep_mask(x.shape, p, keys, positions, site) / (1.0 - p)
