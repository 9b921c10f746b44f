"""The delta rule over a sequence that is split across ranks: the twin of `seqengine.kernels.api.delta_rule`.

What a rank's tokens do to the state is the map S -> A S + b of `delta_summary`, with a full matrix A [K, K] a head: products
of I - beta k k^T are not diagonal. So a rank sends A beside b, and A^T in the backward. First the map is found, by a run
without queries over V + K columns; then the states are scanned; then the kernel runs once, with the state that comes in.

Documents: the map of a rank in which one begins does not depend on what comes in (A = 0); its b is what the last one leaves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.checks import check, check_bounds
from seqengine.kernels.delta_rule.op import Backend
from seqengine.parallel import cost
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.documents import Documents, documents_of
from seqengine.parallel.exchange.relayout import on_contiguous
from seqengine.parallel.exchange.scan import Algorithm, PendingScan, start_scan
from seqengine.parallel.layout import split_sizes
from seqengine.parallel.linear_attention_exchange import Part
from seqengine.parallel.summary import Dense, Summary

NAME = "delta_rule"


@breaks_graph
@on_contiguous({"q": 1, "k": 1, "v": 1, "beta": 1, "g": 1}, output=1, documents=True)
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
    head_groups: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.delta_rule` of the joined sequence, on this rank's part.

    Local in:  q, k [B, T, H, K], v [B, T, H, V], beta, g [B, T, H], T = ctx.local_tokens; initial_state [B, H, K, V], the state
               before the global first token, the same on all ranks. With cu_seqlens [M + 1], B is 1: the boundaries in the
               joined sequence, the same on all ranks, wherever the ranks cut it; initial_state is [M, H, K, V], one a document.
               None: ctx.documents, if it has some.
    Local out: (o [B, T, H, V], final state or None). join(o) == kernels.delta_rule(join(q), ...); the final state is the one
               after the global last token, or after each document, the same on every rank.
    Dtypes:    as the kernel. Summaries are found, sent and folded in the dtype of states, in a forward under autocast too.
    Traffic:   a `scan` whose state has B * H * K * V numbers and whose transition has B * H * K * K, whatever T is. With
               cu_seqlens also the final states from where documents end to all, and the gradients of the initial ones from
               where they begin: `cost.gla_bytes`, and `cost.gla_backward_bytes` with initial_gradient if initial_state requires
               a gradient. algorithm and node_size as in `scan`; serial sends no transition. A zigzag context: q, k, v, beta, g
               to contiguous parts and o back by `relayout`, `cost.relayout_bytes` more.
    Overlap:   with head_groups > 1 the exchange of a group runs while the summary or the outputs of another are computed,
               forward and backward; that costs a copy of o and of the gradients. None: `cost.modal_conv_groups`.
    Memory:    as the kernel and `delta_summary`, whose saved states are V + K columns wide; A and the state that comes in.
               cu_seqlens is read on the host.
    Gradients: of q, k, v, beta and g local. initial_state and the final state count once: see `scan`. A second derivative
               through the states raises RuntimeError if P > 1.
    Backend:   of the kernel; the summary is by chunks whatever it is.
    Order:     every rank must call, and must run the backward. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes or dtypes do not fit, before any message.
    References: Yang et al. 2024, arXiv:2406.06484; Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464.
    """
    cu_seqlens = documents_of(NAME, cu_seqlens, ctx, q.device)
    tokens = _Tokens(q, k, v, beta, g)
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if ctx.size == 1:
        states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernels.delta_rule(q, k, v, beta, g, cu_seqlens=cu_seqlens, **states, **options)
    state = _checked_state(tokens, initial_state, cu_seqlens, backend, ctx)
    documents = None
    if cu_seqlens is not None:
        documents = Documents.of(check_bounds(NAME, cu_seqlens, ctx.total_tokens), ctx)
    sizes = split_sizes(q.shape[2], _groups(head_groups, v, k, state, documents, node_size, ctx))
    part = Part.of(documents, ctx.local_tokens, 1.0, "auto", q.device)
    rows = None if documents is None else documents.before(state, initial_state is None, ctx)
    initial = state if initial_state is not None and documents is None else None
    is_final = output_final_state and documents is None
    parts = _split(tokens, rows, initial, sizes)
    pending = [
        _start(x, part, own_rows, first, state.dtype, is_final, algorithm, node_size, ctx)
        for x, own_rows, first in parts
    ]
    outputs, finals = [], []
    for (x, own_rows, _), exchange in zip(parts, pending, strict=True):
        before, final = exchange.finish()
        o, ended = _outputs(x, part, before, own_rows, options)
        outputs.append(o)
        finals.append(final if documents is None else ended)
    o = _join(outputs, 2)
    if not output_final_state:
        return o, None
    found = _join([x for x in finals if x is not None], 1)
    return o, found if documents is None else documents.after(found, state, ctx)


