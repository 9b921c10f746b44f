"""Long convolution by FFT in plain torch, without autograd: the arithmetic behind the custom operators of `ops.py`.

Two methods. Whole: one transform of T + L - 1 points a row. Overlap-save: frames of N points that step by N - L + 1, when the
filter is short against the sequence: fewer points, and a frame stays in the cache. Both work through the channels in blocks: on
a CPU the page faults of large temporaries cost more than the transforms. Gradients transform dy once for both dx and dk.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Reals of one padded block: 4 MB in float32 on a CPU; on a GPU only a bound on memory."""
FRAME_RATIO = 4
"""Points of an overlap-save frame for each tap, at least."""
SMALLEST_FRAME = 1024


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
    """How T outputs of an L-tap filter are made: `count` frames of `size` points, `hop` outputs each."""

    size: int
    hop: int
    count: int

    @property
    def is_whole(self) -> bool:
        return self.count == 1


@lru_cache(maxsize=1024)
def plan(T: int, L: int, device_type: str) -> Plan:
    """Overlap-save where the sequence holds at least two frames, else whole.

    On a GPU always whole: launches cost more than points there.
    """
    whole = fft_size(T + L - 1)
    frame = max(SMALLEST_FRAME, 1 << (FRAME_RATIO * L - 1).bit_length())
    hop = frame - L + 1
    count = -(-T // hop)
    if device_type == "cpu" and frame * 2 <= whole:
        return Plan(frame, hop, count)
    return Plan(whole, T, 1)


def convolve(x: Tensor, k: Tensor) -> Tensor:
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s]: x [B, D, T], k [D, L] or [B, D, L]; y [B, D, T] in x.dtype, contiguous."""
    T, L = x.shape[-1], min(k.shape[-1], x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    how, dtype = plan(T, L, x.device.type), _accumulation_dtype(x, k)
    for block in _blocks(x.shape[0], x.shape[1], how, x.device):
        taps = torch.fft.rfft(_taps(k, block, L).to(dtype), n=how.size)
        part = x[:, block].to(dtype)
        if how.is_whole:
            spectrum = torch.fft.rfft(part, n=how.size).mul_(taps)
            y[:, block] = torch.fft.irfft(spectrum, n=how.size)[..., :T]
            continue
        frames = _frames(part, how, before=L - 1)
        spectrum = torch.fft.rfft(frames).mul_(taps[..., None, :])
        rows = torch.fft.irfft(spectrum, n=how.size)[..., L - 1 :]
        y[:, block] = rows.flatten(-2)[..., :T]
    return y


def gradients(dy: Tensor, x: Tensor, k: Tensor, need_x: bool, need_k: bool) -> tuple[Tensor, Tensor]:
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
        # Frames of dy reach L - 1 positions ahead; those of x are its hops alone, so that products do not wrap around.
        ahead, alone = dy[:, block].to(dtype), x[:, block].to(dtype) if need_k else None
        if not how.is_whole:
            ahead = _frames(ahead, how, before=0)
            alone = (
                None
                if alone is None
                else F.pad(alone, (0, how.count * how.hop - T)).unflatten(-1, (how.count, how.hop))
            )
        spectrum = torch.fft.rfft(ahead, n=how.size)
        if alone is not None:
            product = torch.fft.rfft(alone, n=how.size).conj_physical_().mul_(spectrum)
            if not how.is_whole:
                product = product.sum(dim=-2)
            if k.ndim == 2:
                product = product.sum(dim=0)
            dk[..., block, :L] = torch.fft.irfft(product, n=how.size)[..., :L]
        if need_x:
            taps = torch.fft.rfft(_taps(k, block, L).to(dtype), n=how.size).conj_physical_()
            spectrum.mul_(taps if how.is_whole else taps[..., None, :])
            rows = torch.fft.irfft(spectrum, n=how.size)[..., : how.hop]
            dx[:, block] = rows if how.is_whole else rows.flatten(-2)[..., :T]
    return dx, dk


def _accumulation_dtype(x: Tensor, k: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, k.dtype) else torch.float32


def _blocks(batch: int, channels: int, how: Plan, device: torch.device) -> list[slice]:
    width = max(1, BLOCK_ELEMENTS.get(device.type, 1 << 24) // max(1, batch * how.size * how.count))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def _taps(k: Tensor, block: slice, L: int) -> Tensor:
    return k[..., block, :L]


def _frames(x: Tensor, how: Plan, before: int) -> Tensor:
    """[..., T] -> [..., count, size]: frame i begins `before` positions before output i * hop; zeros outside x."""
    needed = (how.count - 1) * how.hop + how.size
    padded = F.pad(x, (before, needed - before - x.shape[-1]))
    return padded.unfold(-1, how.size, how.hop)
