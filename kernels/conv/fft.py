"""Long convolution by FFT in plain torch: blocked over channels, with a hand-written backward.

On a CPU the page faults of large temporaries cost more than the transforms, so the channels are worked through in blocks
whose spectra stay in the cache. Only x and k are saved for the backward; their spectra are computed again.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Reals of one padded block: 4 MB in float32 on a CPU; on a GPU only a bound on memory."""


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


def _accumulation_dtype(x: Tensor, k: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, k.dtype) else torch.float32


def _blocks(batch: int, channels: int, size: int, device: torch.device) -> list[slice]:
    width = max(1, BLOCK_ELEMENTS.get(device.type, 1 << 24) // max(1, batch * size))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


class CausalConv(torch.autograd.Function):
    """y[b, d, t] = sum_s k[d, s] x[b, d, t - s] for x [B, D, T] and k [D, L] or [B, D, L]; y [B, D, T] in x.dtype.

    The transform has at least T + L - 1 points, so nothing wraps around. Gradients: dx is the correlation of dy with k,
    dk the correlation of dy with x, summed over the batch if k has no batch dimension.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor) -> Tensor:
        T = x.shape[-1]
        k_used = k[..., :T]
        size = fft_size(T + k_used.shape[-1] - 1)
        dtype = _accumulation_dtype(x, k)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for block in _blocks(x.shape[0], x.shape[1], size, x.device):
            spectrum = torch.fft.rfft(x[:, block].to(dtype), n=size)
            spectrum.mul_(torch.fft.rfft(k_used[..., block, :].to(dtype), n=size))
            y[:, block] = torch.fft.irfft(spectrum, n=size)[..., :T]
        ctx.save_for_backward(x, k)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, k = ctx.saved_tensors
        T = x.shape[-1]
        taps = min(T, k.shape[-1])
        size = fft_size(T + taps - 1)
        dtype = _accumulation_dtype(x, k)
        need_x, need_k = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_x else None
        dk = torch.zeros_like(k) if need_k else None  # taps beyond T reach no output: their gradient is zero
        for block in _blocks(x.shape[0], x.shape[1], size, x.device):
            grad = torch.fft.rfft(dy[:, block].to(dtype), n=size)
            if dk is not None:
                product = torch.fft.rfft(x[:, block].to(dtype), n=size).conj_physical_().mul_(grad)
                if k.ndim == 2:
                    product = product.sum(dim=0)
                dk[..., block, :taps] = torch.fft.irfft(product, n=size)[..., :taps]
            if dx is not None:
                grad.mul_(torch.fft.rfft(k[..., block, :taps].to(dtype), n=size).conj_physical_())
                dx[:, block] = torch.fft.irfft(grad, n=size)[..., :T]
        return dx, dk


def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """`CausalConv` with the empty cases that an FFT refuses."""
    if x.numel() == 0:
        return x * k.new_ones(()).to(x.dtype) + 0 * k.sum().to(x.dtype)
    y: Tensor = CausalConv.apply(x, k)  # type: ignore[no-untyped-call]
    return y
