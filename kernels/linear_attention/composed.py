"""Gated linear attention by chunks in differentiable operations: what second and higher derivatives are taken of.

The same maths as `chunked`, nothing in place, so that torch can differentiate it as often as asked. Torch keeps every
intermediate of it: about 30 T (K + V) numbers a head. First derivatives never come here.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.linear_attention.chunked import compute_dtype
from seqengine.kernels.linear_attention.dyadic import levels
from seqengine.kernels.linear_attention.layout import LONGEST_CHUNK, power_of_two


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial: Tensor | None, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o, final states): q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K], [B, T, H], [H] or None, T >= 1."""
    gates = q.new_zeros(()) if g is None else g if g.ndim == 4 else g[..., None]
    if bounds is None:
        return _rows(q, k, v, gates, scale, initial)
    ends = bounds.tolist()
    outputs, states = [v[:, :0]], []
    for n, (start, stop) in enumerate(itertools.pairwise(ends)):
        before = None if initial is None else initial[n : n + 1]
        b_q, b_k, b_v, b_g = (x[:, start:stop] for x in (q, k, v, gates.expand(q.shape)))
        o, state = _rows(b_q, b_k, b_v, b_g, scale, before)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _split(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The first and the second halves [..., C / 2h, h, K] of the blocks of [..., C, K]."""
    first, second = x.unflatten(-2, (-1, 2, h)).unbind(-3)
    return first, second


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=-3).flatten(-4, -2)


def _rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, k, v, g, initial)
    B, T, H, K = q.shape
    chunk = min(LONGEST_CHUNK, power_of_two(max(1, T)))
    missing = -T % chunk

    def tile(x: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, H, n, C, K]."""
        padded = F.pad(x.to(dtype), (0, 0, 0, 0, 0, missing))
        return padded.reshape(B, -1, chunk, H, x.shape[-1]).permute(0, 3, 1, 2, 4)

    state = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial is None else initial.to(dtype)
    if T == 0:
        return v, state
    t_q, t_k, t_v = tile(q) * scale, tile(k), tile(v)
    into = torch.exp(tile(g.expand(q.shape)))
    out = torch.ones_like(into)
    o = (t_q * t_k).sum(dim=-1, keepdim=True) * t_v
    for h in levels(chunk):
        (i_first, i_second), (o_first, o_second) = _split(into, h), _split(out, h)
        y, after = _split(o, h)
        scores = (_split(t_q, h)[1] * i_second) @ (_split(t_k, h)[0] * o_first).mT
        o = _join(y, after + scores @ _split(t_v, h)[0])
        out = _join(o_first * i_second[..., -1:, :], o_second)
        into = _join(i_first, i_second * i_first[..., -1:, :])
    decay, t_q, t_k = into[..., -1, :, None], t_q * into, t_k * out
    through = []
    for c in range(t_q.shape[2]):
        through.append(t_q[:, :, c] @ state)
        state = decay[:, :, c] * state + t_k[:, :, c].mT @ t_v[:, :, c]
    o = (o + torch.stack(through, dim=2)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
    return o.to(v.dtype), state
