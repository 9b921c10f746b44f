"""The (gated) delta rule as its definition says, token by token; differentiated by torch."""

import torch
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale q_t S_t.

    q, k [B, T, H, K], v [B, T, H, V], beta, g [B, T, H], state [B, H, K, V]. Arithmetic and state in float64 if any argument
    is, else in float32; o in v.dtype.
    """
    dtype = torch.float32
    for x in (q, k, v, beta, g, initial_state):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    q_, k_, v_, beta_ = q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta.to(dtype)
    B, T, H, K = q.shape
    state = v_.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = [v_[:, :0]]
    gates = [None] * T if g is None else g.to(dtype).unbind(1)
    tokens = zip(*(x.unbind(1) for x in (q_, k_, v_, beta_)), gates, strict=True)  # unbind: a gradient linear in T
    for q_t, k_t, v_t, beta_t, g_t in tokens:
        if g_t is not None:
            state = torch.exp(g_t)[..., None, None] * state
        key, strength = k_t[..., None], beta_t[..., None, None]
        read = (key * state).sum(dim=2, keepdim=True)
        state = state - strength * key * read + strength * key * v_t[..., None, :]
        outputs.append((q_t[..., None] * state).sum(dim=2)[:, None])
    return torch.cat(outputs, dim=1).to(v.dtype), state
