"""The recurrent cells in Triton: one program for each head and 16 samples, which stays for the whole sequence.

The recurrent weights of the head are loaded once. A token is G small products and the cell, all in float32 but for the
operands of the products, which have the dtype of the weights. The forward writes h, and the state before each chunk of tokens.
The backward knows every h, and so every pre-activation. It takes the chunks from the last to the first: it runs through one
forwards to find the memories, and then backwards. The length is an argument, not a constant of the kernels.

Launchers only: they allocate, launch and return. Nobody imports this file unless a GPU or Triton's interpreter is asked for.
The cotangent of the sLSTM's m is carried as its rest, see slstm.py.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqengine.kernels.environment import is_interpreted
from seqengine.kernels.rnn import loop
from seqengine.kernels.rnn.reference import Cell
from seqengine.kernels.rnn.slstm import without_past

BLOCK_SAMPLES = 16
"""The fewest rows of a product on tensor cores."""

NUM_WARPS = 8
"""Their registers or, for large heads, the shared memory hold the weights; with four warps many more would spill."""


@triton.jit
def _sigmoid(b_x):
    """Without overflow on either side."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1 + b_e)


@triton.jit
def _tanh(b_x):
    b_e = tl.exp(-2 * tl.abs(b_x))
    b_y = (1 - b_e) / (1 + b_e)
    return tl.where(b_x >= 0, b_y, -b_y)


@triton.jit
def _log_sigmoid(b_x):
    return tl.minimum(b_x, 0.0) - tl.log(1 + tl.exp(-tl.abs(b_x)))


@triton.jit
def _weight(p_w, o_k, K, BACK: tl.constexpr):
    """One gate's weights of the head, [in, out], or [out, in] for the way back."""
    o_w = o_k[:, None] * K + o_k[None, :] if BACK else o_k[None, :] * K + o_k[:, None]
    return tl.load(p_w + o_w, mask=(o_k < K)[:, None] & (o_k < K)[None, :], other=0)


