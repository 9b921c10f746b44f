"""Modal filters as a product of two thin tables, so that N powers for each of T lags never exist at once.

With t = c C + j the power lambda^t is lambda^(cC) lambda^j: a filter of T taps is, channel by channel, a [T/C, N] matrix
times an [N, C] matrix, and N (T/C + C) exponentials do the work of N T. Exponents are multiplied out in float64: in float32
the phase Im(log_pole) t alone would be off by 0.1 at t = 2^20.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Numbers of one block of channels: filter and tables stay in the cache of a CPU; on a GPU only a bound on memory."""


def real_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64 or complex128, else float32."""
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if double else torch.float32


def to_double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def powers(log_poles: Tensor, exponents: Tensor) -> Tensor:
    """exp(log_poles[..., None] * exponents) [..., N, E], in float64 or complex128.

    A real part of -inf counts as -1e4, whose exponential is zero all the same, because -inf * 0 would be NaN at exponent 0.
    """
    exponents = exponents.to(torch.float64)
    magnitude = torch.exp(log_poles.real.to(torch.float64).clamp(min=-1e4)[..., None] * exponents)
    if not log_poles.is_complex():
        return magnitude
    return torch.polar(magnitude, log_poles.imag.to(torch.float64)[..., None] * exponents)


def real_modes(x: Tensor) -> Tensor:
    """Complex [..., N, E] -> real [..., 2N, E], real and imaginary rows in turn; real tensors pass."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, -2).flatten(-3, -2) if x.is_complex() else x


def complex_modes(x: Tensor, is_complex: bool) -> Tensor:
    """Real [..., 2N] with real and imaginary parts in turn -> complex128 [..., N]; float64 if there are no such pairs."""
    x = x.to(torch.float64)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if is_complex else x


def _fine_lags(length: int) -> int:
    """The power of two next above sqrt(length): both tables are then about equally long."""
    return 1 << (((length - 1).bit_length() + 1) // 2)


def _blocks(log_poles: Tensor, coarse: int, fine: int) -> list[slice]:
    D, N = log_poles.shape
    width = max(1, BLOCK_ELEMENTS.get(log_poles.device.type, 1 << 22) // (coarse * fine + 2 * N * (coarse + fine)))
    return [slice(start, min(start + width, D)) for start in range(0, D, width)]


class ModalFilter(torch.autograd.Function):
    """k[d, t] = Re sum_n residues[d, n] exp(log_poles[d, n] t) for t < length, length >= 1; both real, or both complex.

    Gradients, with g = dL/dk: d_residues = conj(sum_t g lambda^t) and d_log_poles = conj(residues sum_t g t lambda^t).
    """

    @staticmethod
    def forward(ctx: Any, log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
        dtype, device = real_dtype(log_poles, residues), log_poles.device
        fine = _fine_lags(length)
        lags = torch.arange(fine, device=device)
        starts = torch.arange(0, length, fine, device=device)
        k = torch.empty(log_poles.shape[0], length, dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for block in _blocks(log_poles, len(starts), fine):
                at_start = residues[block, :, None] * powers(log_poles[block], starts)
                left = real_modes(at_start.conj()).to(dtype).mT  # Re(a b) = Re a Re b + Im(conj a) Im b
                right = real_modes(powers(log_poles[block], lags)).to(dtype)
                k[block] = (left @ right).flatten(1)[:, :length]
        ctx.save_for_backward(log_poles, residues)
        return k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor) -> tuple[Tensor, Tensor, None]:
        log_poles, residues = ctx.saved_tensors
        is_complex, length, device = log_poles.is_complex(), dk.shape[-1], dk.device
        fine = _fine_lags(length)
        lags = torch.arange(fine, device=device)
        starts = torch.arange(0, length, fine, device=device)
        d_log_poles, d_residues = torch.empty_like(log_poles), torch.empty_like(residues)
        with torch.autocast(device.type, enabled=False):
            for block in _blocks(log_poles, len(starts), fine):
                g = F.pad(dk[block], (0, len(starts) * fine - length)).unflatten(-1, (-1, fine))
                right = powers(log_poles[block], lags)
                plain = complex_modes(g @ real_modes(right).to(dk.dtype).mT, is_complex)  # [d, T/C, N]
                by_lag = complex_modes(g @ real_modes(right * lags).to(dk.dtype).mT, is_complex)
                at_start = powers(log_poles[block], starts).mT
                d_residues[block] = (at_start * plain).sum(dim=1).conj()
                by_time = (at_start * (by_lag + starts[:, None] * plain)).sum(dim=1)
                d_log_poles[block] = (residues[block] * by_time).conj()
        return d_log_poles, d_residues, None
