"""The definitions of the cells, token by token: slow, differentiable by torch to any order.

With R h for the recurrent part, (R h)[g, k] = sum_j recurrent[g, head, k, j] h[j] (a matrix acts on a column, as in
torch.nn.LSTM.weight_hh), x the gates of one token, s the logistic function, and pre = x + R h:

    elman   gates (x)           state (h)            h' = tanh(pre)
    gru     gates (r, z, n)     state (h)            n = tanh(x_n + s(pre_r) (R h)_n), h' = (1 - s(pre_z)) n + s(pre_z) h
    lstm    gates (i, f, z, o)  state (h, c)         c' = s(pre_f) c + s(pre_i) tanh(pre_z), h' = s(pre_o) tanh(c')
    slstm   gates (i, f, z, o)  state (h, c, n, m)   a = log s(pre_f) + m, m' = max(pre_i, a),
                                                     i = exp(pre_i - m'), f = exp(a - m'),
                                                     c' = f c + i tanh(pre_z), n' = max(f n + i, 1), h' = s(pre_o) c' / n'

The stabiliser m of the sLSTM is differentiated like everything else: gradients are those of the function written here, whatever
is asked of the final c, n and m, and do not depend on where a sequence is cut. A head and channel with n = 0 has no past: its c
and m count for nothing, so that a state of zeros is the start of every cell. After any token n >= 1.
References: Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014, arXiv:1406.1078 (the reset after the product, as cuDNN
and torch.nn.GRU have it); xLSTM, Beck et al. 2024, arXiv:2405.04517.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Cell = Literal["slstm", "lstm", "gru", "elman"]
NUM_GATES = {"slstm": 4, "lstm": 4, "gru": 3, "elman": 1}
NUM_STATES = {"slstm": 4, "lstm": 2, "gru": 1, "elman": 1}


def step(x: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], cell: Cell) -> tuple[Tensor, ...]:
    """The state after one token: x [B, G, H, K], recurrent [G, H, K, K], state tensors [B, H, K]. Its first tensor is h."""
    past = torch.einsum("ghkj,bhj->gbhk", recurrent, state[0])
    if cell == "gru":
        r, z = torch.sigmoid(x[:, 0] + past[0]), torch.sigmoid(x[:, 1] + past[1])
        n = torch.tanh(x[:, 2] + r * past[2])
        return ((1 - z) * n + z * state[0],)
    pre = x.transpose(0, 1) + past
    if cell == "elman":
        return (torch.tanh(pre[0]),)
    z, o = torch.tanh(pre[2]), torch.sigmoid(pre[3])
    if cell == "lstm":
        c = torch.sigmoid(pre[1]) * state[1] + torch.sigmoid(pre[0]) * z
        return o * torch.tanh(c), c
    _, c, n, m = state
    carried = (F.logsigmoid(pre[1]) + m).masked_fill(n == 0, -math.inf)
    m = torch.maximum(pre[0], carried)
    i, f = torch.exp(pre[0] - m), torch.exp(carried - m)
    c, n = f * c + i * z, torch.clamp(f * n + i, min=1)
    return o * c / n, c, n, m


def rnn(gates: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], cell: Cell) -> tuple[Tensor, tuple[Tensor, ...]]:
    """h of every token and the state after the last.

    Shapes:   gates [B, T, G, H, K]; recurrent [G, H, K, K]; state tensors [B, H, K]. Returns (h [B, T, H, K], state).
    Dtypes:   one for all.
    """
    outputs = []
    for x in gates.unbind(dim=1):
        state = step(x, recurrent, state, cell)
        outputs.append(state[0])
    return (torch.stack(outputs, dim=1) if outputs else gates[:, :, 0]), state
