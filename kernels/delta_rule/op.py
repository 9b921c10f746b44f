"""The public face of the delta rule: checks, choice of backend, documents, empty inputs and single tokens."""

import itertools
from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_bounds, check_floats, check_shape
from seqengine.kernels.delta_rule import ops, reference
from seqengine.kernels.delta_rule.chunked import Arguments, dtype_of, initial_states, states_shape

Backend = Literal["auto", "torch", "reference"]
"""auto: torch on every device. torch: chunks by matrix products. reference: the recurrence, token by token."""
NAME = "delta_rule"


def check_backend(name: str, backend: str) -> None:
    check(name, backend in ("auto", "torch", "reference"), "backend must be 'auto', 'torch' or 'reference'", backend)


def check_tokens(name: str, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> None:
    """Shapes, dtypes and devices of what makes the states."""
    check(name, k.ndim == 4 and k.shape[3] >= 1, "k must be [B, T, H, K], K >= 1", k.shape)
    check(name, v.ndim == 4 and v.shape[3] >= 1, "v must be [B, T, H, V], V >= 1", v.shape)
    check(name, v.shape[:3] == k.shape[:3], "v [B, T, H, V] must have B, T, H = {}", v.shape, tuple(k.shape[:3]))
    check_shape(name, "beta", beta, "[B, T, H]", *k.shape[:3])
    check_shape(name, "g", g, "[B, T, H]", *k.shape[:3])
    check_floats(name, k=k, v=v, beta=beta, g=g)


def _check_packing(q: Tensor, V: int, initial: Tensor | None, bounds: Tensor | None) -> None:
    B, _, H, K = q.shape
    rows, letters = B, "[B, H, K, V]"
    if bounds is not None:
        is_vector = bounds.ndim == 1 and bounds.shape[0] >= 2 and not bounds.is_floating_point()
        check(NAME, is_vector, "cu_seqlens must be integers [N + 1], N >= 1", (bounds.dtype, *bounds.shape))
        check(NAME, B == 1, "with cu_seqlens q must be one row [1, T, H, K]", q.shape)
        rows, letters = bounds.shape[0] - 1, "[N, H, K, V]"
    check_shape(NAME, "initial_state", initial, letters, rows, H, K, V)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The (gated) delta rule S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale q_t S_t, in O(T).

    Shapes:   q, k [B, T, H, K]; v [B, T, H, V]; beta (write strength, any real) and g [B, T, H]; state [B, H, K, V]; any
              T >= 0, K and V >= 1. g is the logarithm of the gate, at most 0; -inf forgets all; None is no gate (DeltaNet).
              scale is K ** -0.5 unless given. Returns (o [B, T, H, V], state or None).
    Keys:     k is used as it is. The state stays bounded where 0 <= beta_t |k_t|^2 <= 2: pass keys of length 1, as published.
    Dtypes:   float64, float32, bfloat16 or float16. Arithmetic and state in float64 if any argument is, else in float32;
              o in v.dtype, each gradient in its argument's dtype.
    Memory:   saves the arguments and one state for every 16 chunks, of up to 64 tokens, or more; temporaries of a few MB on
              a CPU. The second derivative, and higher ones, keep all intermediates.
    State:    S after the last token. Cutting T anywhere and handing it on gives the uncut result. T = 1 (decoding) is one
              update, O(KV) a head.
    Packed:   cu_seqlens [N + 1] = [0, ..., T]: B is 1, N sequences end to end, none of which sees another; empty ones are
              allowed; states are [N, H, K, V]. Costs at most one partly filled chunk a sequence.
    Exact to: reference.delta_rule within 1e-12 relative in float64, every gradient included, for keys of length 1 and gates
              from 0 to -inf in any mixture; the gradient at a gate of -inf is 0. What keys overwrite is a difference: where a
              chunk leaves 1e-5 of a state, the state's own gradient, if nothing else flows to it, has five digits less.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or the backend is unknown.
    References: DeltaNet, Schlag et al. 2021, arXiv:2102.11174; its chunks, Yang et al. 2024, arXiv:2406.06484; the gate, a
              number a head that commutes with the projection, Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, equation 10.
    """
    check_backend(NAME, backend)
    check(NAME, q.ndim == 4 and q.shape[3] >= 1, "q must be [B, T, H, K], K >= 1", q.shape)
    check_shape(NAME, "k", k, "[B, T, H, K]", *q.shape)
    check_tokens(NAME, k, v, beta, g)
    check_floats(NAME, q=q, k=k, initial_state=initial_state)
    _check_packing(q, v.shape[3], initial_state, cu_seqlens)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    o, state = _run(q, Arguments(q, k, v, beta, g, factor, initial_state, cu_seqlens), backend)
    return o, (state if output_final_state else None)


def _run(q: Tensor, a: Arguments, backend: Backend) -> tuple[Tensor, Tensor]:
    """Arguments that fit -> o and the states after it."""
    if q.numel() == 0:
        return _no_token(q, a)
    if backend == "reference":
        return _by_definition(q, a)
    if q.shape[1] == 1 and a.bounds is None:
        return _one_token(q, a)
    o, final, _ = ops.delta_rule(*a)
    return o, final


def _by_definition(q: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    if a.bounds is None:
        return reference.delta_rule(q, a.k, a.v, a.beta, a.g, a.scale, a.initial)
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(check_bounds(NAME, a.bounds, q.shape[1]))):
        g = None if a.g is None else a.g[:, start:stop]
        initial = None if a.initial is None else a.initial[n : n + 1]
        b_q, b_k, b_v, b_beta = (x[:, start:stop] for x in (q, a.k, a.v, a.beta))
        o, state = reference.delta_rule(b_q, b_k, b_v, b_beta, g, a.scale, initial)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _no_token(q: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """An output without elements that still depends on every argument, so that their gradients are zero, not None."""
    if a.bounds is not None:
        check_bounds(NAME, a.bounds, q.shape[1])
    o = a.v * 1
    for x in (q, a.k, a.beta, a.g):
        if x is not None:
            o = o + (x.nan_to_num().sum() * 0).to(o.dtype)
    if a.initial is not None:
        return o, a.initial.to(dtype_of(a), copy=True)
    return o, torch.zeros(states_shape(a), dtype=dtype_of(a), device=q.device)


def _one_token(q: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """T = 1: the definition, whose operations are O(KV) and differentiable."""
    dtype = dtype_of(a)
    b_q, b_k, b_v = (x[:, 0].to(dtype) for x in (q, a.k, a.v))
    state = initial_states(a).to(dtype)
    if a.g is not None:
        state = torch.exp(a.g[:, 0].to(dtype))[..., None, None] * state
    error = b_v - (b_k[..., None] * state).sum(dim=2)
    state = state + b_k[..., None] * (a.beta[:, 0].to(dtype)[..., None] * error)[:, :, None, :]
    o = ((b_q * a.scale)[..., None] * state).sum(dim=2)[:, None]
    return o.to(a.v.dtype), state
