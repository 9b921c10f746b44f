"""The delta rule over a sequence that is split across ranks: the twin of `seqengine.kernels.api.delta_rule`.

What a rank's tokens do to the state is the map S -> A S + b of `delta_summary`, with a full matrix A [K, K] a head: products
of I - beta k k^T are not diagonal. So a rank sends A beside b, and A^T in the backward. First the map is found, by a run
without queries over V + K columns; then the states are scanned; then the kernel runs once, with the state that comes in.
"""

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.checks import check
from seqengine.kernels.delta_rule.op import Backend
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.scan import Algorithm, scan
from seqengine.parallel.summary import Dense, Summary

NAME = "delta_rule"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    ctx: SequenceContext,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    node_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.delta_rule` of the joined sequence, on this rank's part.

    Local in:  q, k [B, T, H, K], v [B, T, H, V], beta, g [B, T, H], T = ctx.local_tokens; initial_state [B, H, K, V], the state
               before the global first token, the same on all ranks.
    Local out: (o [B, T, H, V], final state or None). join(o) == kernels.delta_rule(join(q), ...); the final state is the one
               after the global last token, the same on every rank.
    Dtypes:    as the kernel. Summaries are found, sent and folded in the dtype of states, in a forward under autocast too.
    Traffic:   a `scan` whose state has B * H * K * V numbers and whose transition has B * H * K * K, whatever T is:
               `cost.scan_bytes`, and `cost.scan_backward_bytes` with initial_gradient if initial_state requires a gradient.
               algorithm and node_size as in `scan`; serial sends no transition.
    Packed:    cu_seqlens on one rank only. On more, where no initial or final states of documents are asked for, a g of -inf at
               the first token of each document is the same.
    Memory:    as the kernel and `delta_summary`, whose saved states are V + K columns wide; A and the state that comes in.
    Gradients: of q, k, v, beta and g local. initial_state and the final state count once: see `scan`. A second derivative
               through the states raises RuntimeError if P > 1.
    Backend:   of the kernel; the summary is by chunks whatever it is.
    Order:     every rank must call, and must run the backward. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes or dtypes do not fit, or for cu_seqlens if P > 1, before any message.
    References: Yang et al. 2024, arXiv:2406.06484; Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464.
    """
    if ctx.size == 1:
        return kernels.delta_rule(
            q,
            k,
            v,
            beta,
            g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
    must = "cu_seqlens must be None over several ranks; set g to -inf at each document's first token, or use one rank"
    check(NAME, cu_seqlens is None, must, f"cu_seqlens over {ctx.size} ranks")
    state = _checked_state(q, k, v, beta, g, initial_state, backend, ctx)
    with torch.autocast(q.device.type, enabled=False):  # products of transitions would be rounded
        transition, local = kernels.delta_summary(k, v.to(state.dtype), beta, g)
        before, final = scan(
            Summary(Dense(transition), local),
            ctx=ctx,
            initial=None if initial_state is None else state,
            algorithm=algorithm,
            output_final=output_final_state,
            node_size=node_size,
        )
    o, _ = kernels.delta_rule(q, k, v, beta, g, scale=scale, initial_state=before, backend=backend)
    if o.numel() == 0:  # without tokens o does not depend on the state, but this rank's backward has to take part
        o = o + (before.sum() * 0).to(o.dtype)
    return o, final


def _checked_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    backend: Backend,
    ctx: SequenceContext,
) -> Tensor:
    """The initial state, in the dtype of states; ValueError if arguments do not fit. The kernel checks them, on no token."""
    b_q, b_k, b_v, b_beta = (_no_tokens(x) for x in (q, k, v, beta))
    _, state = kernels.delta_rule(
        b_q,
        b_k,
        b_v,
        b_beta,
        None if g is None else _no_tokens(g),
        initial_state=initial_state,
        output_final_state=True,
        backend=backend,
    )
    for x in (q, k, v, beta, g):
        if x is not None:
            ctx.check_local(NAME, x, 1)
    assert state is not None
    return state


def _no_tokens(x: Tensor) -> Tensor:
    return x[:, :0] if x.ndim > 1 else x
