"""Ring Self-Attention as published, to compare with: scores over one ring, softmax of whole rows, values over another.

    S_r = scale Q_r [K_0 .. K_{P-1}]^T      P_r = softmax(S_r)      O_r = sum_j P_rj V_j

Each rank holds whole rows of scores, T of its tokens by all; `parallel.attention` holds none. Its sparse form projects the
tokens of keys and values to a fixed number of rows (Linformer), which sum over the ranks: then rows are short, and nothing
goes round.

References: Li et al. 2021, arXiv:2105.13120; Wang et al. 2020, arXiv:2006.04768.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.ring import Blocks, Route, return_ring, visit_ring
from seqengine.parallel.layout import offsets


def ring_self_attention(
    q: Tensor, k: Tensor, v: Tensor, *, ctx: SequenceContext, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention of the joined sequence, on this rank's part, with whole rows of scores.

    Local in:  q, k [B, T, H, K], v [B, T, H, V], T = ctx.local_tokens. Local out: [B, T, H, V].
    Dtypes:    float64, float32, bfloat16 or float16, and the arithmetic too. scale defaults to K ** -0.5.
    Traffic:   k over a ring, then v: `cost.ring_bytes` with a row of both, whether causal or not; the backward each once more
               and their gradients, `cost.ring_backward_bytes`. (As published dK and dV are all-reduced whole: twice that.)
    Memory:    the scores and their softmax, B H T times all tokens, saved for the backward.
    Gradients: local, exact. Of second derivatives none if P > 1 (RuntimeError).
    Order:     every rank must call, and must run the backward; checks come before any message.
    Raises:    ValueError if shapes or dtypes do not fit.
    References: Li et al. 2021, arXiv:2105.13120.
    """
    _check("ring_self_attention", q, k, v, ctx)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    route = Route.of(range(ctx.size), ctx.sizes, None)
    scores: Tensor = _Scores.apply(q * factor, k, route, ctx)  # type: ignore[no-untyped-call]
    if causal:
        everyone = torch.cat([torch.arange(a, b, device=q.device) for held in ctx.parts for a, b in held])
        scores = scores.masked_fill(everyone > ctx.positions(q.device)[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    out: Tensor = _Values.apply(weights, v, route, ctx)  # type: ignore[no-untyped-call]
    return out


def linformer_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    project_k: Tensor,
    project_v: Tensor,
    *,
    ctx: SequenceContext,
    scale: float | None = None,
) -> Tensor:
    """out = softmax(scale q (E k)^T) (F v), with E and F over all tokens: the sparse form of Ring Self-Attention.

    Local in:  q, k, v as in `ring_self_attention`; project_k, project_v [R, T]: this rank's columns of E and F. Not causal.
    Local out: [B, T, H, V]; every query sees R projected keys.
    Traffic:   one all-reduce of B R H (K + V) elements, and one in the backward: the same for any number of tokens.
    Memory:    scores B H T R.
    Gradients: local, exact, those of the projections for this rank's columns.
    Order:     every rank must call, and must run the backward; checks come before any message.
    Raises:    ValueError if shapes or dtypes do not fit.
    References: Wang et al. 2020, arXiv:2006.04768; Li et al. 2021, arXiv:2105.13120.
    """
    name = "linformer_self_attention"
    _check(name, q, k, v, ctx)
    check(name, project_k.ndim == 2, "project_k must be [R, T]", project_k.shape)
    for what, x in (("project_k", project_k), ("project_v", project_v)):
        check_shape(name, what, x, "[R, T]", project_k.shape[0], ctx.local_tokens)
        check(name, x.dtype == q.dtype, "{} must have q's dtype {}", x.dtype, what, q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    parts = [torch.einsum("rt,bthk->brhk", e, x) for e, x in ((project_k, k), (project_v, v))]
    whole = torch.cat(parts, dim=-1)
    if ctx.size > 1:
        whole = _Sum.apply(whole, ctx)  # type: ignore[no-untyped-call]
    keys, values = whole.split([k.shape[-1], v.shape[-1]], dim=-1)
    weights = torch.softmax(torch.einsum("bthk,brhk->bhtr", q * factor, keys), dim=-1)
    return torch.einsum("bhtr,brhv->bthv", weights, values)


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext) -> None:
    for what, x in (("q", q), ("k", k), ("v", v)):
        check(name, x.ndim == 4, "{} must be [B, T, H, *]", x.shape, what)
        ctx.check_local(name, x, 1)
        check(name, x.dtype == q.dtype, "{} must have q's dtype {}", x.dtype, what, q.dtype)
    check_floats(name, q=q, k=k, v=v)
    check_shape(name, "k", k, "[B, T, H, K]", *q.shape)
    check_shape(name, "v", v, "[B, T, H, V]", *q.shape[:3], v.shape[3])


class _Scores(torch.autograd.Function):
    """q [B, T, H, K] and the ring of k -> [B, H, T, all tokens]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, route: Route, context: SequenceContext) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.how = (route, context)
        (B, T, H, _), columns = q.shape, offsets(context.sizes)
        scores = torch.empty(B, H, T, context.total_tokens, dtype=q.dtype, device=q.device)

        def visit(source: int, blocks: Blocks) -> None:
            scores[..., columns[source] : columns[source + 1]] = torch.einsum("bthk,bshk->bhts", q, blocks[0])

        visit_ring(visit, (k,), route=route, ctx=context, dim=1)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        (q, k), (route, context) = ctx.saved_tensors, ctx.how
        dq, columns = torch.zeros_like(q), offsets(context.sizes)

        def visit(source: int, blocks: Blocks | None) -> list[Tensor]:
            assert blocks is not None
            own = d_scores[..., columns[source] : columns[source + 1]]
            dq.add_(torch.einsum("bhts,bshk->bthk", own, blocks[0]))
            return [torch.einsum("bhts,bthk->bshk", own, q)]

        (dk,) = return_ring(visit, (k,), route=route, ctx=context, dim=1, dtype=k.dtype)
        return dq, dk, None, None


class _Values(torch.autograd.Function):
    """Weights [B, H, T, all tokens] and the ring of v -> [B, T, H, V]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, route: Route, context: SequenceContext) -> Tensor:
        ctx.save_for_backward(weights, v)
        ctx.how = (route, context)
        B, H, T, _ = weights.shape
        columns, out = offsets(context.sizes), torch.zeros(B, T, H, v.shape[-1], dtype=v.dtype, device=v.device)

        def visit(source: int, blocks: Blocks) -> None:
            own = weights[..., columns[source] : columns[source + 1]]
            out.add_(torch.einsum("bhts,bshv->bthv", own, blocks[0]))

        visit_ring(visit, (v,), route=route, ctx=context, dim=1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (weights, v), (route, context) = ctx.saved_tensors, ctx.how
        d_weights, bounds = torch.empty_like(weights), offsets(context.sizes)

        def visit(source: int, blocks: Blocks | None) -> list[Tensor]:
            assert blocks is not None
            columns = slice(bounds[source], bounds[source + 1])
            d_weights[..., columns] = torch.einsum("bthv,bshv->bhts", dout, blocks[0])
            return [torch.einsum("bhts,bthv->bshv", weights[..., columns], dout)]

        (dv,) = return_ring(visit, (v,), route=route, ctx=context, dim=1, dtype=v.dtype)
        return d_weights, dv, None, None


class _Sum(torch.autograd.Function):
    """The sum over ranks, each of which goes on with it by itself: so its gradients sum as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceContext) -> Tensor:
        ctx.context = context
        return comm.all_reduce_sum(x.clone(), context.require_group(), context.ledger())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total = comm.all_reduce_sum(gradient.clone(), ctx.context.require_group(), ctx.context.ledger())
        return total, None
