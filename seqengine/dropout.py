"""Dropout whose mask depends on the token, not on the rank that holds it: any split of a batch draws the same mask.

The mask of one element is a hash of (key of the window, site in the model, position in the sequence, channel), mixed with
the finaliser of splitmix64 (Steele, Lea and Flood 2014, OOPSLA). It is integer arithmetic alone, so that it does not depend on
the dtype or the device either. It is not saved: the backward draws it again.
"""

from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.checks import check

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Numbers that are hashed at a time: in the cache of a CPU; on a GPU only a bound on memory."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of signed 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64, in place; wraps around."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def keep_mask(shape: torch.Size, p: float, keys: Tensor, positions: Tensor, site: int) -> Tensor:
    """Bool mask [B, T, D], False with probability p, to the nearest 2^-24 below.

    keys [B] int64, one per window (for example a hash of seed, step and window); positions [T] int64, global, in any order.
    """
    B, T, D = shape
    window = _mix_(keys + torch.full_like(keys, site + 1) * _GOLDEN)
    token = _mix_(window[:, None] + positions[None, :] * _GOLDEN)
    channel = _mix_(torch.arange(D, device=keys.device) * _GOLDEN + 1)
    bits = _mix_(token.view(B, T, 1) ^ channel.view(1, 1, D))
    return _shift_right(bits, 40) >= int(p * (1 << 24))


def token_dropout(x: Tensor, p: float, keys: Tensor | None, positions: Tensor, site: int, *, training: bool) -> Tensor:
    """x with elements dropped with probability p and the rest scaled by 1 / (1 - p).

    Shapes:  x [B, T, D]; keys [B] int64, one per window; positions [T] int64: those of x's tokens in the whole sequence,
             in any order (contiguous parts, zigzag). site: which of the model's dropouts this is, >= 0.
    Dtypes:  any of x; the mask is the same in all.
    Memory:  saves keys and positions. Without keys, as torch.
    Exact to: the whole's result, bit for bit, whatever the split. Without keys the mask comes from torch's own generator, and
             depends on how the batch is split.
    Raises:  ValueError if p is not in [0, 1], or keys or positions do not fit x.
    """
    check("token_dropout", 0.0 <= p <= 1.0, "p must be from 0 to 1", p)
    if not training or p == 0.0:
        return x
    if keys is None:
        return torch.nn.functional.dropout(x, p)
    B, T, _ = x.shape
    check("token_dropout", keys.shape == (B,), "keys must have one number for each of the {} windows", keys.shape, B)
    check("token_dropout", positions.shape == (T,), "positions must be those of the {} tokens", positions.shape, T)
    y: Tensor = _TokenDropout.apply(x, p, keys, positions, site)  # type: ignore[no-untyped-call]
    return y


class _TokenDropout(torch.autograd.Function):
    """x -> mask * x / (1 - p), its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, positions: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(keys, positions)
        ctx.p, ctx.site = p, site
        return _dropped(x, p, keys, positions, site)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        dx: Tensor = _TokenDropout.apply(gradient, ctx.p, *ctx.saved_tensors, ctx.site)  # type: ignore[no-untyped-call]
        return dx, None, None, None, None


def _dropped(x: Tensor, p: float, keys: Tensor, positions: Tensor, site: int) -> Tensor:
    """By blocks of tokens; in one where a compiler fuses it."""
    B, T, D = x.shape
    if p == 1.0:
        return torch.zeros_like(x)
    block = max(1, BLOCK_ELEMENTS.get(x.device.type, 1 << 16) // max(1, B * D))
    if block >= T or torch.compiler.is_compiling():
        return torch.where(keep_mask(x.shape, p, keys, positions, site), x / (1.0 - p), 0.0)
    y = torch.empty_like(x)
    for start in range(0, T, block):
        tokens = slice(start, start + block)
        part = x[:, tokens]
        mask = keep_mask(part.shape, p, keys, positions[tokens], site)
        y[:, tokens] = torch.where(mask, part / (1.0 - p), 0.0)
    return y