@triton.jit
def _dot(b_a, b_w, BACK: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ w in float32; a is rounded to the dtype of w."""
    if BACK and b_w.dtype == tl.float16:  # gradients may lie outside of its range
        b_scale = tl.max(tl.abs(b_a), axis=1)[:, None]
        b_scale = tl.where(b_scale > 0, b_scale, 1.0)
        b_sum = tl.dot((b_a / b_scale).to(tl.float16), b_w) * b_scale
    elif INTERPRETED and b_w.dtype == tl.bfloat16:  # products of bfloat16 are wrong there, casts are right
        b_sum = tl.dot(b_a.to(tl.bfloat16).to(tl.float32), b_w.to(tl.float32), input_precision="ieee")
    else:
        b_sum = tl.dot(b_a.to(b_w.dtype), b_w, input_precision="tf32x3")
    return b_sum


@triton.jit
def _load(p_x, offset, mask):
    return tl.load(p_x + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _slstm_gates(b_i, b_f, b_m):
    """The new m, exp(i - m), exp(a - m) and a = log s(f) + m before."""
    b_a = _log_sigmoid(b_f) + b_m
    b_new = tl.maximum(b_i, b_a)
    return b_new, tl.exp(b_i - b_new), tl.exp(b_a - b_new), b_a


@triton.jit
def _memories(b_i, b_f, b_z, b_c, b_n, b_m, CELL: tl.constexpr):
    """c, n and m after a token from its pre-activations."""
    if CELL == "lstm":
        b_c = _sigmoid(b_f) * b_c + _sigmoid(b_i) * _tanh(b_z)
    elif CELL == "slstm":
        b_m, b_i, b_f, _ = _slstm_gates(b_i, b_f, b_m)
        b_c = b_f * b_c + b_i * _tanh(b_z)
        b_n = tl.maximum(b_f * b_n + b_i, 1.0)
    return b_c, b_n, b_m


@triton.jit
def _rows(B, H, K, BB: tl.constexpr, BK: tl.constexpr):
    """Program id -> head, samples [BB, 1], channels [BK], mask [BB, BK]. All on grid axis 0: the others end at 65535."""
    i_h = tl.program_id(0) % H
    o_b = (tl.program_id(0) // H) * BB + tl.arange(0, BB)[:, None]
    o_k = tl.arange(0, BK)
    return i_h, o_b.to(tl.int64), o_k, (o_b < B) & (o_k < K)[None, :]


@triton.jit(do_not_specialize=["T"])
def rnn_fwd_kernel(
    gates, recurrent, state, h, final, starts, B, T, H, K,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h [B, T, H, K], final [S, B, H, K] and starts [chunks, S, H, B, K] of one head and BB samples."""
    i_h, o_b, o_k, m_x = _rows(B, H, K, BB, BK)
    o_row = i_h * K + o_k[None, :]
    HK = tl.cast(H, tl.int64) * K
    p_x = gates + o_b * T * G * HK + o_row
    p_h = h + o_b * T * HK + o_row
    o_state = (i_h * B + o_b) * K + o_k[None, :]
    BHK = B * HK
    HKK = HK * K
    p_w = recurrent + tl.cast(i_h, tl.int64) * K * K
    b_w0 = _weight(p_w, o_k, K, False)
    b_w1 = _weight(p_w + HKK, o_k, K, False) if G > 1 else b_w0
    b_w2 = _weight(p_w + 2 * HKK, o_k, K, False) if G > 2 else b_w0
    b_w3 = _weight(p_w + 3 * HKK, o_k, K, False) if G > 3 else b_w0
    b_h = _load(state, o_state, m_x)
    b_c = _load(state, o_state + BHK, m_x) if S > 1 else b_h
    b_n = _load(state, o_state + 2 * BHK, m_x) if S > 2 else b_h
    b_m = _load(state, o_state + 3 * BHK, m_x) if S > 2 else b_h
    t = 0
    while t < T:
        if t % CHUNK == 0:
            p_start = starts + (t // CHUNK) * S * BHK + o_state
            tl.store(p_start, b_h, mask=m_x)
            if S > 1:
                tl.store(p_start + BHK, b_c, mask=m_x)
            if S > 2:
                tl.store(p_start + 2 * BHK, b_n, mask=m_x)
                tl.store(p_start + 3 * BHK, b_m, mask=m_x)
        b_x0 = _load(p_x, 0, m_x)
        b_x1 = _load(p_x, HK, m_x) if G > 1 else b_x0
        b_x2 = _load(p_x, 2 * HK, m_x) if G > 2 else b_x0
        b_x3 = _load(p_x, 3 * HK, m_x) if G > 3 else b_x0
        b_x0 += _dot(b_h, b_w0, False, INTERPRETED)
        if CELL == "elman":
            b_h = _tanh(b_x0)
        elif CELL == "gru":
            b_x1 = _sigmoid(b_x1 + _dot(b_h, b_w1, False, INTERPRETED))
            b_new = _tanh(b_x2 + _sigmoid(b_x0) * _dot(b_h, b_w2, False, INTERPRETED))
            b_h = b_new + b_x1 * (b_h - b_new)
        else:
            b_x1 += _dot(b_h, b_w1, False, INTERPRETED)
            b_x2 += _dot(b_h, b_w2, False, INTERPRETED)
            b_x3 += _dot(b_h, b_w3, False, INTERPRETED)
            b_c, b_n, b_m = _memories(b_x0, b_x1, b_x2, b_c, b_n, b_m, CELL)
            b_h = _sigmoid(b_x3) * (_tanh(b_c) if CELL == "lstm" else b_c / b_n)
        tl.store(p_h, b_h, mask=m_x)
        p_x += G * HK
        p_h += HK
        t += 1
    p_final = final + o_b * HK + o_row
    tl.store(p_final, b_h, mask=m_x)
    if S > 1:
        tl.store(p_final + BHK, b_c, mask=m_x)
    if S > 2:
        tl.store(p_final + 2 * BHK, b_n, mask=m_x)
        tl.store(p_final + 3 * BHK, b_m, mask=m_x)


@triton.jit
def _run_chunk(
    p_pre, p_start, p_memory, BHK, m_x, HK, tokens,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes the memories before each token of a chunk to p_memory, and returns those after the last."""
    b_c = _load(p_start, BHK, m_x)
    b_n = _load(p_start, 2 * BHK, m_x) if S > 2 else b_c
    b_m = _load(p_start, 3 * BHK, m_x) if S > 2 else b_c
    t = 0
    while t < tokens:
        tl.store(p_memory, b_c, mask=m_x)
        if S > 2:
            tl.store(p_memory + BHK, b_n, mask=m_x)
            tl.store(p_memory + 2 * BHK, b_m, mask=m_x)
        b_i = _load(p_pre, 0, m_x)
        b_f = _load(p_pre, HK, m_x)
        b_z = _load(p_pre, 2 * HK, m_x)
        b_c, b_n, b_m = _memories(b_i, b_f, b_z, b_c, b_n, b_m, CELL)
        p_memory += (S - 1) * BHK
        p_pre += G * HK
        t += 1
    return b_c, b_n, b_m


@triton.jit
def _lstm_step(b_x, b_i, b_f, b_z, b_o, b_before, b_after, b_gc):
    """Gradients of the four gates, and the cotangent of c before the token."""
    b_i = _sigmoid(b_i)
    b_f = _sigmoid(b_f)
    b_z = _tanh(b_z)
    b_o = _sigmoid(b_o)
    b_squashed = _tanh(b_after)
    b_gc += b_x * b_o * (1 - b_squashed * b_squashed)
    b_di = b_gc * b_z * b_i * (1 - b_i)
    b_df = b_gc * b_before * b_f * (1 - b_f)
    b_dz = b_gc * b_i * (1 - b_z * b_z)
    b_do = b_x * b_squashed * b_o * (1 - b_o)
    return b_di, b_df, b_dz, b_do, b_gc * b_f


@triton.jit
def _slstm_step(b_x, b_i, b_f, b_z, b_o, b_c, b_n, b_m, b_c_after, b_n_after, b_gc, b_gn, b_rest):
    """Gradients of the four gates, the cotangents of c and n before the token, and the rest."""
    b_slope_f = _sigmoid(-b_f)
    _, b_in, b_keep, b_a = _slstm_gates(b_i, b_f, b_m)
    b_wins = tl.where(b_a > b_i, 1.0, tl.where(b_a == b_i, 0.5, 0.0))
    b_z = _tanh(b_z)
    b_o = _sigmoid(b_o)
    b_ratio = b_c_after / b_n_after
    b_to_c = b_x * b_o / b_n_after
    b_gc += b_to_c
    b_gn -= b_to_c * b_ratio
    b_moved = tl.where(b_keep * b_n + b_in < 1, b_gn, 0.0)
    b_gn -= b_moved
    b_rest += b_moved
    b_di = (b_gc * b_z + b_gn) * b_in + (1 - b_wins) * b_rest
    b_rest *= b_wins
    b_df = ((b_gc * b_c + b_gn * b_n) * b_keep + b_rest) * b_slope_f
    b_dz = b_gc * b_in * (1 - b_z * b_z)
    b_do = b_x * b_ratio * b_o * (1 - b_o)
    return b_di, b_df, b_dz, b_do, b_gc * b_keep, b_gn * b_keep, b_rest


@triton.jit(do_not_specialize=["T"])
def rnn_bwd_kernel(
    dh, d_final, pre, of_n, recurrent, h, starts, memory, d_state, B, T, H, K,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """pre [B, T, G, H, K], the pre-activations, becomes their gradient; of the GRU's n, pre is without R h, which is of_n.

    of_n [B, T, H, K] becomes the gradient of R h in n. memory [CHUNK, S - 1, H, B, K] is scratch.
    """
    i_h, o_b, o_k, m_x = _rows(B, H, K, BB, BK)
    o_row = i_h * K + o_k[None, :]
    HK = tl.cast(H, tl.int64) * K
    BHK = B * HK
    HKK = HK * K
    o_token = o_b * T * HK + o_row
    o_state = (i_h * B + o_b) * K + o_k[None, :]
    o_final = o_b * HK + o_row
    p_w = recurrent + tl.cast(i_h, tl.int64) * K * K
    b_w0 = _weight(p_w, o_k, K, True)
    b_w1 = _weight(p_w + HKK, o_k, K, True) if G > 1 else b_w0
    b_w2 = _weight(p_w + 2 * HKK, o_k, K, True) if G > 2 else b_w0
    b_w3 = _weight(p_w + 3 * HKK, o_k, K, True) if G > 3 else b_w0
    b_g = _load(d_final, o_final, m_x)
    b_gc = _load(d_final, o_final + BHK, m_x) if S > 1 else b_g
    b_gn = _load(d_final, o_final + 2 * BHK, m_x) if S > 2 else b_g
    b_rest = _load(d_final, o_final + 3 * BHK, m_x) if S > 2 else b_g
    # of the token after this one, what goes back through R
    b_d0 = tl.zeros([BB, BK], dtype=tl.float32)
    b_d1 = tl.zeros([BB, BK], dtype=tl.float32)
    b_d2 = tl.zeros([BB, BK], dtype=tl.float32)
    b_d3 = tl.zeros([BB, BK], dtype=tl.float32)
    b_c = b_d0
    b_n = b_d0
    b_m = b_d0
    start = ((T - 1) // CHUNK) * CHUNK
    while start >= 0:
        tokens = tl.minimum(CHUNK, T - start)
        start_64 = tl.cast(start, tl.int64)
        if S > 1:
            p_start = starts + (start_64 // CHUNK) * S * BHK + o_state
            p_pre = pre + (o_b * T + start_64) * G * HK + o_row
            b_c, b_n, b_m = _run_chunk(p_pre, p_start, memory + o_state, BHK, m_x, HK, tokens, CELL, G, S)
            tl.debug_barrier()  # the memories are read by other threads than wrote them
        if S > 2 and start + CHUNK >= T:
            b_rest -= b_gc * b_c + b_gn * b_n
        i = tokens - 1
        while i >= 0:
            t = start_64 + i
            p_pre = pre + (o_b * T + t) * G * HK + o_row
            b_x0 = _load(p_pre, 0, m_x)
            b_x1 = _load(p_pre, HK, m_x) if G > 1 else b_x0
            b_x2 = _load(p_pre, 2 * HK, m_x) if G > 2 else b_x0
            b_x3 = _load(p_pre, 3 * HK, m_x) if G > 3 else b_x0
            b_x = _load(dh, o_token + t * HK, m_x) + b_g
            b_x += _dot(b_d0, b_w0, True, INTERPRETED)
            if G > 1:
                b_x += _dot(b_d1, b_w1, True, INTERPRETED)
            if G > 2:
                b_x += _dot(b_d2, b_w2, True, INTERPRETED)
            if G > 3:
                b_x += _dot(b_d3, b_w3, True, INTERPRETED)
            b_g = tl.zeros([BB, BK], dtype=tl.float32)
            if CELL == "elman":
                b_h = _tanh(b_x0)
                b_d0 = b_x * (1 - b_h * b_h)
            elif CELL == "gru":
                b_of_n = _load(of_n, o_token + t * HK, m_x)
                b_past = _load(h, o_token + (t - 1) * HK, m_x & (t > 0)) + _load(starts, o_state, m_x & (t == 0))
                b_r = _sigmoid(b_x0)
                b_z = _sigmoid(b_x1)
                b_new = _tanh(b_x2 + b_r * b_of_n)
                b_dn = b_x * (1 - b_z) * (1 - b_new * b_new)
                b_d0 = b_dn * b_of_n * b_r * (1 - b_r)
                b_d1 = b_x * (b_past - b_new) * b_z * (1 - b_z)
                b_d2 = b_dn * b_r
                b_g = b_x * b_z
            else:
                p_memory = memory + tl.cast(i, tl.int64) * (S - 1) * BHK + o_state
                b_c_before = _load(p_memory, 0, m_x)
                if CELL == "lstm":
                    b_d0, b_d1, b_d2, b_d3, b_gc = _lstm_step(b_x, b_x0, b_x1, b_x2, b_x3, b_c_before, b_c, b_gc)
                else:
                    b_n_before = tl.where(m_x, _load(p_memory, BHK, m_x), 1.0)  # it divides
                    b_m = _load(p_memory, 2 * BHK, m_x)
                    b_d0, b_d1, b_d2, b_d3, b_gc, b_gn, b_rest = _slstm_step(
                        b_x, b_x0, b_x1, b_x2, b_x3, b_c_before, b_n_before, b_m, b_c, b_n, b_gc, b_gn, b_rest
                    )
                    b_n = b_n_before
                b_c = b_c_before
            tl.debug_barrier()  # every thread has read what is replaced now
            if CELL == "gru":
                tl.store(of_n + o_token + t * HK, b_d2, mask=m_x)
            tl.store(p_pre, b_d0, mask=m_x)
            if G > 1:
                tl.store(p_pre + HK, b_d1, mask=m_x)
            if G > 2:
                tl.store(p_pre + 2 * HK, b_dn if CELL == "gru" else b_d2, mask=m_x)
            if G > 3:
                tl.store(p_pre + 3 * HK, b_d3, mask=m_x)
            i -= 1
        tl.debug_barrier()  # before the memories of the next chunk are written
        start -= CHUNK
    b_g += _dot(b_d0, b_w0, True, INTERPRETED)
    if G > 1:
        b_g += _dot(b_d1, b_w1, True, INTERPRETED)
    if G > 2:
        b_g += _dot(b_d2, b_w2, True, INTERPRETED)
    if G > 3:
        b_g += _dot(b_d3, b_w3, True, INTERPRETED)
    tl.store(d_state + o_final, b_g, mask=m_x)
    if S > 1:
        tl.store(d_state + o_final + BHK, b_gc, mask=m_x)
    if S > 2:
        tl.store(d_state + o_final + 2 * BHK, b_gn, mask=m_x)
        tl.store(d_state + o_final + 3 * BHK, b_rest + b_gc * b_c + b_gn * b_n, mask=m_x)


def _common(gates: Tensor, cell: Cell, S: int) -> dict[str, object]:
    BK = max(16, triton.next_power_of_2(gates.shape[-1]))
    return {
        "CELL": cell, "G": gates.shape[2], "S": S, "CHUNK": loop.CHUNK_TOKENS, "INTERPRETED": is_interpreted(),
        "BB": BLOCK_SAMPLES, "BK": BK, "num_warps": NUM_WARPS,
    }  # fmt: skip


def forward(gates: Tensor, recurrent: Tensor, state: Tensor, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """h [B, T, H, K], the state [S, B, H, K] after the last token, and those before each chunk [chunks, S, H, B, K].

    Shapes:   gates [B, T, G, H, K]; recurrent [G, H, K, K], K at most 64 in float32, 128 in 16 bits; state [S, B, H, K].
    Dtypes:   gates and recurrent float32, bfloat16 or float16; state and results float32. The product R h rounds h to
              the dtype of the weights.
    Traffic:  gates once, h once, recurrent once for each program.
    """
    B, T, _, H, K = gates.shape
    S = state.shape[0]
    h = state.new_empty(B, T, H, K)
    final = state.new_empty(state.shape)
    starts = state.new_empty(loop.num_chunks(T), S, H, B, K)
    first = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    if cell == "slstm":
        without_past(first)
    rnn_fwd_kernel[(H * triton.cdiv(B, BLOCK_SAMPLES),)](
        gates.contiguous(), recurrent.contiguous(), first, h, final, starts, B, T, H, K, **_common(gates, cell, S)
    )
    return h, final, starts


def _past(h: Tensor, starts: Tensor, head: int, dtype: torch.dtype) -> Tensor:
    """h of one head before each token, as the product with R sees it: rounded to the dtype of the weights. [B * T, K]"""
    before = torch.cat((starts[0, 0, head].unsqueeze(1), h[:, :-1, head]), dim=1)
    return before.flatten(0, 1).to(dtype).to(h.dtype)


def backward(
    dh: Tensor, d_final: Tensor, gates: Tensor, recurrent: Tensor, h: Tensor, starts: Tensor, cell: Cell
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent and the state [S, B, H, K] from those of h and of the final state.

    Shapes:   as in the forward; dh like h, d_final like the state.
    Dtypes:   as the forward; gradients of gates and recurrent in their dtypes. The product with R rounds the gradients of
              the pre-activations to the dtype of the weights.
    Traffic:  pre-activations in float32, found by one product a head before the kernel, which puts their gradients in
              their place; one product a head after it gives the gradient of recurrent. No atomics: bitwise the same
              on every run.
    """
    B, T, G, H, K = gates.shape
    S = starts.shape[1]
    weights = recurrent.to(h.dtype)
    pre = gates.to(h.dtype, memory_format=torch.contiguous_format, copy=True)
    of_n = torch.empty_like(h) if cell == "gru" else None
    for i in range(H):
        recurred = (_past(h, starts, i, recurrent.dtype) @ weights[:, i].flatten(0, 1).T).view(B, T, G, K)
        if of_n is None:
            pre[:, :, :, i] += recurred
        else:
            pre[:, :, :2, i] += recurred[:, :, :2]
            of_n[:, :, i] = recurred[:, :, 2]
    memory = h.new_empty(loop.CHUNK_TOKENS, S - 1, H, B, K) if S > 1 else None
    d_state = torch.empty_like(d_final, memory_format=torch.contiguous_format)
    rnn_bwd_kernel[(H * triton.cdiv(B, BLOCK_SAMPLES),)](
        dh.contiguous(), d_final.contiguous(), pre, of_n, recurrent.contiguous(), h, starts, memory, d_state,
        B, T, H, K, **_common(gates, cell, S),
    )  # fmt: skip
    d_recurrent = torch.empty(recurrent.shape, dtype=recurrent.dtype, device=recurrent.device)
    for i in range(H):
        d_recurred = pre[:, :, :, i]
        if of_n is not None:
            d_recurred = torch.cat((d_recurred[:, :, :2], of_n[:, :, None, i]), dim=2)
        product = d_recurred.reshape(B * T, G * K).T @ _past(h, starts, i, recurrent.dtype)
        d_recurrent[:, i] = product.view(G, K, K)
    return pre.to(gates.dtype), d_recurrent, d_state
