"""Gated linear attention as its definition says, token by token; differentiated by torch."""

import torch
from torch import Tensor


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t: q, k, g [B, T, H, K], v [B, T, H, V], state [B, H, K, V].

    Arithmetic and state in float64 if any argument is, else in float32; o in v.dtype.
    """
    dtype = torch.float32
    for x in (q, k, v, g, initial_state):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    B, _, H, K = q.shape
    state = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    tokens = zip(*(x.to(dtype).unbind(1) for x in (q, k, v, g)), strict=True)  # unbind: a gradient linear in T
    outputs = [v[:, :0].to(dtype)]
    for q_t, k_t, v_t, g_t in tokens:
        state = torch.exp(g_t)[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None] * state).sum(dim=2)[:, None])
    return torch.cat(outputs, dim=1).to(v.dtype), state


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same with one gate a head: g [B, T, H], a fixed log decay [H], or None for no decay."""
    gates = q.new_zeros(()) if g is None else g[..., None]
    return gla(q, k, v, gates.expand(q.shape), scale, initial_state)
