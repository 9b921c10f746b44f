"""Long convolution by FFT in plain torch, without autograd: the arithmetic behind the custom operators of `ops.py`.

Three methods. Whole: one transform of T + L - 1 points a row. Frames (overlap-save), when the filter is short: frames of N
points that step by N - L + 1. Partitions, when both are long: see `partitioned.py`. The last two keep each transform in
the cache. All work through the channels in blocks: on a CPU the page faults of large temporaries cost more than the
transforms. Gradients transform dy once for both dx and dk.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.conv.partitioned import convolve_block, gradients_block, pieces

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Reals of one padded block: 4 MB in float32 on a CPU; on a GPU only a bound on memory."""
IN_CACHE, LONGEST_WHOLE = 1 << 15, 1 << 16
"""Points of one transform on a CPU. Up to the first it stays in a core's cache; beyond the second, partitions are faster."""
FRAME_RATIO = 4
"""Points of an overlap-save frame for each tap, at least."""
SMALLEST_FRAME, LONGEST_FRAME = 1 << 10, 1 << 15
SMALLEST_PIECE, MOST_PIECES = 1 << 13, 8
"""Partitions: pieces of at least so many values, and, where that allows, at most so many pieces."""


@lru_cache(maxsize=256)
def fft_size(length: int) -> int:
    """The smallest even 2^a 3^b 5^c that is >= length: sizes with large prime factors cost several times more."""
    best = 2
    while best < length:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(2, 1 << max(1, (-(-length // three) - 1).bit_length()))
            if three * two >= length:
                best = min(best, three * two)
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class Plan:
    """How T outputs of an L-tap filter are made.

    whole: one transform of `size`. frames: `count` of `size` points, `hop` outputs each. partitions: pieces of `hop`.
    """

    method: Literal["whole", "frames", "partitions"]
    size: int
    hop: int
    count: int


@lru_cache(maxsize=1024)
def plan(T: int, L: int, device_type: str) -> Plan:
    """Frames where the sequence holds several; else whole while that is short enough; else partitions.

    Two frames are enough where one transform would leave the cache, four where it would not. On a GPU always whole: launches
    cost more than points there. Measured on two cores, D = 256, T = 2^14 .. 2^17 (benchmarks/conv.py).
    """
    whole = fft_size(T + L - 1)
    frame = max(SMALLEST_FRAME, 1 << (FRAME_RATIO * L - 1).bit_length())
    enough = 2 if whole > IN_CACHE else 4
    if device_type == "cpu" and frame <= LONGEST_FRAME and enough * frame <= whole:
        hop = frame - L + 1
        return Plan("frames", frame, hop, -(-T // hop))
    if device_type == "cpu" and whole > LONGEST_WHOLE:
        piece = max(SMALLEST_PIECE, 1 << (-(-L // MOST_PIECES) - 1).bit_length())
        return Plan("partitions", 2 * piece, piece, pieces(T, piece))
    return Plan("whole", whole, T, 1)


def convolve(x: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s] + skip[d] x[b, d, t]: y [B, D, T] in x.dtype, contiguous."""
    T, L = x.shape[-1], min(k.shape[-1], x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    how, dtype = plan(T, L, x.device.type), _accumulation_dtype(x, k)
    for block in _blocks(x.shape[0], x.shape[1], how, x.device):
        part, filters = x[:, block].to(dtype), _filters(k, skip, block, L, dtype)
        if how.method == "partitions":
            y[:, block] = convolve_block(part, filters, how.hop)
            continue
        taps = torch.fft.rfft(filters, n=how.size)
        if how.method == "whole":
            spectrum = torch.fft.rfft(part, n=how.size).mul_(taps)
            y[:, block] = torch.fft.irfft(spectrum, n=how.size)[..., :T]
            continue
        frames = _frames(part, how, before=L - 1)
        spectrum = torch.fft.rfft(frames).mul_(taps[..., None, :])
        rows = torch.fft.irfft(spectrum, n=how.size)[..., L - 1 :]
        y[:, block] = rows.flatten(-2)[..., :T]
    return y


def gradients(
    dy: Tensor, x: Tensor, k: Tensor, skip: Tensor | None, need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """dx[b, d, s] = sum_t dy[t] k[t - s] and dk[d, j] = sum_{b, t} dy[t] x[t - j], of the shapes and dtypes of x and k.

    What is not needed is an empty tensor. dk is summed over the batch, unless k has one; taps beyond T get zero.
    """
    T, L = x.shape[-1], min(k.shape[-1], x.shape[-1])
    dx = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    dk = torch.zeros(k.shape if need_k else (0,), dtype=k.dtype, device=k.device)
    if x.numel() == 0:
        return dx, dk
    how, dtype = plan(T, L, x.device.type), _accumulation_dtype(x, k)
    for block in _blocks(x.shape[0], x.shape[1], how, x.device):
        grad, part = dy[:, block].to(dtype), x[:, block].to(dtype)
        filters = _filters(k, skip, block, L, dtype)
        if how.method == "partitions":
            found = gradients_block(grad, part, filters, how.hop, need_x, need_k)
        else:
            found = _gradients_block(grad, part, filters, how, need_x, need_k)
        if found[0] is not None:
            dx[:, block] = found[0]
        if found[1] is not None:
            dk[..., block, :L] = found[1]
    return dx, dk


def _gradients_block(
    dy: Tensor, x: Tensor, k: Tensor, how: Plan, need_x: bool, need_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """By whole transforms or frames.

    Frames of dy reach L - 1 positions ahead, those of x are its hops alone: no product wraps around.
    """
    T, L = x.shape[-1], k.shape[-1]
    is_whole = how.method == "whole"
    spectrum = torch.fft.rfft(dy if is_whole else _frames(dy, how, before=0), n=how.size)
    dx: Tensor | None = None
    dk: Tensor | None = None
    if need_k:
        alone = x if is_whole else F.pad(x, (0, how.count * how.hop - T)).unflatten(-1, (how.count, how.hop))
        product = torch.fft.rfft(alone, n=how.size).conj_physical_().mul_(spectrum)
        product = product if is_whole else product.sum(dim=-2)
        product = product.sum(dim=0) if k.ndim == 2 else product
        dk = torch.fft.irfft(product, n=how.size)[..., :L]
    if need_x:
        taps = torch.fft.rfft(k, n=how.size).conj_physical_()
        spectrum.mul_(taps if is_whole else taps[..., None, :])
        rows = torch.fft.irfft(spectrum, n=how.size)[..., : how.hop]
        dx = rows if is_whole else rows.flatten(-2)[..., :T]
    return dx, dk


def _filters(k: Tensor, skip: Tensor | None, block: slice, L: int, dtype: torch.dtype) -> Tensor:
    """The first L taps of some channels, skip added to lag 0."""
    filters = k[..., block, :L].to(dtype)
    if skip is None:
        return filters
    filters = filters.clone() if k.dtype == dtype else filters
    filters[..., 0] += skip[block].to(dtype)
    return filters


def _accumulation_dtype(x: Tensor, k: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, k.dtype) else torch.float32


def _blocks(batch: int, channels: int, how: Plan, device: torch.device) -> list[slice]:
    width = max(1, BLOCK_ELEMENTS.get(device.type, 1 << 24) // max(1, batch * how.size * how.count))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def _frames(x: Tensor, how: Plan, before: int) -> Tensor:
    """[..., T] -> [..., count, size]: frame i begins `before` positions before output i * hop; zeros outside x."""
    needed = (how.count - 1) * how.hop + how.size
    padded = F.pad(x, (before, needed - before - x.shape[-1]))
    return padded.unfold(-1, how.size, how.hop)
