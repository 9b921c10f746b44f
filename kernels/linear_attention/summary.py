"""What a stretch of tokens does to the state of gated linear attention, without its outputs: for sequence parallelism.

A stretch takes every state S to exp(l) S + E, and the gradient G of the state after it to exp(l) G + F for the one before it:

    l = sum_t g_t,    E = sum_t (exp(out_t) k_t)^T v_t,    F = scale sum_t (exp(into_t) q_t)^T do_t,
    out_t = g_{t+1} + .. + g_{T-1},    into_t = g_0 + .. + g_t.

Each takes KV multiplications a token and head; the kernel's forward takes at least 2 KV, its backward 5 KV. The exponents are
sums of their own gates, by halves of halves, and never differences: they are at most 0, and -inf is an exact factor of 0.
Nothing here is differentiated by torch: with G known, the kernel's backward gives every gradient. `outputs` and `gradients` are
that kernel as two calls, between which G can arrive.

Reference: Yang et al. 2023, arXiv:2312.06635 (chunks of gated linear attention).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.linear_attention import op, ops
from seqengine.kernels.linear_attention.dyadic import halves, levels
from seqengine.kernels.linear_attention.gates import bmm
from seqengine.kernels.linear_attention.layout import Block, Segment, blocks, load, make_plan, power_of_two

FORGETS = -1e4
"""A fixed log decay of -inf counts as this one, whose exponential is 0: over no token it decays nothing."""


def state_after(k: Tensor, v: Tensor, g: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(E, l): the state after the tokens if there was none before them, and the log decay over them.

    Shapes: k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], [B, T, H], [H] or None; T >= 0. E is [B, H, K, V]; l is [B, H, K]
            for the first kind of gates, else [B, H].
    Dtypes: E and l in `dtype`, float32 or float64. Sums over tokens of a block in it, over blocks in float64.
    Memory: a few MB of temporaries on a CPU.
    """
    return _decayed_sum(k, v, g, dtype, into=False)


