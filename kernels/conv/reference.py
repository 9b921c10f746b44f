"""The definitions: causal convolutions as sums over taps, in plain torch. Slow, exact, differentiable any number of times.

Every faster path is tested against these two functions.
"""

import torch
from torch import Tensor


def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s], with x = 0 before its first element.

    Shapes:   x [B, D, T]; k [D, L] or [B, D, L]; returns [B, D, T]. Any T and L >= 1.
    Dtypes:   those of x and k, promoted.
    Memory:   O(B D T); L passes over x.
    """
    taps = k if k.ndim == 3 else k[None]
    y = torch.zeros(
        torch.broadcast_shapes(x.shape, taps[..., :1].shape), dtype=torch.result_type(x, k), device=x.device
    )
    for s in range(min(k.shape[-1], x.shape[-1])):
        shifted = torch.nn.functional.pad(x, (s, 0))[..., : x.shape[-1]]
        y = y + taps[..., s, None] * shifted
    return y


def long_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = post_gate * (k (*) x + skip * x) with x = pre_gate * u, and the last L-1 values of [initial_state, x].

    Shapes: u, gates [B, D, T]; k [D, L] or [B, D, L]; skip [D]; state [B, D, L-1]. Returns (y [B, D, T], state).
    """
    x = u if pre_gate is None else pre_gate * u
    keep = k.shape[-1] - 1
    past = x.new_zeros(*x.shape[:2], keep) if initial_state is None else initial_state.to(x.dtype)
    extended = torch.cat([past, x], dim=-1)
    y = causal_conv(extended, k)[..., keep:]
    if skip is not None:
        y = y + skip[:, None] * x
    if post_gate is not None:
        y = post_gate * y
    return y, extended[..., extended.shape[-1] - keep :]


def short_conv(x: Tensor, w: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y[b, d, t] = bias[d] + sum_s w[d, s] x[b, d, t - s], and the last W-1 values of [initial_state, x].

    Shapes: x [B, D, T]; w [D, W], tap at lag s in column s; bias [D]; state [B, D, W-1].
    """
    y, state = long_conv(x, w, None, None, None, initial_state)
    return (y if bias is None else y + bias[:, None]), state
