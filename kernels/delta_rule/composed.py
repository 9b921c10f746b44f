"""The delta rule by chunks in differentiable operations: what second and higher derivatives are taken of.

The same maths as `tile`, nothing in place, so that torch can differentiate it as often as asked. Torch keeps every intermediate
of it. First derivatives never come here.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.delta_rule.chunked import Arguments, dtype_of, initial_states
from seqengine.kernels.linear_attention.layout import LONGEST_CHUNK, power_of_two


def delta_rule(a: Arguments) -> tuple[Tensor | None, Tensor]:
    """(o or None, final states)."""
    if a.bounds is None:
        return _rows(a)
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(a.bounds.tolist())):
        q, k, v, beta, g = (None if x is None else x[:, start:stop] for x in (a.q, a.k, a.v, a.beta, a.g))
        assert k is not None
        assert v is not None
        assert beta is not None
        initial = None if a.initial is None else a.initial[n : n + 1]
        o, state = _rows(Arguments(q, k, v, beta, g, a.scale, initial, None))
        outputs.append(o)
        states.append(state)
    given = [o for o in outputs if o is not None]
    return torch.cat(given, dim=1) if given else None, torch.cat(states)


def _tiles(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [B, H, n, C, K]."""
    B, T, H, K = x.shape
    padded = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -T % chunk))
    return padded.reshape(B, -1, chunk, H, K).permute(0, 3, 1, 2, 4)


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """into, out [.., C, 1] and between [.., C, C] of log gates [.., C, 1], each exponent a sum over its own gates."""
    C = g.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    log = g.expand(*g.shape[:-1], C).masked_fill(~later, 0.0).cumsum(-2)
    between = torch.exp(log).masked_fill(later.mT, 0.0)
    return torch.exp(g.cumsum(-2)), torch.exp(log[..., -1, :]).unsqueeze(-1), between


def _rows(a: Arguments) -> tuple[Tensor | None, Tensor]:
    T, dtype = a.k.shape[1], dtype_of(a)
    state = initial_states(a).to(dtype)
    if T == 0:
        return None if a.q is None else a.v, state
    chunk = min(LONGEST_CHUNK, power_of_two(T))
    k, v, beta = (_tiles(x, chunk, dtype) for x in (a.k, a.v, a.beta[..., None]))
    into, out, between = _decays(torch.zeros_like(beta) if a.g is None else _tiles(a.g[..., None], chunk, dtype))
    system = ((k @ k.mT) * between).tril(-1) * beta.mT
    system = system + torch.eye(chunk, dtype=dtype, device=k.device)
    errors, reads = (torch.linalg.solve_triangular(system, x, upper=False) for x in (v, k * into))
    writes, decay = k * (beta * out), into[..., -1:, :]
    before, found = [], []
    for c in range(k.shape[2]):
        before.append(state)
        found.append(errors[:, :, c] - reads[:, :, c] @ state)
        state = decay[:, :, c] * state + writes[:, :, c].mT @ found[-1]
    if a.q is None:
        return None, state
    q = _tiles(a.q, chunk, dtype) * a.scale
    o = (q * into) @ torch.stack(before, dim=2) + ((q @ k.mT) * between) @ (beta * torch.stack(found, dim=2))
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(a.v.dtype), state