def state_gradient(q: Tensor, do: Tensor, g: Tensor | None, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(F, l): the gradient of the state before the tokens that flows through their outputs; shapes as in `state_after`."""
    gradient, log_decay = _decayed_sum(q, do, g, dtype, into=True)
    return gradient.mul_(scale), log_decay


def _decayed_sum(x: Tensor, y: Tensor, g: Tensor | None, dtype: torch.dtype, into: bool) -> tuple[Tensor, Tensor]:
    """sum_t (exp(into_t or out_t) x_t)^T y_t, and l."""
    (B, T, H, K), V = x.shape, y.shape[-1]
    per_channel = g is not None and g.ndim == 4
    total = torch.zeros(B, H, K, V, dtype=dtype, device=x.device)
    log_decay = torch.zeros(B, H, K if per_channel else 1, dtype=dtype, device=x.device)
    if x.numel() > 0:
        plan = make_plan(B, T, H, K, V, None, x.device.type)
        cuts = _cuts(T, plan.span * plan.chunk)
        with torch.autocast(x.device.type, enabled=False):
            for block in blocks(plan, B, H):
                carry = torch.zeros_like(total[block.rows, block.heads], dtype=torch.float64)
                log = torch.zeros_like(log_decay[block.rows, block.heads], dtype=torch.float64)
                for segment in reversed(cuts) if into else cuts:
                    b_x, b_y = load(x, block, segment, dtype), load(y, block, segment, dtype)
                    if g is not None:
                        weights, step = _weights(g, block, segment, dtype, into)
                        b_x *= weights
                        carry *= torch.exp(step)[..., None]
                        log += step
                    carry += bmm(b_x.mT, b_y)[0]
                total[block.rows, block.heads] = carry
                log_decay[block.rows, block.heads] = log
    return total, log_decay if per_channel else log_decay.squeeze(-1)


def _cuts(tokens: int, length: int) -> list[Segment]:
    """Segments of one chunk each."""
    found = []
    for start in range(0, tokens, length):
        stop = min(start + length, tokens)
        found.append(Segment(start, stop, power_of_two(stop - start), 1, None, [-1], [-1]))
    return found


def _weights(g: Tensor, block: Block, segment: Segment, dtype: torch.dtype, into: bool) -> tuple[Tensor, Tensor]:
    """exp(into_t or out_t) within the segment, [1, b, h, C, K or 1] or [h, C, 1], and its l [b, h, K or 1] or [h, 1]."""
    if g.ndim == 1:
        tokens = segment.stop - segment.start
        times = torch.arange(segment.chunk, device=g.device)
        counts = times + 1 if into else (tokens - 1 - times).clamp(min=0)
        log = g[block.heads].to(torch.float64).clamp(min=FORGETS)[:, None]
        return torch.exp(log * counts)[..., None].to(dtype), log * tokens
    gates = load(g if g.ndim == 4 else g.unsqueeze(-1), block, segment, dtype)
    exponents, totals = gates.clone() if into else torch.zeros_like(gates), gates
    for h in levels(segment.chunk):
        first, second = totals.unflatten(-2, (-1, 2)).unbind(-2)
        place, added = (1, first) if into else (0, second)
        halves(exponents, h)[:, place] += added.reshape(-1, 1, added.shape[-1])
        totals = first + second
    return exponents.exp_(), gates.sum(dim=-2, dtype=torch.float64)[0]


class Arguments(NamedTuple):
    """Of a run of the kernel: tokens as in `state_after`, T >= 0; the initial states; local cu_seqlens, but not with g [H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float
    initial: Tensor
    bounds: Tensor | None


def outputs(a: Arguments, backend: op.Backend) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final states, and what `gradients` needs besides the arguments."""
    if a.v.shape[1] == 0:
        return torch.empty_like(a.v), a.initial.clone(), a.initial.new_empty(0)
    if backend == "reference":
        return *_definition(a), a.initial.new_empty(0)
    found: tuple[Tensor, Tensor, Tensor] = ops.gla(*a, op.operator_of(backend))
    return found


def gradients(
    a: Arguments, starts: Tensor, do: Tensor, d_final: Tensor, backend: op.Backend, *, of_gates: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Of q, k, v, g (with of_gates) and the initial states, from those of o and of the final states."""
    of_gates = of_gates and a.g is not None
    if a.v.shape[1] == 0:
        dq, dk, dv = (torch.zeros_like(x) for x in (a.q, a.k, a.v))
        return dq, dk, dv, torch.zeros_like(a.g) if a.g is not None and of_gates else None, d_final
    if backend == "reference":
        with torch.enable_grad():
            q, k, v, initial = (x.detach().requires_grad_() for x in (a.q, a.k, a.v, a.initial))
            g = None if a.g is None else a.g.detach().requires_grad_()
            found = _definition(Arguments(q, k, v, g, a.scale, initial, a.bounds))
        leaves = [x for x in (q, k, v, initial, g) if x is not None]
        dq, dk, dv, d_initial, *dg = torch.autograd.grad(found, leaves, (do, d_final))
        return dq, dk, dv, dg[0] if of_gates else None, d_initial
    dq, dk, dv, d_gates, d_initial = ops.gla_backward(
        do, d_final, *a[:6], starts, a.bounds, op.operator_of(backend), of_gates
    )
    return dq, dk, dv, d_gates if of_gates else None, d_initial


def _definition(a: Arguments) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": a.scale, "initial_state": a.initial, "cu_seqlens": a.bounds}
    options |= {"output_final_state": True, "backend": "reference"}
    if a.g is not None and a.g.ndim == 4:
        o, final = op.gla(a.q, a.k, a.v, a.g, **options)
    else:
        o, final = op.simple_gla(a.q, a.k, a.v, a.g, **options)  # type: ignore[assignment]
    assert final is not None
    return o, final
