"""The definition: every Monarch transform written out as its full matrix of n x n numbers. Slow, large, differentiable.

The faster path is tested against this.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor, Tensor]
"""outer [G, N1, N1], twiddle [G, N1, N2], inner [G, N2, N2], each with its own G: 1 or the number of groups."""


def forward_matrix(outer: Tensor, twiddle: Tensor, inner: Tensor) -> Tensor:
    """[G, n, n]: M[k1 N2 + k2, n1 N2 + n2] = outer[k1, n1] twiddle[k1, n2] inner[k2, n2]."""
    return torch.einsum("gab,gad,gcd->gacbd", outer, twiddle, inner).flatten(3, 4).flatten(1, 2)


def inverse_matrix(outer: Tensor, twiddle: Tensor, inner: Tensor) -> Tensor:
    """[G, n, n]: M[n1 N2 + n2, k1 N2 + k2] = outer[n1, k1] twiddle[k1, n2] inner[n2, k2]."""
    return torch.einsum("gba,gad,gdc->gbdac", outer, twiddle, inner).flatten(3, 4).flatten(1, 2)


def monarch_conv(
    u: Tensor,
    k: Tensor,
    forward: Factors,
    inverse: Factors,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
) -> Tensor:
    """y = post_gate * (Re(Minv (M pad(x) * M pad(k)))[:T] + skip * x), x = pre_gate * u.

    Shapes:   u, gates [B, D, T]; k [D, L] or [B, D, L]; factors as in `Factors`; skip [D]. Returns [B, D, T] in u.dtype.
    Memory:   O(G n^2).
    """
    T, L = u.shape[-1], k.shape[-1]
    matrix, back = forward_matrix(*forward), inverse_matrix(*inverse)
    groups, n = max(matrix.shape[0], back.shape[0]), matrix.shape[-1]
    x = u if pre_gate is None else pre_gate * u
    taps = k if k.ndim == 3 else k[None]
    dtype = torch.promote_types(torch.promote_types(x.dtype, k.dtype), matrix.dtype)
    rows = F.pad(x, (0, n - T)).to(dtype).unflatten(1, (groups, x.shape[1] // groups))
    filters = F.pad(taps, (0, n - L)).to(dtype).unflatten(1, (groups, x.shape[1] // groups))
    spectrum = torch.einsum("gij,bgcj->bgci", matrix.to(dtype), rows)
    spectrum = spectrum * torch.einsum("gij,bgcj->bgci", matrix.to(dtype), filters)
    y = torch.einsum("gij,bgcj->bgci", back.to(dtype), spectrum).real.flatten(1, 2)[..., :T]
    if skip is not None:
        y = y + skip[:, None] * x
    if post_gate is not None:
        y = post_gate * y
    return y.to(u.dtype)
