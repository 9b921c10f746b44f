"""Softmax attention over a sequence that is split across ranks: the twin of `seqengine.kernels.api.attention`."""

from typing import Literal, get_args, overload

from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.attention.op import KNOWN, Backend, check_options, check_runs, check_tensors
from seqengine.kernels.checks import check, check_bounds
from seqengine.parallel import attention_cost as cost
from seqengine.parallel.attention_exchange import collect, distribute
from seqengine.parallel.attention_plan import Mask, Plan
from seqengine.parallel.attention_ring import Kernel, accumulation_dtype, ring_attention
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.documents import documents_of

Algorithm = Literal["auto", "ring", "ulysses", "gather", "ring_ulysses"]
"""ring: key blocks pass from rank to rank. ulysses: all-to-all, all tokens of some heads. gather: each rank gets all keys
that its queries see. ring_ulysses: ulysses within groups of consecutive ranks, rings across.
auto: see `attention_cost.algorithm`."""
PARTS = ("auto", "torch", "sdpa", "flash-attn")
"""Backends whose backward takes the log-sum-exp of all keys, as parts of the keys need it."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ctx: SequenceContext,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
    algorithm: Algorithm = ...,
    balance: bool | None = ...,
    head_ranks: int | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ctx: SequenceContext,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
    algorithm: Algorithm = ...,
    balance: bool | None = ...,
    head_ranks: int | None = ...,
) -> tuple[Tensor, Tensor]: ...


@breaks_graph
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ctx: SequenceContext,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    balance: bool | None = None,
    head_ranks: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kernels.attention` of the joined sequence, on this rank's part.

    Local in:  q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], T = ctx.local_tokens; as many keys as queries. cu_seqlens: the
               boundaries in the joined sequence, whole, the same on every rank (it is read on the host); None: those of
               ctx.documents, if it has some.
    Local out: out [B, T, H, V], or (out, lse [B, H, T]). join(out) == kernels.attention(join(q), join(k), join(v), ...).
    Traffic:   `attention_cost.attention_bytes` and `attention_backward_bytes`. gather: each key once to each rank that sees it;
               ring: each block along the ring as far as it is seen, once more in the backward, with gradients in float32;
               ulysses: q, k, v there and out back, keys of a group once to each rank that has heads of it. P may be more than
               G and than H, and need not divide them; ring_ulysses needs head_ranks to divide P, by default
               `attention_cost.widest_head_ranks`.
    Balance:   a ring of contiguous parts leaves the first ranks of causal attention idle. balance=True moves q, k, v to the
               zigzag order (chunks r and 2 P - 1 - r to rank r) and out back; None: where `attention_cost.should_balance`.
               In a zigzag context, q, k, v and out lie there already, and nothing moves for it.
    Memory:    ring: saves q, k, v, out, lse; two blocks at work, and their gradients in float32. gather: the keys seen.
    Exact to:  the kernel within 1e-12 relative in float64; below, parts are merged in float32. Deterministic for a given P and
               algorithm.
    Gradients: local, exact, for cotangents of out and lse. Of second derivatives none if P > 1 (RuntimeError).
    Backends:  ulysses: all. Else auto, torch, sdpa and flash-attn; auto is sdpa on a CPU for the parts that it can do, and
               torch for all others.
    Order:     every rank must call, and must run the backward, with or without lse alike; checks come before any message.
               With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes, dtypes, or options do not fit, or the backend cannot do this here.
    References: Liu et al. 2023, arXiv:2310.01889 (ring); Brandon et al. 2023, arXiv:2311.09431 (balance); Jacobs et al. 2023,
               arXiv:2309.14509 (ulysses); Fang and Zhao 2024, arXiv:2405.07719 (both); Grattafiori et al. 2024,
               arXiv:2407.21783 (gather).
    """
    name = "attention"
    check(name, algorithm in get_args(Algorithm), "algorithm must be one of {}", algorithm, get_args(Algorithm))
    check(name, backend in KNOWN, "backend must be one of {}", backend, ", ".join(map(repr, KNOWN)))
    check_tensors(name, q, k, v)
    for x in (q, k, v):
        ctx.check_local(name, x, 1)
    cu_seqlens = documents_of(name, cu_seqlens, ctx, q.device)
    check_options(name, q, k, causal, window, scale, cu_seqlens)
    _check_schedule(name, ctx.size, causal, algorithm, balance, head_ranks)
    if ctx.size == 1:
        return _on_one(q, k, v, causal, window, scale, cu_seqlens, return_lse, backend)
    if cu_seqlens is not None:
        check_bounds(name, cu_seqlens, ctx.total_tokens)
    mask = _mask(causal, window, cu_seqlens, ctx.total_tokens)
    sizes = _sizes(q, k, v)
    plan = cost.choose(ctx.cuts, ctx.rank, mask, sizes, q.device.type, algorithm, head_ranks, balance, ctx.layout)
    has_parts = plan.gathered or plan.route.size > 1
    must = "backend must be one of {} for the parts of a ring or of gathered keys"
    check(name, not has_parts or backend in PARTS, must, backend, ", ".join(map(repr, PARTS)))
    plain = mask.window is None and cu_seqlens is None
    whole_q, whole_k, whole_v = (_of_all_tokens(x, ctx.total_tokens) for x in (q, k, v))
    check_runs(name, backend, whole_q, whole_k, whole_v, plain, return_lse or has_parts)
    if not has_parts:
        q, k, v = distribute((q, k, v), cost.input_places(plan, q.shape[2], k.shape[2]), ctx)
        out, lse = _some_heads(q, k, v, causal, window, scale, cu_seqlens, return_lse, backend)
        return _bring_back(out, lse, plan, sizes.heads, ctx)
    kernel = Kernel(q.shape[-1] ** -0.5 if scale is None else float(scale), backend)
    if plan.gathered:
        k, v = distribute((k, v), cost.key_places(plan, k.shape[2]), ctx)
    elif plan.moved:
        q, k, v = distribute((q, k, v), cost.input_places(plan, q.shape[2], k.shape[2]), ctx)
    out, lse = ring_attention(q, k, v, plan, ctx, kernel)
    if plan.moved:
        return _bring_back(out, lse if return_lse else None, plan, sizes.heads, ctx)
    return (out, lse) if return_lse else out


