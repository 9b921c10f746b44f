"""Softmax attention by definition: all scores, an explicit mask, differentiable by torch.

    s[t, j] = scale q_t . k_j,  -inf where t does not see j      lse_t = log sum_j exp(s[t, j])
    o_t = sum_j exp(s[t, j] - lse_t) v_j                         o_t = 0 and lse_t = -inf if t sees no key

With delta_t = o_t . do_t - dlse_t, p = exp(s - lse) and ds = p (do v^T - delta):

    dq = scale ds k      dk = scale ds^T q      dv = p^T do
"""

import math

import torch
from torch import Tensor


def arithmetic_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def visible(
    T: int, S: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """bool [T, S]: query t sees key s."""
    distance = torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    if cu_seqlens is not None:
        lengths = cu_seqlens.to(device).diff()
        document = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths, output_size=T)
        seen = seen & (document[:, None] == document)
    return seen


def _heads_first(q: Tensor, *grouped: Tensor) -> list[Tensor]:
    """[B, T, H, K] -> [B, H, T, K] in the dtype of the arithmetic; k and v repeated for the heads of their group."""
    dtype, H = arithmetic_dtype(q), q.shape[2]
    every = [q, *(x.repeat_interleave(H // x.shape[2], dim=2) for x in grouped)]
    return [x.to(dtype).transpose(1, 2) for x in every]


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K]; k [B, S, G, K]; v [B, S, G, V]. Returns (out [B, T, H, V], lse [B, H, T])."""
    Q, K, V = _heads_first(q, k, v)
    seen = visible(q.shape[1], k.shape[1], causal, window, cu_seqlens, q.device)
    blind = ~seen.any(dim=-1)
    scores = (scale * Q @ K.mT).masked_fill(~seen, -math.inf).masked_fill(blind[:, None], 0)
    out = (torch.softmax(scores, dim=-1) @ V).masked_fill(blind[:, None], 0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind, -math.inf)
    return out.transpose(1, 2).to(q.dtype), lse


def attention_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the formulas above, with out and lse as given; differentiable in every float argument."""
    Q, K, V = _heads_first(q, k, v)
    do, o = _heads_first(q, dout, out)[1:]
    seen = visible(q.shape[1], k.shape[1], causal, window, cu_seqlens, q.device)
    blind = lse == -math.inf
    finite = torch.where(blind, 0, lse)
    p = torch.exp((scale * Q @ K.mT - finite[..., None]).masked_fill(~seen | blind[..., None], -math.inf))
    delta = (o * do).sum(-1) if dlse is None else (o * do).sum(-1) - torch.where(blind, 0, dlse)
    ds = p * (do @ V.mT - delta[..., None])
    dq, dk, dv = scale * ds @ K, scale * ds.mT @ Q, p.mT @ do
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]
