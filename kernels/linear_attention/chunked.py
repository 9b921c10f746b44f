"""Linear recurrences chunk by chunk: the forward, and the backward by hand. Heavy work is batched matrix products.

With `into`, `out` and `decay` of each chunk as in `gates`, and h the state before it,

    h' = decay h + (k out)^T v                        o = (q into) h + (scores of the chunk) v
    dh = decay dh' + (q into)^T do                    dv = (scores)^T do + (k out) dh'
    dq = into (do h^T) + from the chunk's scores      dk = out (v dh'^T) + from the chunk's scores
    d log into = q dq,  d log out = k dk of these two terms,  d log decay = decay sum_V h dh'.

Rows, heads and time are worked through in blocks, so that temporaries stay small. Saved are the inputs and the state
before each segment of at least 16 chunks; the backward walks the segments from right to left and computes the states
inside a segment again. Only the scan over chunks is sequential.

References: Yang et al. 2023, arXiv:2312.06635 (chunks of gated linear attention, closed form of the gate's gradient);
Dao and Gu 2024, arXiv:2405.21060 (scalar gates as a matrix of decays).
"""

from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels.linear_attention.gates import ChannelGates, FixedGates, Gates, HeadGates, bmm
from seqengine.kernels.linear_attention.layout import (
    Block,
    Plan,
    Segment,
    blocks,
    load,
    make_plan,
    scan,
    segments,
    store,
)

Kind = Literal["channel", "head", "fixed"]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def plan_of(q: Tensor, v: Tensor, bounds: Tensor | None) -> Plan:
    B, T, H, K = q.shape
    return make_plan(B, T, H, K, v.shape[-1], None if bounds is None else bounds.shape[0] - 1, q.device.type)


def kind_of(q: Tensor, g: Tensor | None) -> Kind:
    """Of gates [B, T, H, K], [B, T, H], and [H] or None."""
    return "fixed" if g is None or g.ndim == 1 else "head" if g.ndim == 3 else "channel"


def _gates(g: Tensor | None, block: Block, segment: Segment, q: Tensor) -> Gates:
    """The gates of a tile q."""
    if g is None or g.ndim == 1:
        decays = q.new_zeros(q.shape[2]) if g is None else g[block.heads]
        return FixedGates(decays, segment.chunk, min(segment.chunk, segment.stop - segment.start), q.dtype)
    if g.ndim == 3:
        return HeadGates(load(g.unsqueeze(-1), block, segment, q.dtype))
    return ChannelGates(load(g, block, segment, q.dtype))


def _accumulate(y: Tensor, x: Tensor, h: Tensor) -> None:
    """y += x h, in place, for contiguous tiles."""
    y.flatten(0, 2).baddbmm_(x.flatten(0, 2), h.flatten(0, 2))


