"""The definitions: every power of every pole at once, and the recurrence step by step. Slow, large, differentiable.

Every faster path is tested against these two functions.
"""

import torch
from torch import Tensor


def modal_filter(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """k[d, t] = Re sum_n residues[d, n] exp(log_poles[d, n] t), and exp(-inf * 0) = 1.

    Shapes:   log_poles, residues [D, N]; returns [D, length].
    Memory:   O(D N length).
    """
    t = torch.arange(length, device=log_poles.device, dtype=log_poles.real.dtype)
    # exp(-1e4) is zero in every dtype, and unlike -inf it can be multiplied by t = 0
    magnitude = torch.exp(log_poles.real.clamp(min=-1e4)[..., None] * t)
    powers = torch.polar(magnitude, log_poles.imag[..., None] * t) if log_poles.is_complex() else magnitude
    weighted = residues[..., None] * powers
    return (weighted.real if weighted.is_complex() else weighted).sum(dim=1)


def modal_conv(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """s[t] = exp(log_poles) s[t-1] + x[t],  y[t] = post_gate * (Re sum_n residues s[t] + skip * x[t]),  x = pre_gate * u.

    Shapes:   u, gates [B, D, T]; log_poles, residues [D, N]; skip [D]; state [B, D, N]. Returns (y [B, D, T], state).
    Dtypes:   those of the inputs, promoted; the state is complex if log_poles are.
    """
    x = u if pre_gate is None else pre_gate * u
    dtype = torch.promote_types(x.dtype, log_poles.dtype)
    poles = torch.exp(log_poles).to(dtype)
    state = poles.new_zeros(*u.shape[:2], log_poles.shape[1]) if initial_state is None else initial_state.to(dtype)
    outputs = [x.new_zeros(*u.shape[:2], 0)]
    for t in range(u.shape[-1]):
        state = poles * state + x[..., t, None]
        weighted = residues * state
        outputs.append((weighted.real if weighted.is_complex() else weighted).sum(dim=-1, keepdim=True))
    y = torch.cat(outputs, dim=-1)
    if skip is not None:
        y = y + skip[:, None] * x
    if post_gate is not None:
        y = post_gate * y
    return y.to(u.dtype), state