class _Tokens(NamedTuple):
    """What the tokens of a rank, or some of their heads, bring."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


_Group = tuple[_Tokens, Tensor | None, Tensor | None]
"""Of some heads: tokens, the initial states of documents that begin here, the state before the sequence."""


def _split(tokens: _Tokens, rows: Tensor | None, initial: Tensor | None, sizes: list[int]) -> list[_Group]:
    """Groups of so many heads."""
    if len(sizes) == 1:  # the gradient of a split is a copy
        return [(tokens, rows, initial)]
    columns: list[Any] = [[None] * len(sizes) if x is None else x.split(sizes, dim=2) for x in tokens]
    columns += [[None] * len(sizes) if x is None else x.split(sizes, dim=1) for x in (rows, initial)]
    return [(_Tokens(*group[:5]), group[5], group[6]) for group in zip(*columns, strict=True)]


def _groups(
    head_groups: int | None,
    v: Tensor,
    k: Tensor,
    state: Tensor,
    documents: Documents | None,
    node_size: int | None,
    ctx: SequenceContext,
) -> int:
    H = v.shape[2]
    if head_groups is None:
        numbers = v.shape[0] * H * v.shape[3] * (ctx.total_tokens // ctx.size)  # of the mean rank: all must agree
        state_bytes = state.nbytes if documents is None else state.nbytes // documents.count
        both = state_bytes * (v.shape[3] + k.shape[3]) // v.shape[3]
        groups = cost.modal_conv_groups(ctx.size, both, numbers * v.element_size(), v.device.type, node_size)
        return max(1, min(groups, H))
    check(NAME, 1 <= head_groups <= max(1, H), "head_groups must be from 1 to H = {}", head_groups, H)
    return head_groups


def _start(
    tokens: _Tokens,
    part: Part,
    rows: Tensor | None,
    initial: Tensor | None,
    dtype: torch.dtype,
    output_final: bool,
    algorithm: Algorithm,
    node_size: int | None,
    ctx: SequenceContext,
) -> PendingScan:
    """Finds this rank's map and sends it."""
    k, v, beta = (x[:, part.leaving :] for x in (tokens.k, tokens.v, tokens.beta))
    g = None if tokens.g is None else tokens.g[:, part.leaving :]
    with torch.autocast(k.device.type, enabled=False):  # products of transitions would be rounded
        transition, state = kernels.delta_summary(k, v.to(dtype), beta, g)
        if rows is not None and not part.passes:
            if part.leaving < part.tokens:  # the last document began here
                state = state + transition @ rows[-1:]
            transition = torch.zeros_like(transition)
        return start_scan(
            Summary(Dense(transition), state),
            ctx=ctx,
            initial=initial,
            algorithm=algorithm,
            output_final=output_final,
            node_size=node_size,
        )


def _outputs(
    tokens: _Tokens, part: Part, before: Tensor, rows: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """(o, the states after the documents that end here), by the kernel with the states that come in.

    Both depend on all states, used or not, for this rank's backward has to take part.
    """
    q, k, v, beta, g = tokens
    if rows is None:
        o, _ = kernels.delta_rule(q, k, v, beta, g, initial_state=before, **options)
        return (o if o.numel() > 0 else _after(o, before)), None
    states = torch.cat([before, rows]) if part.entering > 0 else rows
    if part.tokens == 0:
        o, _ = kernels.delta_rule(q, k, v, beta, g, **options)
        return _after(o, before, rows), _after(states, before, rows)
    bounds: dict[str, Any] = {"cu_seqlens": part.bounds, "output_final_state": True}
    o, after = kernels.delta_rule(q, k, v, beta, g, initial_state=states, **bounds, **options)
    assert after is not None
    return _after(o, before, rows), _after(after[: part.ends], before, rows)


def _after(x: Tensor, *others: Tensor) -> Tensor:
    """x, with a gradient of zero for others: their nodes run in the backward."""
    found: Tensor = _After.apply(x, *others)  # type: ignore[no-untyped-call]
    return found


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


def _join(groups: list[Tensor], dim: int) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups, dim=dim)


def _checked_state(
    tokens: _Tokens, initial_state: Tensor | None, cu_seqlens: Tensor | None, backend: Backend, ctx: SequenceContext
) -> Tensor:
    """The initial states, in the dtype of states; ValueError if arguments do not fit. The kernel checks them, on no token."""
    nothing: list[Any] = [None if x is None else x[:, :0] if x.ndim > 1 else x for x in tokens]
    _, state = kernels.delta_rule(
        *nothing,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else torch.zeros_like(cu_seqlens),
        backend=backend,
    )
    for x in tokens:
        if x is not None:
            ctx.check_local(NAME, x, 1)
    assert state is not None
    return state