def _states(initial: Tensor | None, q: Tensor, v: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The initial states [documents, rows, H, K, V]: one document without bounds, one row with them."""
    if initial is None:
        rows = q.shape[0] if bounds is None else bounds.shape[0] - 1
        initial = torch.zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)
    return initial.unsqueeze(0 if bounds is None else 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    bounds: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V], the final states, and the state before each segment [segments, B, H, K, V]. T >= 1."""
    dtype = compute_dtype(q, k, v, g, initial)
    plan = plan_of(q, v, bounds)
    B, T, H, K = q.shape
    V = v.shape[-1]
    parts = segments(plan, T, bounds, q.device, name)
    source = _states(initial, q, v, bounds, dtype)
    final = source.to(dtype, copy=True)  # of empty documents it is the initial one
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    starts = torch.zeros(plan.segments, B, H, K, V, dtype=dtype, device=v.device)
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(plan, B, H):
            before, after = source[:, block.rows, block.heads], final[:, block.rows, block.heads]
            carry = torch.zeros(before.shape[1:], dtype=torch.float64, device=v.device)
            for i, segment in enumerate(parts):
                starts[i, block.rows, block.heads] = carry
                b_q, b_k, b_v = (load(x, block, segment, dtype) for x in (q, k, v))
                b_q *= scale
                gates = _gates(g, block, segment, b_q)
                b_o = gates.outputs(b_q, b_k, b_v)
                b_k *= gates.out
                b_q *= gates.into
                sums = bmm(b_k.mT, b_v)
                _accumulate(b_o, b_q, scan(sums, _spread(gates.decay, segment), carry, segment, before, after))
                store(o, block, segment, b_o)
    return o, final.squeeze(0 if bounds is None else 1), starts


def _spread(decay: Tensor, segment: Segment) -> Tensor:
    """One decay for each chunk; fixed gates have the same for all."""
    return decay if decay.ndim == 5 else decay.expand(segment.chunks, 1, *decay.shape)


def backward(
    do: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    starts: Tensor,
    bounds: Tensor | None,
    name: str,
    *,
    of_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g ([0] without of_gates) and of the initial states."""
    plan = plan_of(q, v, bounds)
    B, T, H, _ = q.shape
    parts = segments(plan, T, bounds, q.device, name)
    source = _states(initial, q, v, bounds, starts.dtype)
    d_final = d_final.unsqueeze(0 if bounds is None else 1)
    d_initial = d_final.to(starts.dtype, copy=True)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device) if g is not None and of_gates else q.new_empty(0)
    with torch.autocast(q.device.type, enabled=False):
        fixed = torch.zeros(H, dtype=torch.float64, device=q.device)
        for block in blocks(plan, B, H):
            places = [x[:, block.rows, block.heads] for x in (source, d_final, d_initial)]
            carry = torch.zeros(places[0].shape[1:], dtype=torch.float64, device=v.device)
            for i, segment in reversed(list(enumerate(parts))):
                inputs = [load(x, block, segment, starts.dtype) for x in (q, k, v, do)]
                inputs[0] *= scale
                gates = _gates(g, block, segment, inputs[0])
                start = starts[i, block.rows, block.heads]
                b_dq, b_dk, b_dv, b_dg = _backward_tile(gates, inputs, segment, start, carry, places, dg.numel() > 0)
                b_dq *= scale
                for out, tile in ((dq, b_dq), (dk, b_dk), (dv, b_dv)):
                    store(out, block, segment, tile)
                if b_dg is None:
                    continue
                if isinstance(gates, FixedGates):
                    fixed[block.heads] += b_dg
                else:
                    store(dg.unsqueeze(-1) if dg.ndim == 3 else dg, block, segment, b_dg)
    if dg.ndim == 1 and dg.numel() > 0:
        dg.copy_(fixed)
    return dq, dk, dv, dg, d_initial.squeeze(0 if bounds is None else 1)


def _backward_tile(
    gates: Gates,
    inputs: list[Tensor],
    segment: Segment,
    start: Tensor,
    carry: Tensor,
    places: list[Tensor],
    of_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a tile's (scaled) q, k, v and of its gates; moves the carry, the states' gradient, to its start."""
    (q, k, v, do), (source, d_final, d_initial) = inputs, places
    dq, dk, dv = gates.gradients(q, k, v, do, of_gates=of_gates)
    q, k = q.mul_(gates.into), k.mul_(gates.out)
    decay = _spread(gates.decay, segment)
    nowhere = torch.empty_like(d_initial)
    before = scan(bmm(k.mT, v), decay, start.to(torch.float64, copy=True), segment, source, nowhere)
    after = scan(bmm(q.mT, do), decay, carry, segment, d_final, d_initial, reverse=True)
    _accumulate(dv, k, after)
    d_q, d_k = bmm(do, before.mT), bmm(v, after.mT)
    dq.addcmul_(d_q, gates.into)
    dk.addcmul_(d_k, gates.out)
    if not of_gates:
        return dq, dk, dv, None
    d_decay = before.mul_(after).sum(dim=-1).mul_(decay.squeeze(-1).to(q.dtype))
    return dq, dk, dv, gates.gate_gradients(d_q.mul_(q), d_k.mul_(k), d_decay)
