"""Gated linear attention over a sequence that is split across ranks: the twins of `kernels.gla` and `kernels.simple_gla`.

What a rank's tokens do to the state is the map S -> exp(l) S + E: their summed log gates, and the state after them from zero.
A first pass over k, v and g alone finds both, at KV multiplications a token and head; then the maps are scanned; then the
kernel runs once, with the state that comes in. The backward is the same the other way: a pass over q and the gradient of the
outputs finds F, what flows through them to that state, again KV; G, the gradient of the state after this rank, is scanned;
then the kernel's backward runs once, with G as the gradient of its final state, and gives the whole gradient of q, k, v and g.

The kernel itself takes 2 KV + C (K + V) / 2 for chunks of C <= 64, and 5 KV and more in the backward. Of the ways this adds
least. The kernel with a zero state and a correction of its outputs adds KV forward and 2 KV backward (if the exchange is to be
hidden, 2 KV and 4 KV), and rounds half-precision outputs twice; to differentiate through the first pass adds KV and 2 KV.

Documents: the map of a rank in which one begins does not depend on what comes in (l = -inf); its E is what the last one leaves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.checks import check_bounds
from seqengine.kernels.linear_attention.op import Backend, NormalizedState
from seqengine.parallel import cost
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.documents import Documents, documents_of
from seqengine.parallel.exchange.relayout import on_contiguous
from seqengine.parallel.exchange.scan import Algorithm
from seqengine.parallel.layout import split_sizes
from seqengine.parallel.linear_attention_exchange import Exchange, Part, Tokens

TOKENS = {"q": 1, "k": 1, "v": 1, "g": 1}
"""Arguments with a token dim."""


@breaks_graph
@on_contiguous(TOKENS, output=1, documents=True)
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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
    """`kernels.gla` of the joined sequence, on this rank's part.

    Local in:  q, k, g [B, T, H, K], v [B, T, H, V], T = ctx.local_tokens; initial_state [B, H, K, V], the state before the
               global first token, the same on all ranks. With cu_seqlens [M + 1], B is 1: the boundaries in the joined
               sequence, the same on all ranks, wherever the ranks cut it; initial_state is [M, H, K, V], one a document.
               None: ctx.documents, if it has some.
    Local out: (o [B, T, H, V], final state or None). join(o) == kernels.gla(join(q), ...); the final state is the one after
               the global last token, or after each document, the same on every rank.
    Traffic:   a `scan` of B * H * (K V + K) numbers, whatever T is, and in the backward of B * H * K V (+ K but for gather).
               With cu_seqlens also the final states from where documents end to all, and the gradients of the initial ones
               from where they begin: `cost.gla_bytes`, `cost.gla_backward_bytes`. algorithm and node_size as in `scan`.
               A zigzag context: q, k, v, g to contiguous parts and o back by `relayout`, `cost.relayout_bytes` more.
    Overlap:   with head_groups > 1 the exchange of a group runs while another is computed, forward and backward; that costs a
               copy of o and of the gradients. None: `cost.modal_conv_groups`.
    Memory:    as the kernel, and the state that comes in. cu_seqlens is read on the host.
    Gradients: of q, k, v and g local and complete. initial_state and the final state count once: see `scan`. A second
               derivative raises RuntimeError if P > 1.
    Order:     every rank must call, and must run the backward. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes or dtypes do not fit, before any message.
    """
    cu_seqlens = documents_of("gla", cu_seqlens, ctx, q.device)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "backend": backend}
    if ctx.size == 1:
        return kernels.gla(
            q,
            k,
            v,
            g,
            initial_state=initial_state,
            output_final_state=output_final_state,
            **options,  # type: ignore[arg-type]
        )
    nothing = [_no_token(x) for x in (q, k, v, g)]
    options["cu_seqlens"] = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
    _, state = kernels.gla(*nothing, initial_state=initial_state, output_final_state=True, **options)  # type: ignore[arg-type]
    assert state is not None
    factor = q.shape[3] ** -0.5 if scale is None else scale
    call = _Call("gla", factor, backend, algorithm, node_size, head_groups)
    return call(Tokens(q, k, v, g), state, initial_state is None, output_final_state, cu_seqlens, ctx)


@breaks_graph
@on_contiguous(TOKENS, output=1, documents=True)
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    ctx: SequenceContext,
    scale: float | None = None,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    node_size: int | None = None,
    head_groups: int | None = None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """`kernels.simple_gla` of the joined sequence, on this rank's part.

    Local in:  as in `gla`, with g [B, T, H], or [H] the same on all ranks, or None; with normalize the states are pairs
               (S [B, H, K, V], z [B, H, K]), or with cu_seqlens one for each document.
    Local out: as in `gla`.
    Traffic:   as in `gla`, of B * H * (K V + 1) numbers, or B * H * K V where g is [H] or None without cu_seqlens; V counts one
               more with normalize.
    Gradients: as in `gla`; of g [H] this rank's partial sum.
    Overlap, Memory, Order, Raises: as in `gla`.
    """
    cu_seqlens = documents_of("simple_gla", cu_seqlens, ctx, q.device)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "normalize": normalize, "backend": backend}
    if ctx.size == 1:
        return kernels.simple_gla(
            q,
            k,
            v,
            g,
            initial_state=initial_state,
            output_final_state=output_final_state,
            **options,  # type: ignore[arg-type]
        )
    x_q, x_k, x_v = (_no_token(x) for x in (q, k, v))
    x_g = None if g is None else _no_token(g)
    options["cu_seqlens"] = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
    _, before = kernels.simple_gla(
        x_q,
        x_k,
        x_v,
        x_g,
        initial_state=initial_state,
        output_final_state=True,
        **options,  # type: ignore[arg-type]
    )
    factor, tokens = q.shape[3] ** -0.5 if scale is None else scale, Tokens(q, k, v, g)
    if isinstance(before, tuple):  # z is the state of one more value, which is always 1
        state = torch.cat([before[0], before[1].unsqueeze(-1)], dim=-1)
        factor, tokens = 1.0, tokens._replace(v=torch.cat([v.to(state.dtype), torch.ones_like(v[..., :1])], dim=-1))
    else:
        assert before is not None
        state = before
    call = _Call("simple_gla", factor, backend, algorithm, node_size, head_groups)
    o, final = call(tokens, state, initial_state is None, output_final_state, cu_seqlens, ctx)
    if not normalize:
        return o, final
    pair = None if final is None else (final[..., :-1], final[..., -1])
    return (o[..., :-1] / o[..., -1:]).to(v.dtype), pair


def _no_token(x: Tensor) -> Tensor:
    """x without its tokens: what the kernel needs to check the rest."""
    return x[:, :0] if x.ndim >= 2 else x


@dataclass(frozen=True)
class _Call:
    """A twin with its options."""

    name: str
    scale: float
    backend: Backend
    algorithm: Algorithm
    node_size: int | None
    head_groups: int | None

    def __call__(
        self,
        tokens: Tokens,
        state: Tensor,
        is_zero: bool,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        ctx: SequenceContext,
    ) -> tuple[Tensor, Tensor | None]:
        """state: the initial ones, in the dtype of states. Nothing is sent before every check is done."""
        for x in tokens:
            if x is not None and x.ndim >= 3:
                ctx.check_local(self.name, x, 1)
        documents = None
        if cu_seqlens is not None:
            documents = Documents.of(check_bounds(self.name, cu_seqlens, ctx.total_tokens), ctx)
        sizes = split_sizes(tokens.q.shape[2], self._groups(tokens.v, state, documents, ctx))
        if state.numel() == 0:
            return _nothing(tokens), state if output_final_state else None
        rows = None if documents is None else documents.before(state, is_zero, ctx)
        part = Part.of(documents, ctx.local_tokens, self.scale, self.backend, tokens.q.device)
        if rows is not None and tokens.g is not None and tokens.g.ndim == 1:
            tokens = tokens._replace(g=tokens.g.expand(tokens.q.shape[:3]))
        none: list[Tensor | None] = [None] * len(sizes)
        initial = none if rows is not None or is_zero else state.split(sizes, dim=1)
        rows_of = none if rows is None else rows.split(sizes, dim=1)
        exchanges = []
        for group, before, begun in zip(tokens.heads(sizes), initial, rows_of, strict=True):
            exchanges.append(Exchange(part, group, begun, state.dtype))
            exchanges[-1].start(before, output_final_state and rows is None, self.algorithm, self.node_size, ctx)
        finished = [exchange.finish() for exchange in exchanges]
        o = _join_heads([x for x, _ in finished], 2)
        if not output_final_state:
            return o, None
        final = _join_heads([x for _, x in finished if x is not None], 1)
        return o, final if documents is None else documents.after(final, state, ctx)

    def _groups(self, v: Tensor, state: Tensor, documents: Documents | None, ctx: SequenceContext) -> int:
        groups, H = self.head_groups, v.shape[2]
        if groups is None:
            numbers = v.shape[0] * H * v.shape[3] * (ctx.total_tokens // ctx.size)  # of the mean rank: all must agree
            state_bytes = state.nbytes if documents is None else state.nbytes // documents.count
            shard_bytes = numbers * v.element_size()
            groups = cost.modal_conv_groups(ctx.size, state_bytes, shard_bytes, v.device.type, self.node_size)
            return max(1, min(groups, H))
        if not 1 <= groups <= max(1, H):
            raise ValueError(f"{self.name}: head_groups must be from 1 to H = {H}; got {groups}.")
        return groups


def _nothing(x: Tokens) -> Tensor:
    """An output without elements that still depends on every argument."""
    o = x.v.clone()
    for t in (x.q, x.k, x.g):
        if t is not None:
            o = o + (t.nan_to_num().sum() * 0).to(o.dtype)
    return o


def _join_heads(groups: list[Tensor], dim: int) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups, dim=dim)
