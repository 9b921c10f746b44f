"""The public face of the linear recurrences: checks, choice of backend, documents, empty inputs and single tokens."""

import itertools
from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_bounds, check_floats, check_shape
from seqengine.kernels.environment import runs_triton
from seqengine.kernels.linear_attention import fla, ops, reference
from seqengine.kernels.linear_attention.chunked import compute_dtype

Backend = Literal["auto", "torch", "triton", "fla", "reference"]
"""auto: torch on every device. torch: chunks by matrix products. triton: kernels for CUDA tensors. fla: the package fla-core,
on CUDA. reference: the recurrence, token by token."""
NormalizedState = tuple[Tensor, Tensor]
"""S [B, H, K, V] and its normaliser z [B, H, K]."""


def _check_call(
    name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> None:
    known = ("auto", "torch", "triton", "fla", "reference")
    check(name, backend in known, "backend must be 'auto', 'torch', 'triton', 'fla' or 'reference'", backend)
    check(name, q.ndim == 4 and q.shape[3] >= 1, "q must be [B, T, H, K], K >= 1", q.shape)
    check_shape(name, "k", k, "[B, T, H, K]", *q.shape)
    check(name, v.ndim == 4 and v.shape[3] >= 1, "v must be [B, T, H, V], V >= 1", v.shape)
    check(name, v.shape[:3] == q.shape[:3], "v [B, T, H, V] must have B, T, H = {}", v.shape, tuple(q.shape[:3]))
    check_floats(name, q=q, k=k, v=v, g=g)
    if backend == "triton":
        must = "backend 'triton' needs Triton and q on a CUDA device (or TRITON_INTERPRET=1 when Triton is imported)"
        check(name, runs_triton(q.device.type), must, q.device)
        alike = q.dtype == k.dtype == v.dtype or torch.float64 not in (q.dtype, k.dtype, v.dtype)
        check(name, alike, "backend 'triton' needs q, k and v all in float64, or none", (q.dtype, k.dtype, v.dtype))
    elif backend == "fla":
        fla.check_runs(name, q, k, v)
    if cu_seqlens is not None:
        is_vector = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2 and not cu_seqlens.is_floating_point()
        check(name, is_vector, "cu_seqlens must be integers [N + 1], N >= 1", (cu_seqlens.dtype, *cu_seqlens.shape))
        check(name, q.shape[0] == 1, "with cu_seqlens q must be one row [1, T, H, K]", q.shape)


def _check_state(
    name: str, what: str, state: Tensor | None, letters: str, q: Tensor, cu_seqlens: Tensor | None, *shape: int
) -> None:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_shape(name, what, state, letters if cu_seqlens is None else letters.replace("B", "N"), rows, *shape)
    if state is not None:
        check_floats(name, q=q, **{what: state})


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, in O(T).

    Shapes:   q, k, g [B, T, H, K]; v [B, T, H, V]; state [B, H, K, V]; any T >= 0, K and V >= 1. g is the logarithm of the
              gate, at most 0; -inf forgets all. scale is K ** -0.5 unless given. Returns (o [B, T, H, V], state or None).
    Dtypes:   float64, float32, bfloat16 or float16. Arithmetic and state in float64 if any argument is, else in float32;
              o in v.dtype, each gradient in its argument's dtype.
    Memory:   saves the arguments and one state for every 16 chunks, of up to 64 tokens, or more; temporaries of a few MB on
              a CPU. The second derivative, and higher ones, keep all intermediates.
    State:    S after the last token. Cutting T anywhere and handing it on gives the uncut result. T = 1 (decoding) is one
              update, O(KV) a head.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: B is 1, N sequences end to end, none of which sees another; empty ones are
              allowed; states are [N, H, K, V]. Costs at most one partly filled chunk a sequence.
    Exact to: reference.gla within 1e-12 relative in float64, every gradient included, for gates from 0 to -inf in any mixture;
              the gradient at a gate of -inf is 0.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown or cannot run here.
    References: Yang et al. 2023, arXiv:2312.06635.
    """
    name = "gla"
    _check_call(name, q, k, v, g, cu_seqlens, backend)
    check_shape(name, "g", g, "[B, T, H, K]", *q.shape)
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    _check_state(name, "initial_state", initial_state, "[B, H, K, V]", q, cu_seqlens, H, K, V)
    factor = K**-0.5 if scale is None else scale
    o, state = _run(name, q, k, v, g, factor, initial_state, cu_seqlens, backend)
    return o, (state if output_final_state else None)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """Linear attention with one gate a head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, in O(T).

    Shapes:   q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H] (as in Mamba-2), [H] (the same decay for every token, as in
              RetNet) or None (linear attention); state [B, H, K, V]. Returns (o [B, T, H, V], state or None).
    Normalize: o_t = q_t S_t / q_t z_t with z_t = exp(g_t) z_{t-1} + k_t, and states are pairs (S, z [B, H, K]). A scale would
              cancel, and raises. q_t z_t must not be 0: take positive q and k.
    Dtypes, Memory, State, Packed: as in `gla`. g [H] keeps no gate for each token, unless there is cu_seqlens.
    Exact to: reference.simple_gla within 1e-12 relative in float64, as in `gla`.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown or cannot run here.
    References: Katharopoulos et al. 2020, arXiv:2006.16236; RetNet, Sun et al. 2023, arXiv:2307.08621; Mamba-2, Dao and
              Gu 2024, arXiv:2405.21060.
    """
    name = "simple_gla"
    _check_call(name, q, k, v, g, cu_seqlens, backend)
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    if g is not None:
        fits = g.shape == (H,) or g.shape == q.shape[:3]
        check(name, fits, "g must be [B, T, H] = {} or [H] = [{}]", g.shape, list(q.shape[:3]), H)
    if normalize:
        check(name, scale is None, "scale must be None with normalize=True, where it cancels", scale)
        values = torch.cat([v.to(compute_dtype(q, k, v, g)), torch.ones_like(v[..., :1])], dim=-1)
        before = _join_state(name, initial_state, q, V, cu_seqlens)
        o, state = _run(name, q, k, values, g, 1.0, before, cu_seqlens, backend)
        pair = (state[..., :V], state[..., V]) if output_final_state else None
        return (o[..., :V] / o[..., V:]).to(v.dtype), pair
    check(
        name, not isinstance(initial_state, tuple), "initial_state must be one tensor unless normalize=True", "a tuple"
    )
    assert not isinstance(initial_state, tuple)
    _check_state(name, "initial_state", initial_state, "[B, H, K, V]", q, cu_seqlens, H, K, V)
    factor = K**-0.5 if scale is None else scale
    o, state = _run(name, q, k, v, g, factor, initial_state, cu_seqlens, backend)
    return o, (state if output_final_state else None)


def _join_state(
    name: str, state: Tensor | NormalizedState | None, q: Tensor, V: int, cu_seqlens: Tensor | None
) -> Tensor | None:
    """(S, z) -> [B, H, K, V + 1]: z is the state of one more value, which is always 1."""
    if state is None:
        return None
    is_pair = isinstance(state, tuple) and len(state) == 2
    check(name, is_pair, "initial_state must be a tuple (S, z) with normalize=True", type(state).__name__)
    S, z = state
    H, K = q.shape[2:]
    _check_state(name, "initial_state[0]", S, "[B, H, K, V]", q, cu_seqlens, H, K, V)
    _check_state(name, "initial_state[1]", z, "[B, H, K]", q, cu_seqlens, H, K)
    dtype = torch.promote_types(S.dtype, z.dtype)
    return torch.cat([S.to(dtype), z[..., None].to(dtype)], dim=-1)


def operator_of(backend: Backend) -> str:
    """Whose kernels the operators run."""
    return backend if backend in ("triton", "fla") else "torch"


def _run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Arguments that fit -> o and the states after it."""
    if q.numel() == 0:
        return _no_token(name, q, k, v, g, initial, cu_seqlens)
    if backend == "reference":
        return _by_definition(name, q, k, v, g, scale, initial, cu_seqlens)
    if q.shape[1] == 1 and cu_seqlens is None:
        return _one_token(q, k, v, g, scale, initial)
    if cu_seqlens is not None and g is not None and g.ndim == 1:
        g = g.expand(q.shape[:3])
    o, final, _ = ops.gla(q, k, v, g, scale, initial, cu_seqlens, operator_of(backend))
    return o, final