def _check_schedule(
    name: str, ranks: int, causal: bool, algorithm: str, balance: bool | None, head_ranks: int | None
) -> None:
    check(name, balance in (None, True, False), "balance must be None or a bool", balance)
    has_ring = algorithm in ("ring", "ring_ulysses")
    check(name, not balance or (causal and has_ring), "balance=True is for a causal ring", (causal, algorithm))
    if head_ranks is not None:
        check(name, algorithm == "ring_ulysses", "head_ranks is for algorithm 'ring_ulysses'", algorithm)
        divides = isinstance(head_ranks, int) and head_ranks >= 1 and ranks % head_ranks == 0
        check(name, divides, "head_ranks must divide the {} ranks", head_ranks, ranks)


def _mask(causal: bool, window: int | None, cu_seqlens: Tensor | None, tokens: int) -> Mask:
    """Windows that hide nothing and documents without tokens are left out."""
    ends: set[int] = {0, tokens} if cu_seqlens is None else set(cu_seqlens.tolist())
    return Mask(causal, None if window is None or window >= tokens else window, tuple(sorted(ends)))


def _of_all_tokens(x: Tensor, tokens: int) -> Tensor:
    """The shape of the joined x, without its memory: what can run must be the same on all ranks, empty ones too."""
    return x.new_empty(1).expand(x.shape[0], tokens, *x.shape[2:]).requires_grad_(x.requires_grad)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> cost.Sizes:
    B, _, H, K = q.shape
    return cost.Sizes(B, H, k.shape[2], K, v.shape[3], q.element_size(), accumulation_dtype(q).itemsize)


def _on_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    backend: Backend,
) -> Tensor | tuple[Tensor, Tensor]:
    if return_lse:
        return kernels.attention(
            q, k, v, causal=causal, window=window, scale=scale, cu_seqlens=cu_seqlens, return_lse=True, backend=backend
        )
    return kernels.attention(q, k, v, causal=causal, window=window, scale=scale, cu_seqlens=cu_seqlens, backend=backend)


def _some_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """The kernel on all tokens of this rank's heads. Without heads: empty results that hang on q, for the backward."""
    if q.shape[2] == 0:
        total = q.sum(dim=-1, keepdim=True)
        lse = total[..., 0].transpose(1, 2).to(accumulation_dtype(q)) if return_lse else None
        return total.expand(*q.shape[:3], v.shape[-1]), lse
    found = _on_one(q, k, v, causal, window, scale, cu_seqlens, return_lse, backend)
    return (found, None) if isinstance(found, Tensor) else found


def _bring_back(
    out: Tensor, lse: Tensor | None, plan: Plan, heads: int, ctx: SequenceContext
) -> Tensor | tuple[Tensor, Tensor]:
    """Results of the plan's tokens and heads -> this rank's tokens, all heads."""
    out = collect(out, plan.heads, heads, plan.queries, ctx)
    if lse is None:
        return out
    columns = collect(lse.transpose(1, 2)[..., None], plan.heads, heads, plan.queries, ctx)
    return out, columns[..., 0].transpose(1, 2).contiguous()
