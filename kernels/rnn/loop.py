"""Forward and backward of a cell over a whole sequence, CHUNK_TOKENS at a time: nothing longer than a chunk is built.

The forward keeps h and the state before each chunk. The backward takes the chunks from the last to the first, finds the gates
and memories of one again, and adds up the gradient of the recurrent weights by one product a chunk.
"""

import torch
from torch import Tensor

from seqengine.kernels.rnn.cells import (
    elman_backward,
    elman_forward,
    gru_backward,
    gru_forward,
    lstm_backward,
    lstm_forward,
)
from seqengine.kernels.rnn.reference import Cell
from seqengine.kernels.rnn.slstm import slstm_backward, slstm_forward, without_past

CHUNK_TOKENS = 32
"""Tokens between two kept states, which are an eighth of h for the sLSTM. Longer chunks leave the cache of a CPU."""


def num_chunks(tokens: int) -> int:
    return (tokens + CHUNK_TOKENS - 1) // CHUNK_TOKENS


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]


def _load(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, ..., H, K] -> [C, H, B, ..., K], dense, in the dtype of the arithmetic."""
    moved = x.movedim((1, -2), (0, 1))
    return torch.empty(moved.shape, dtype=dtype, device=x.device).copy_(moved)


def _store(out: Tensor, x: Tensor) -> None:
    """The inverse of _load."""
    out.copy_(x.movedim((0, 1), (1, -2)))


def _weight(recurrent: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, H, K, K] -> [H, K, G * K], what a row h is multiplied by."""
    return recurrent.to(dtype).permute(1, 3, 0, 2).flatten(2).contiguous()


def forward(gates: Tensor, recurrent: Tensor, state: Tensor, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """h [B, T, H, K], the state [S, B, H, K] after the last token, and those before each chunk [chunks, S, H, B, K].

    The dtype of the state is that of the arithmetic and of all results. Nothing is empty.
    """
    B, T, _, H, K = gates.shape
    dtype = state.dtype
    h = torch.empty(B, T, H, K, dtype=dtype, device=gates.device)
    starts = torch.empty(num_chunks(T), state.shape[0], H, B, K, dtype=dtype, device=gates.device)
    weight = _weight(recurrent, dtype)
    now = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    if cell == "slstm":
        without_past(now)
    for i, chunk in enumerate(_chunks(T)):
        starts[i] = now
        x = _load(gates[:, chunk], dtype)
        out = torch.empty(x.shape[0], H, B, K, dtype=dtype, device=gates.device)
        if cell == "slstm":
            slstm_forward(x, weight, now, out, first=i == 0)
        elif cell == "lstm":
            lstm_forward(x, weight, now, out)
        elif cell == "gru":
            gru_forward(x, weight, now, out)
        else:
            elman_forward(x, weight, now, out)
        now[0] = out[-1]
        _store(h[:, chunk], out)
    return h, now.transpose(1, 2).clone(memory_format=torch.contiguous_format), starts


def backward(
    dh: Tensor, d_final: Tensor, gates: Tensor, recurrent: Tensor, h: Tensor, starts: Tensor, cell: Cell
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent and the state [S, B, H, K] from those of h and of the final state. Nothing is empty."""
    B, T, G, H, K = gates.shape
    dtype = h.dtype
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    weight = _weight(recurrent, dtype)
    d_weight = torch.zeros_like(weight)
    carry = d_final.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    chunks = _chunks(T)
    for i in reversed(range(len(chunks))):
        chunk, start = chunks[i], starts[i]
        pre, out, x = _load(gates[:, chunk], dtype), _load(h[:, chunk], dtype), _load(dh[:, chunk], dtype)
        past = torch.cat((start[:1], out[:-1]))
        rows = past.transpose(0, 1).flatten(1, 2)
        recurred = torch.bmm(rows, weight).view(H, -1, B, G, K).transpose(0, 1)
        x[-1] += carry[0]
        back = weight.mT
        if cell == "gru":
            d_pre, d_recurred = gru_backward(pre, recurred, past, x, back, carry)
        else:
            pre += recurred
            if cell == "slstm":
                d_pre = slstm_backward(pre, x, back, start, carry, first=i == 0, last=i == len(chunks) - 1)
            elif cell == "lstm":
                d_pre = lstm_backward(pre, x, back, start, carry)
            else:
                d_pre = elman_backward(pre, x, back, carry)
            d_recurred = d_pre
        d_weight.baddbmm_(rows.mT, d_recurred.flatten(3).transpose(0, 1).flatten(1, 2))
        _store(d_gates[:, chunk], d_pre)
    d_recurrent = d_weight.view(H, K, G, K).permute(2, 0, 3, 1).to(recurrent.dtype)
    return d_gates, d_recurrent.contiguous(), carry.transpose(1, 2).clone(memory_format=torch.contiguous_format)