def _by_definition(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gates = q.new_zeros(()) if g is None else g if g.ndim == 4 else g[..., None]
    gates = gates.expand(q.shape)
    if cu_seqlens is None:
        return reference.gla(q, k, v, gates, scale, initial)
    ends = check_bounds(name, cu_seqlens, q.shape[1])
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(ends)):
        b_q, b_k, b_v, b_g = (x[:, start:stop] for x in (q, k, v, gates))
        o, state = reference.gla(b_q, b_k, b_v, b_g, scale, None if initial is None else initial[n : n + 1])
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _no_token(
    name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An output without elements that still depends on every argument, so that their gradients are zero, not None."""
    rows = q.shape[0]
    if cu_seqlens is not None:
        check_bounds(name, cu_seqlens, q.shape[1])
        rows = cu_seqlens.shape[0] - 1
    o = v * 1
    for x in (q, k, g):
        if x is not None:
            o = o + (x.nan_to_num().sum() * 0).to(v.dtype)
    dtype = compute_dtype(q, k, v, g, initial)
    if initial is not None:
        return o, initial.to(dtype, copy=True)
    return o, torch.zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T = 1: the definition, whose operations are O(KV) and differentiable."""
    dtype = compute_dtype(q, k, v, g, initial)
    state = k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
    if initial is not None and g is None:
        state = state + initial.to(dtype)
    elif g is not None:
        log = g[:, 0, :, :, None] if g.ndim == 4 else g[:, 0, :, None, None] if g.ndim == 3 else g[:, None, None]
        before = torch.zeros_like(state) if initial is None else initial.to(dtype)
        state = torch.addcmul(state, torch.exp(log.to(dtype)), before)
    o = ((q[:, 0].to(dtype) * scale)[..., None] * state).sum(dim=2)[:, None]
    return o.to(v.dtype), state
