"""The delta rule chunk by chunk: the forward, and the backward by hand. The maths of a chunk is in `tile`.

Rows, heads and time are worked through in blocks, so that temporaries stay small. Saved are the inputs and the state before
each segment of at least 16 chunks; the backward walks the segments from right to left and computes the states inside a
segment again. Only the states go chunk by chunk, two matrix products each.

References: Bischof and Van Loan 1987 (products of Householder matrices as I - W Y^T); Yang et al. 2024, arXiv:2406.06484 (its
use for DeltaNet); Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464 (with gates).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.delta_rule.tile import Tile
from seqengine.kernels.linear_attention.chunked import compute_dtype, plan_of
from seqengine.kernels.linear_attention.gates import FixedGates, HeadGates
from seqengine.kernels.linear_attention.layout import Block, Segment, blocks, load, segments, store


class Arguments(NamedTuple):
    """q, k [B, T, H, K], v [B, T, H, V], beta, g [B, T, H], initial [B, H, K, V], bounds [N + 1]. T >= 1.

    Without q there are no outputs: only states.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float
    initial: Tensor | None
    bounds: Tensor | None


def dtype_of(a: Arguments) -> torch.dtype:
    """Of arithmetic and states: float64 if any argument is, else float32."""
    return compute_dtype(a.q, a.k, a.v, a.beta, a.g, a.initial)


def states_shape(a: Arguments) -> tuple[int, int, int, int]:
    rows = a.k.shape[0] if a.bounds is None else a.bounds.shape[0] - 1
    return rows, a.k.shape[2], a.k.shape[3], a.v.shape[3]


def starts_shape(a: Arguments) -> tuple[int, int, int, int, int]:
    """Of the states before each segment."""
    B, _, H, K = a.k.shape
    return plan_of(a.k, a.v, a.bounds).segments, B, H, K, a.v.shape[3]


def initial_states(a: Arguments) -> Tensor:
    """Zeros unless given."""
    if a.initial is not None:
        return a.initial
    return torch.zeros(states_shape(a), dtype=dtype_of(a), device=a.k.device)


def _document_dim(a: Arguments) -> int:
    """Where states become [documents, rows, H, K, V]: one document without bounds, one row with them."""
    return 0 if a.bounds is None else 1


def _pieces(a: Arguments, name: str) -> tuple[list[Block], list[Segment]]:
    plan = plan_of(a.k, a.v, a.bounds)
    B, T, H, _ = a.k.shape
    return blocks(plan, B, H), segments(plan, T, a.bounds, a.k.device, name)


def _tile(a: Arguments, block: Block, segment: Segment) -> Tile:
    k, v, beta = (load(x, block, segment, dtype_of(a)) for x in (a.k, a.v, a.beta.unsqueeze(-1)))
    if a.g is None:
        gates: HeadGates = FixedGates(k.new_zeros(k.shape[2]), segment.chunk, segment.chunk, dtype_of(a))
    else:
        gates = HeadGates(load(a.g.unsqueeze(-1), block, segment, dtype_of(a)))
    return Tile(k, v, beta, gates)


def forward(a: Arguments, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V] ([0] without q), the final states, and the state before each segment [segments, B, H, K, V]."""
    cuts, parts = _pieces(a, name)
    source = initial_states(a).unsqueeze(_document_dim(a))
    final = source.to(dtype_of(a), copy=True)  # of empty documents it is the initial one
    o = a.v.new_empty(0) if a.q is None else torch.empty(a.v.shape, dtype=a.v.dtype, device=a.v.device)
    starts = torch.zeros(starts_shape(a), dtype=dtype_of(a), device=a.v.device)
    with torch.autocast(a.k.device.type, enabled=False):
        for block in cuts:
            before, after = source[:, block.rows, block.heads], final[:, block.rows, block.heads]
            carry = torch.zeros(before.shape[1:], dtype=torch.float64, device=a.v.device)
            for i, segment in enumerate(parts):
                starts[i, block.rows, block.heads] = carry
                tile = _tile(a, block, segment)
                states = tile.states(carry, segment, before, after)
                if a.q is not None:
                    q = load(a.q, block, segment, dtype_of(a)).mul_(a.scale)
                    store(o, block, segment, tile.outputs(q, states))
    return o, final.squeeze(_document_dim(a)), starts


def _like(x: Tensor | None, other: Tensor) -> Tensor:
    """Memory for the gradient of x; [0] if there is no x."""
    return other.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def empty_gradients(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of q, k, v, beta, g."""
    dq, dk, dv, d_beta, dg = (_like(x, a.k) for x in (a.q, a.k, a.v, a.beta, a.g))
    return dq, dk, dv, d_beta, dg


def _right_to_left(
    a: Arguments, cuts: list[Block], parts: list[Segment]
) -> Iterator[tuple[int, Block, Segment, Tensor]]:
    """Every segment of every block, with the carry of the block."""
    for block in cuts:
        b, _, h, _ = a.k[block.rows, :, block.heads].shape
        carry = torch.zeros(b, h, a.k.shape[3], a.v.shape[3], dtype=torch.float64, device=a.k.device)
        for i in reversed(range(len(parts))):
            yield i, block, parts[i], carry


def backward(
    do: Tensor | None, d_final: Tensor, a: Arguments, starts: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g ([0] for what there is not) and of the initial states. do is None if no output counts."""
    cuts, parts = _pieces(a, name)
    source = initial_states(a).unsqueeze(_document_dim(a))
    d_final = d_final.unsqueeze(_document_dim(a))
    d_initial = d_final.to(dtype_of(a), copy=True)
    nowhere = torch.empty_like(d_initial)
    dq, dk, dv, d_beta, dg = empty_gradients(a)
    if do is None:
        dq.zero_()
    with torch.autocast(a.k.device.type, enabled=False):
        for i, block, segment, carry in _right_to_left(a, cuts, parts):
            s, ds, ds_first, unused = (x[:, block.rows, block.heads] for x in (source, d_final, d_initial, nowhere))
            tile = _tile(a, block, segment)
            start = starts[i, block.rows, block.heads].to(torch.float64, copy=True)
            before = tile.states(start, segment, s, unused)
            upstream = None
            if a.q is not None and do is not None:
                q = load(a.q, block, segment, dtype_of(a)).mul_(a.scale)
                upstream = q, load(do, block, segment, dtype_of(a))
            b_dq, b_dk, b_dv, b_d_beta, b_dg = tile.gradients(upstream, before, carry, segment, ds, ds_first)
            if b_dq is not None:
                store(dq, block, segment, b_dq.mul_(a.scale))
            store(dk, block, segment, b_dk)
            store(dv, block, segment, b_dv)
            store(d_beta.unsqueeze(-1), block, segment, b_d_beta)
            if a.g is not None:
                store(dg.unsqueeze(-1), block, segment, b_dg)
    return dq, dk, dv, d_beta, dg, d_initial.squeeze(_document_dim(a))
