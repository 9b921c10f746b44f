"""Recurrent cells over a sequence that is split across ranks: a pipeline, for their states are not associative."""

import torch
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.kernels.rnn.op import Backend
from seqengine.kernels.rnn.reference import Cell
from seqengine.parallel import cost
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.pipeline import Tensors, pipeline
from seqengine.parallel.exchange.relayout import on_contiguous


@breaks_graph
@on_contiguous({"gates": 1}, output=1, documents=False)
def rnn(
    gates: Tensor,
    recurrent: Tensor,
    *,
    ctx: SequenceContext,
    cell: Cell,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
    micro_batches: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """`kernels.rnn` of the joined sequence, on this rank's part.

    Local in:  gates [B, T, G, H, K], T = ctx.local_tokens; recurrent [G, H, K, K] and initial_state, a tuple of [B, H, K], the
               state before the global first token, the same on every rank.
    Local out: (h [B, T, H, K], final state or None). join(h) == kernels.rnn(join(gates), ...); the final state is the one after
               the global last token, the same on every rank.
    Traffic:   a `pipeline` of the state, S * B * H * K numbers, S = 1, 1, 2, 4 for elman, gru, lstm, slstm, whatever T is:
               `cost.pipeline_bytes`, and `cost.pipeline_backward_bytes` with initial_gradient if there is an initial_state,
               whether or not it requires a gradient. A zigzag context: gates to contiguous parts and h back by `relayout`,
               `cost.relayout_bytes` more.
    Speed:     ranks work at the same time on different micro-batches only: (P - 1 + M) steps of a shard of B / M samples. One
               sequence is not faster on P ranks than on one, it is P times longer in the same memory.
               micro_batches: M, the same on every rank; None: `cost.rnn_micro_batches`, 1 for small batches.
    Memory:    saves gates, recurrent and the state that enters, not h; the backward runs one micro-batch again at a time.
    Gradients: of gates local; of recurrent this rank's partial sum. initial_state and the final state count once, as in `scan`:
               the gradient of the final state must be the same on every rank, that of initial_state is the whole one on every
               rank. A second derivative raises RuntimeError if P > 1.
    Order:     every rank must call, and must run the backward if gradients are enabled: see `pipeline`. With ctx.size == 1 it
               is the kernel and nothing is sent.
    Raises:    ValueError if arguments do not fit, or the context has documents, before any message.
    """
    if ctx.size == 1:
        return kernels.rnn(
            gates,
            recurrent,
            cell=cell,
            initial_state=initial_state,
            output_final_state=output_final_state,
            backend=backend,
        )
    state = _checked_state(gates, recurrent, cell, initial_state, backend, ctx)
    if micro_batches is None:
        busy = max(1, len(cost.holders(ctx.bounds)))
        state_bytes = sum(s.nbytes for s in state)
        tokens, device = -(-ctx.total_tokens // busy), gates.device.type  # all the same on every rank
        micro_batches = cost.rnn_micro_batches(busy, gates.shape[0], tokens, recurrent.numel(), state_bytes, device)

    def run(inputs: Tensors, entering: Tensors, parameters: Tensors) -> tuple[Tensor, Tensors]:
        h, leaving = kernels.rnn(
            *inputs, *parameters, cell=cell, initial_state=entering, output_final_state=True, backend=backend
        )
        assert leaving is not None
        return h, leaving

    return pipeline(
        run,
        (gates,),
        state,
        (recurrent,),
        ctx=ctx,
        micro_batches=micro_batches,
        output_final=output_final_state,
    )


def _checked_state(
    gates: Tensor,
    recurrent: Tensor,
    cell: Cell,
    initial_state: tuple[Tensor, ...] | None,
    backend: Backend,
    ctx: SequenceContext,
) -> tuple[Tensor, ...]:
    """The initial state, in the dtype of states; ValueError if arguments do not fit. The kernel checks them, on no token.

    It requires a gradient wherever there is an initial_state, so that no rank depends on what the others ask for.
    """
    with torch.no_grad():
        _, checked = kernels.rnn(
            gates[:, :0] if gates.ndim > 1 else gates,
            recurrent,
            cell=cell,
            initial_state=initial_state,
            output_final_state=True,
            backend=backend,
        )
    assert checked is not None
    ctx.check_local("rnn", gates, 1)
    if initial_state is None:
        return checked
    state = tuple(s.to(c.dtype) for s, c in zip(initial_state, checked, strict=True))
    return tuple(s if s.requires_grad else s.detach().requires_grad_() for s in state)
