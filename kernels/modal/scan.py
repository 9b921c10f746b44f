"""Convolution with a modal filter, chunk by chunk: all heavy work is small real matrix products.

Inside a chunk of C tokens the first C taps act as a Toeplitz matrix; across chunks the N-number state carries the rest:

    y_c = x_c toeplitz + Re(s_c emit),   s_{c+1} = lambda^C s_c + x_c collect,
    emit[n, j] = R_n lambda_n^(j+1),     collect[j, n] = lambda_n^(C-1-j).

The recurrence over chunks is a tree in float64: a rounded lambda^C, applied T/C times, would move a pole near the unit
circle. Channels are worked through in blocks and time in segments; only inputs and the states at the segments' starts are
saved, and `gradients` walks the segments from right to left with the adjoint state. Complex numbers appear in the
scan and in the tables; the matrix products see real and imaginary parts as 2N real modes. On a GPU those of float32
follow torch.backends.cuda.matmul: with TF32 allowed there, y and the states have the accuracy of TF32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.modal.filter import complex_modes, powers, real_dtype, real_modes, to_double

LONGEST_CHUNK = 64
"""Tokens of a chunk. Nanoseconds for each element of u, forward / with backward, float32, N = 16, one CPU thread:

                                  C = 16       32         64         128        FFT of the whole filter
    D = 64, T = 2^15, real        5.5 / 19     4.3 / 14   4.6 / 15   5.7 / 18   14 / 36
    D = 64, T = 2^15, complex     10.5 / 32    7.3 / 25   6.4 / 23   8.8 / 27   15 / 43
    D = 4,  T = 2^20, real        5.7 / 21     4.4 / 14   4.0 / 14   5.2 / 16   75 / 206
"""
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Numbers of one block of channels and segment of time: in the cache of a CPU; on a GPU only a bound on memory."""


Segment = tuple[int, int, int]
"""(start, stop, chunk): tokens start .. stop-1 in chunks of so many tokens."""
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]
"""(u, log_poles, residues, skip, pre_gate, post_gate, state): u and gates [B, D, T], not empty; log_poles, residues [D, N],
both real or both complex; skip [D]; state [B, D, N], complex if they are."""


class Tables(NamedTuple):
    """What one block of channels needs for chunks of one length."""

    toeplitz: Tensor  # [d, C, C], input j to output i
    collect: Tensor  # [d, C, M]; M = N real modes, or 2N of complex poles
    emit: Tensor  # [d, M, C]
    decay: Tensor  # [d, 1, N], float64 or complex128


def chunk_length(batch: int, tokens: int) -> int:
    """The largest power of two up to `tokens` whose square is at most batch * tokens.

    So a channel's Toeplitz matrix never outgrows its input, and short sequences of a large batch still go in few chunks.
    """
    chunk = 1
    while 2 * chunk <= min(LONGEST_CHUNK, tokens) and 4 * chunk * chunk <= batch * tokens:
        chunk *= 2
    return chunk


