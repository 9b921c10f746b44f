"""The public face of the recurrent cells: checks, choice of backend, states."""

from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_floats, check_shape
from seqengine.kernels.environment import is_interpreted
from seqengine.kernels.rnn import ops, reference
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES, Cell

Backend = Literal["auto", "torch", "triton", "reference"]
"""auto: torch on every device; the Triton kernels have not been timed on a GPU. torch: a loop over tokens of few operations,
for every size. triton: one kernel for the whole sequence, for small heads. reference: the definition under autograd."""
LONGEST_TRITON_HEAD = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
"""By the dtype of the recurrent weights: the largest K whose weights the Triton kernels hold on chip."""


def _check_triton(name: str, gates: Tensor, recurrent: Tensor, dtype: torch.dtype) -> None:
    where = gates.device.type == "cuda" or is_interpreted()
    check(name, where, "backend 'triton' needs CUDA tensors", gates.device)
    check(name, dtype == torch.float32, "backend 'triton' computes in float32; float64 needs backend 'torch'", dtype)
    longest = LONGEST_TRITON_HEAD[recurrent.dtype]
    fits = gates.shape[-1] <= longest
    must = "backend 'triton' needs heads K <= {} for {} weights; backend 'torch' takes any"
    check(name, fits, must, gates.shape[-1], longest, recurrent.dtype)


def rnn(
    gates: Tensor,
    recurrent: Tensor,
    *,
    cell: Cell,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """A recurrent cell with a recurrent matrix for each head and gate: h[t] from gates[t] + R h[t-1] and the state.

    Shapes:   gates [B, T, G, H, K], the projections of the input with every bias added; recurrent [G, H, K, K], a matrix
              [out, in] as torch.nn.LSTM.weight_hh has it: (R h)[g, k] = sum_j recurrent[g, head, k, j] h[j].
              Returns (h [B, T, H, K], state or None), the state a tuple of tensors [B, H, K]. Any T >= 0. By cell:
                elman  G = 1               state (h)           h' = tanh(pre), pre = gates + R h
                gru    G = 3: r, z, n      state (h)           n = tanh(gates_n + s(pre_r) (R h)_n), h' = (1 - z) n + z h
                lstm   G = 4: i, f, z, o   state (h, c)        c' = s(f) c + s(i) tanh(z), h' = s(o) tanh(c')
                slstm  G = 4: i, f, z, o   state (h, c, n, m)  exponential gates, normaliser n >= 1, stabiliser m
              These are the orders of torch.nn.GRU and torch.nn.LSTM (its g is z). A recurrent bias is added to the gates,
              but for the n of torch.nn.GRU (b_hn), which r multiplies: not supported.
    Dtypes:   float64, float32, bfloat16 or float16; arithmetic and state in float32, or float64 if any argument is; h in
              the dtype of gates. Any finite gates: nothing overflows. Autocast changes nothing. The backend 'triton'
              rounds what is multiplied by R, in the backward by its transpose, to the dtype of recurrent.
    Memory:   saves its arguments, h, and the state of every 32nd token; the backward finds gates and memories again, 32
              tokens at a time. A second derivative differentiates the definition: slow, O(T) graph.
    Speed:    sequential in T: heads and batch are all there is to run at once. The torch backend needs 13 small operations a
              token for the sLSTM forward and 11 backward. Forward and backward in microseconds a token, float32, H = 4,
              K = 64, one CPU thread, against the definition under autograd: B = 1 81 / 725, B = 2 104 / 637, B = 4
              125 / 617. On a GPU the same loop is bound by launches.
    State:    of zeros by default, for every cell; cutting T anywhere and handing the state on gives the uncut result, and
              its gradients. In the sLSTM n = 0 means no past: c and m then count for nothing. m is differentiated like
              the rest.
    Exact to: reference.rnn within 1e-12 relative in float64, with every gradient.
    Raises:   ValueError if shapes, dtypes or devices do not fit, the cell or backend is unknown, or the backend 'triton'
              cannot run: without CUDA or the interpreter, in float64, or with K > 64 (128 for 16-bit weights).
    References: xLSTM, Beck et al. 2024, arXiv:2405.04517; FlashRNN, Poeppel et al. 2024, arXiv:2412.07752.
    """
    name = "rnn"
    check(name, cell in NUM_GATES, "cell must be 'slstm', 'lstm', 'gru' or 'elman'", cell)
    backends = ("auto", "torch", "triton", "reference")
    check(name, backend in backends, "backend must be 'auto', 'torch', 'triton' or 'reference'", backend)
    G, S = NUM_GATES[cell], NUM_STATES[cell]
    fits = gates.ndim == 5 and gates.shape[2] == G
    check(name, fits, "gates must be [B, T, G, H, K] with G={} for {}", gates.shape, G, cell)
    B, _, _, H, K = gates.shape
    check_shape(name, "recurrent", recurrent, "[G, H, K, K]", G, H, K, K)
    given: dict[str, Tensor] = {}
    if initial_state is not None:
        count = len(initial_state) if isinstance(initial_state, tuple | list) else -1
        check(name, count == S, "initial_state must be a tuple of {} tensors for {}", initial_state, S, cell)
        given = {f"initial_state[{i}]": x for i, x in enumerate(initial_state)}
        for what, x in given.items():
            check_shape(name, what, x, "[B, H, K]", B, H, K)
    check_floats(name, gates=gates, recurrent=recurrent, **given)
    dtype = torch.float32
    for x in (gates, recurrent, *given.values()):
        dtype = torch.promote_types(dtype, x.dtype)
    if backend == "triton":
        _check_triton(name, gates, recurrent, dtype)
    if given:
        state = tuple(x.to(dtype) for x in given.values())
    else:
        state = (torch.zeros(B, H, K, dtype=dtype, device=gates.device),) * S
    if backend == "reference":
        with torch.autocast(gates.device.type, enabled=False):
            h, final = reference.rnn(gates.to(dtype), recurrent.to(dtype), state, cell)
    else:
        h, last, _ = ops.rnn_forward(gates, recurrent, torch.stack(state), cell, backend == "triton")
        final = last.unbind(0)
    return h.to(gates.dtype), (tuple(final) if output_final_state else None)
