"""Attention of this rank's queries over key blocks that come by, merged by log-sum-exp; one block at a time.

Forward: each piece of a block (see attention_plan.py) is a call of the kernel; its out and lse are merged into running ones.
Backward: with the out and the lse of all keys, the backward of the kernel gives the gradients of each piece as it is, so the
blocks go round once more, and nothing but q, k, v, out and lse is saved.

References: Liu et al. 2023, arXiv:2310.01889; Brandon et al. 2023, arXiv:2311.09431 (balance).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.attention import ops
from seqengine.kernels.attention.merge import merge_attention
from seqengine.parallel.attention_plan import Piece, Plan
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.ring import Blocks, return_ring, visit_ring


@dataclass(frozen=True)
class Kernel:
    """How pieces are computed."""

    scale: float
    backend: str

    def options(self, piece: Piece, q: Tensor, v: Tensor) -> tuple[Tensor | None, bool, int | None, float, str]:
        """The last arguments of the operator. auto: torch's fused kernel on a CPU where it can, the blocked one elsewhere."""
        documents = None
        if piece.documents is not None:
            documents = torch.tensor(piece.documents, dtype=torch.int32, device=q.device)
        backend = self.backend
        if backend == "auto":
            square = piece.queries[1] - piece.queries[0] == piece.keys[1] - piece.keys[0]
            plain = piece.window is None and documents is None and (square or not piece.causal)
            exact = q.dtype in (torch.float32, torch.float64) and q.shape[-1] == v.shape[-1]
            backend = "sdpa" if q.device.type == "cpu" and plain and exact else "torch"
        return documents, piece.causal, piece.window, self.scale, backend


def _take(piece: Piece, rows: tuple[int, int], *tensors: Tensor) -> list[Tensor]:
    """Rows of dim 1, backwards if the piece is turned."""
    found = [x[:, rows[0] : rows[1]] for x in tensors]
    return [x.flip(1) for x in found] if piece.turned else found


def _take_lse(piece: Piece, x: Tensor) -> Tensor:
    """[B, H, T] of the queries of the piece, contiguous."""
    part = x[:, :, piece.queries[0] : piece.queries[1]]
    return part.flip(2) if piece.turned else part.contiguous()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, ctx: SequenceContext, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K] of the plan's queries, k and v of its keys -> (out [B, T, H, V], lse [B, H, T])."""
    out, lse = _RingAttention.apply(q, k, v, plan, ctx, kernel)  # type: ignore[no-untyped-call]
    return out, lse


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, context: SequenceContext, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        (B, T, H, _), dtype = q.shape, accumulation_dtype(q)
        out = torch.zeros(B, T, H, v.shape[-1], dtype=dtype, device=q.device)
        lse = torch.full((B, H, T), -torch.inf, dtype=dtype, device=q.device)

        def visit(source: int, blocks: Blocks) -> None:
            for piece in plan.pieces(source) if q.numel() > 0 else []:
                _add_piece(piece, out, lse, q, blocks, kernel)

        visit_ring(visit, (k, v), route=plan.route, ctx=context, dim=1)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.how = (plan, context, kernel)
        ctx.set_materialize_grads(False)  # a cotangent of lse that does not exist costs nothing
        return result, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, context, kernel = ctx.how
        given, dtype = torch.zeros_like(out) if dout is None else dout, accumulation_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)

        def visit(source: int, blocks: Blocks | None) -> list[Tensor] | None:
            pieces = plan.pieces(source) if q.numel() > 0 else []
            if not pieces or blocks is None:
                return None
            found = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in blocks]
            for piece in pieces:
                _add_gradients(piece, dq, found, (given, dlse, q, out, lse), blocks, kernel)
            return found

        dk, dv = return_ring(visit, (k, v), route=plan.route, ctx=context, dim=1, dtype=dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _add_piece(piece: Piece, out: Tensor, lse: Tensor, q: Tensor, blocks: Blocks, kernel: Kernel) -> None:
    """Merge the attention over one piece into out and lse."""
    (own,) = _take(piece, piece.queries, q)
    keys, values = _take(piece, piece.keys, *blocks)
    part, part_lse = ops.attention(own, keys, values, *kernel.options(piece, q, values))
    if piece.turned:
        part, part_lse = part.flip(1), part_lse.flip(2)
    start, stop = piece.queries
    before, before_lse = out[:, start:stop], lse[:, :, start:stop]
    after, after_lse = merge_attention(before, before_lse, part, part_lse)
    before.copy_(after)
    before_lse.copy_(after_lse)


def _add_gradients(
    piece: Piece,
    dq: Tensor,
    d_blocks: list[Tensor],
    saved: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    blocks: Blocks,
    kernel: Kernel,
) -> None:
    """Add what one piece gives to dq and to the gradients of its keys and values."""
    dout, dlse, q, out, lse = saved
    own_dout, own_q, own_out = _take(piece, piece.queries, dout, q, out)
    keys, values = _take(piece, piece.keys, *blocks)
    own_dlse = None if dlse is None else _take_lse(piece, dlse)
    own_lse = _take_lse(piece, lse)
    options = kernel.options(piece, q, values)
    found = ops.attention_backward(own_dout, own_dlse, own_q, keys, values, own_out, own_lse, *options)
    for total, rows, part in zip((dq, *d_blocks), (piece.queries, piece.keys, piece.keys), found, strict=True):
        total[:, rows[0] : rows[1]] += part.flip(1) if piece.turned else part