def _sizes(u: Tensor, log_poles: Tensor) -> tuple[int, int, int]:
    """Tokens of a chunk, channels of a block, and tokens of a segment: at least 16 chunks, or all that there are."""
    B, D, T = u.shape
    chunk, modes = chunk_length(B, T), log_poles.shape[1] * (2 if log_poles.is_complex() else 1)
    budget = BLOCK_ELEMENTS.get(u.device.type, 1 << 20)
    widest = min(budget // (chunk * (chunk + 2 * modes)), budget // (min(16, -(-T // chunk)) * B * (chunk + modes)))
    width = max(1, min(D, widest))
    return chunk, width, chunk * max(1, budget // (width * B * (chunk + modes)))


def num_segments(u: Tensor, log_poles: Tensor) -> int:
    """How many states `convolve` keeps for its gradients."""
    T, (chunk, _, span) = u.shape[-1], _sizes(u, log_poles)
    whole = T - T % chunk
    return -(-whole // span) + (1 if whole < T else 0)


def _plan(u: Tensor, log_poles: Tensor) -> tuple[list[slice], list[Segment]]:
    """Blocks of channels, and segments: whole chunks, then the rest as one shorter chunk."""
    (D, T), (chunk, width, span) = u.shape[1:], _sizes(u, log_poles)
    channels = [slice(start, min(start + width, D)) for start in range(0, D, width)]
    whole = T - T % chunk
    segments = [(start, min(start + span, whole), chunk) for start in range(0, whole, span)]
    return channels, segments + ([(whole, T, T - whole)] if whole < T else [])


def _tables(table: Tensor, residues: Tensor, chunk: int, dtype: torch.dtype) -> Tables:
    """From powers 0..C of the poles [d, N, C+1] and residues [d, N], both in double precision."""
    weighted = residues[..., None] * table[..., : chunk + 1]
    taps = weighted[..., :chunk].real.sum(dim=1).to(dtype)
    return Tables(
        toeplitz=F.pad(taps, (chunk - 1, 0)).unfold(-1, chunk, 1).flip(1),
        collect=real_modes(table[..., :chunk].flip(-1)).to(dtype).mT,
        emit=real_modes(weighted[..., 1:].conj_physical()).to(dtype),  # Re(r s) = Re(r) Re(s) + Im(conj r) Im(s)
        decay=table[..., chunk].unsqueeze(1),
    )


def _diagonal_sums(square: Tensor) -> Tensor:
    """[d, C, C] -> [d, C]: out[s] = sum_j square[j, j + s], by reading the padded rows with a pitch shorter by one."""
    C = square.shape[-1]
    padded = F.pad(square.flip(1), (0, C)).flatten(1)
    skewed = padded[:, : C * (2 * C - 1)].view(-1, C, 2 * C - 1)
    return skewed.sum(dim=1)[:, C - 1 :]


def _fold(table: Tensor, residues: Tensor, chunk: int, d: Tables) -> tuple[Tensor, Tensor]:
    """Gradients of log_poles and residues [d, N] from the gradients of the tables, in double precision."""
    is_complex = table.is_complex()
    used = table[..., : chunk + 1]
    d_weighted = torch.zeros_like(used)
    d_weighted[..., :chunk] += _diagonal_sums(d.toeplitz)[:, None].to(torch.float64)
    d_weighted[..., 1:] += complex_modes(d.emit.mT, is_complex).mT.conj_physical()
    d_used = residues.conj_physical()[..., None] * d_weighted
    d_used[..., :chunk] += complex_modes(d.collect, is_complex).mT.flip(-1)
    d_used[..., chunk] += d.decay.squeeze(1)
    exponents = torch.arange(chunk + 1, device=table.device, dtype=torch.float64)
    return (used.conj_physical() * d_used * exponents).sum(dim=-1), (used.conj_physical() * d_weighted).sum(dim=-1)


def _tree_scan(e: Tensor, decay: Tensor) -> Tensor:
    """s[c] = decay s[c-1] + e[c] along dim 2 of [d, B, n, N], decay [d, 1, N]: pairs first, then between the pairs."""
    n = e.shape[2]
    if n == 1:
        return e
    factor = decay.unsqueeze(2)
    even, odd = e[:, :, 0::2], e[:, :, 1::2]
    pairs = _tree_scan(torch.addcmul(odd, factor, even[:, :, : odd.shape[2]]), decay * decay)
    s = torch.empty_like(e)
    s[:, :, 1::2] = pairs
    s[:, :, 0] = e[:, :, 0]
    s[:, :, 2::2] = torch.addcmul(even[:, :, 1:], factor, pairs[:, :, : even.shape[2] - 1])
    return s


def _carry(e: Tensor, carry: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk [d, B, n, N] and after the last [d, B, N], from chunk sums e [d, B*n, M]."""
    d, B, N = carry.shape
    sums = complex_modes(e, carry.is_complex()).view(d, B, -1, N)
    sums[:, :, 0] += decay * carry
    after = _tree_scan(sums, decay)
    return torch.cat([carry.unsqueeze(2), after[:, :, :-1]], dim=2), after[:, :, -1]


def _rows(states: Tensor, dtype: torch.dtype) -> Tensor:
    """[d, B, n, N] -> [d, B*n, M] in the dtype of the matrix products."""
    pairs = torch.view_as_real(states.resolve_conj()).flatten(-2) if states.is_complex() else states
    return pairs.flatten(1, 2).to(dtype)


def _load(x: Tensor, channels: slice, start: int, stop: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """[B, D, T] -> the tile [d, B*n, chunk]."""
    tile = x[:, channels, start:stop].transpose(0, 1).to(dtype)
    return tile.reshape(tile.shape[0], -1, chunk)


def _store(out: Tensor, channels: slice, start: int, stop: int, tile: Tensor) -> None:
    out[:, channels, start:stop] = tile.reshape(tile.shape[0], -1, stop - start).transpose(0, 1)


class _Block:
    """A block of channels: its tables for every chunk length, and the sums of their gradients."""

    def __init__(
        self, channels: slice, log_poles: Tensor, residues: Tensor, segments: list[Segment], dtype: torch.dtype
    ):
        self.channels, self.dtype = channels, dtype
        self.residues = to_double(residues[channels])
        chunks = {chunk for _, _, chunk in segments}
        self.table = powers(log_poles[channels], torch.arange(max(chunks) + 1, device=log_poles.device))
        self.tables = {chunk: _tables(self.table, self.residues, chunk, dtype) for chunk in chunks}
        self.gradients: dict[int, Tables] = {}

    def load(self, x: Tensor, segment: Segment) -> Tensor:
        return _load(x, self.channels, *segment, self.dtype)

    def states(self, x: Tensor, carry: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        tables = self.tables[chunk]
        return _carry(torch.bmm(x, tables.collect), carry, tables.decay)

    def outputs(self, x: Tensor, before: Tensor, skip: Tensor | None, chunk: int) -> Tensor:
        tables = self.tables[chunk]
        y = torch.bmm(x, tables.toeplitz).baddbmm_(_rows(before, self.dtype), tables.emit)
        return y if skip is None else y.addcmul_(x, skip[self.channels, None, None].to(self.dtype))

    def adjoint_states(self, g: Tensor, carry: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Gradients of the state after each chunk [d, B, n, N], and of the one before the first [d, B, N]."""
        tables = self.tables[chunk]
        sums = torch.bmm(g, tables.emit.mT)
        backwards = sums.unflatten(1, (carry.shape[1], -1)).flip(2).flatten(1, 2)
        after, first = _carry(backwards, carry, tables.decay.conj_physical())
        return after.flip(2), first

    def input_gradient(self, g: Tensor, after: Tensor, skip: Tensor | None, chunk: int) -> Tensor:
        tables = self.tables[chunk]
        dx = torch.bmm(g, tables.toeplitz.mT).baddbmm_(_rows(after, self.dtype), tables.collect.mT)
        return dx if skip is None else dx.addcmul_(g, skip[self.channels, None, None].to(self.dtype))

    def add_gradients(self, x: Tensor, g: Tensor, before: Tensor, after: Tensor, chunk: int) -> None:
        new = Tables(
            toeplitz=torch.bmm(x.mT, g),
            collect=torch.bmm(x.mT, _rows(after, self.dtype)),
            emit=torch.bmm(_rows(before, self.dtype).mT, g),
            decay=(before.conj_physical() * after).sum(dim=(1, 2)).unsqueeze(1),
        )
        for total, part in zip(self.gradients.setdefault(chunk, Tables(*map(torch.zeros_like, new))), new, strict=True):
            total += part

    def parameter_gradients(self) -> tuple[Tensor, Tensor]:
        """Of log_poles and residues [d, N]; zero if add_gradients was never called, as nobody asked for them."""
        d_log_poles, d_residues = torch.zeros_like(self.residues), torch.zeros_like(self.residues)
        for chunk, gradients in self.gradients.items():
            from_poles, from_residues = _fold(self.table, self.residues, chunk, gradients)
            d_log_poles += from_poles
            d_residues += from_residues
        return d_log_poles, d_residues


def _forward_tile(
    block: _Block, segment: Segment, tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], carry: Tensor
) -> tuple[Tensor, Tensor]:
    """One segment of the forward: its outputs as a tile, and the state after it from that before it."""
    u, skip, pre_gate, post_gate = tensors
    x = block.load(u, segment)
    if pre_gate is not None:
        x = x * block.load(pre_gate, segment)
    before, carry = block.states(x, carry, segment[2])
    y = block.outputs(x, before, skip, segment[2])
    if post_gate is not None:
        y = y.mul_(block.load(post_gate, segment))
    return y, carry


def convolve(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """post_gate * (h (*) x + skip * x) with x = pre_gate * u, the state after the last token, and that before each segment."""
    u, log_poles, residues, skip, pre_gate, post_gate, state = arguments
    dtype = real_dtype(u, log_poles, residues)
    blocks, segments = _plan(u, log_poles)
    y, final = torch.empty(u.shape, dtype=u.dtype, device=u.device), state.new_empty(state.shape)
    starts = state.new_empty(len(segments), *state.shape)
    with torch.autocast(u.device.type, enabled=False):
        for channels in blocks:
            block = _Block(channels, log_poles, residues, segments, dtype)
            carry = to_double(state[:, channels].transpose(0, 1))
            for i, segment in enumerate(segments):
                starts[i, :, channels] = carry.transpose(0, 1)
                tile, carry = _forward_tile(block, segment, (u, skip, pre_gate, post_gate), carry)
                _store(y, channels, segment[0], segment[1], tile)
            final[:, channels] = carry.transpose(0, 1)
    return y, final, starts


def whole_convolve(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The outputs and the state of `convolve`, in operations that torch differentiates any number of times.

    All channels are one block, all whole chunks one segment. Memory: a few times u, N / C states a token, and for each
    channel a Toeplitz matrix no larger than its input.
    """
    T = int(u.shape[-1])  # a traced graph is for this length
    chunk = chunk_length(1, T)
    whole = T - T % chunk
    segments = [(0, whole, chunk)] + ([(whole, T, T - whole)] if whole < T else [])
    block = _Block(slice(None), log_poles, residues, segments, real_dtype(u, log_poles, residues))
    carry = to_double(state.transpose(0, 1))
    outputs = []
    for segment in segments:
        tile, carry = _forward_tile(block, segment, (u, skip, pre_gate, post_gate), carry)
        outputs.append(tile.unflatten(1, (u.shape[0], -1)).flatten(2))
    return torch.cat(outputs, dim=-1).transpose(0, 1).to(u.dtype), carry.transpose(0, 1).to(state.dtype)


def gradients(
    dy: Tensor, d_final: Tensor, arguments: Arguments, starts: Tensor, needed: list[bool]
) -> list[Tensor | None]:
    """Of the arguments, in their dtypes; None for one that is not needed."""
    u, log_poles, residues, skip, pre_gate, post_gate, _ = arguments
    blocks, segments = _plan(u, log_poles)
    found = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None
        for t, need in zip(arguments, needed, strict=True)
    ]
    with torch.autocast(u.device.type, enabled=False):
        for channels in blocks:
            block = _Block(channels, log_poles, residues, segments, real_dtype(u, log_poles, residues))
            carry = to_double(d_final[:, channels].transpose(0, 1))
            d_skip = torch.zeros(carry.shape[0], dtype=torch.float64, device=u.device)
            for segment, start_state in zip(reversed(segments), starts[:, :, channels].flip(0), strict=True):
                tensors = (u, skip, pre_gate, post_gate, dy)
                carry = _backward_tile(block, segment, tensors, start_state, carry, d_skip, found)
            for total, part in zip(found[1:4], (*block.parameter_gradients(), d_skip), strict=True):
                if total is not None:
                    total[channels] = part
            if found[6] is not None:
                found[6][:, channels] = carry.transpose(0, 1)
    return found


def _backward_tile(
    block: _Block,
    segment: Segment,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor],
    start_state: Tensor,
    carry: Tensor,
    d_skip: Tensor,
    found: list[Tensor | None],
) -> Tensor:
    """One segment of the backward: writes its part of du and the gates' gradients, adds to the tables' and to d_skip.

    Takes the gradient of the state after the segment, returns that of the state before it.
    """
    (start, stop, chunk), (u, skip, pre_gate, post_gate, dy) = segment, tensors
    du, d_log_poles, d_residues, _, d_pre, d_post, _ = found
    inputs, g = block.load(u, segment), block.load(dy, segment)
    gate = None if pre_gate is None else block.load(pre_gate, segment)
    x = inputs if gate is None else inputs * gate
    before, _ = block.states(x, to_double(start_state.transpose(0, 1)), chunk)
    if post_gate is not None:
        if d_post is not None:
            _store(d_post, block.channels, start, stop, g * block.outputs(x, before, skip, chunk))
        g = g * block.load(post_gate, segment)
    d_skip += (g * x).sum(dim=(1, 2))
    after, carry = block.adjoint_states(g, carry, chunk)
    if d_log_poles is not None or d_residues is not None:
        block.add_gradients(x, g, before, after, chunk)
    if du is not None or d_pre is not None:
        dx = block.input_gradient(g, after, skip, chunk)
        if du is not None:
            _store(du, block.channels, start, stop, dx if gate is None else dx * gate)
        if d_pre is not None:
            _store(d_pre, block.channels, start, stop, dx * inputs)
    return carry
