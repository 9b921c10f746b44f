"""Modal filters as a product of two thin tables, so that N powers for each of T lags never exist at once.

With t = c C + j the power lambda^t is lambda^(cC) lambda^j: a filter of T taps is, channel by channel, a [T/C, N] matrix
times an [N, C] matrix, and N (T/C + C) exponentials do the work of N T. Exponents are multiplied out in float64: in float32
the phase Im(log_pole) t alone would be off by 0.1 at t = 2^20.
"""

import torch
from torch import Tensor
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
    Cosine and sine instead of torch.polar: the second derivative of polar divides by magnitudes, which may be zero.
    """
    exponents = exponents.to(torch.float64)
    magnitude = torch.exp(log_poles.real.to(torch.float64).clamp(min=-1e4)[..., None] * exponents)
    if not log_poles.is_complex():
        return magnitude
    phase = log_poles.imag.to(torch.float64)[..., None] * exponents
    return torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))


def real_modes(x: Tensor) -> Tensor:
    """Complex [..., N, E] -> real [..., 2N, E], real and imaginary rows in turn; real tensors pass."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, -2).flatten(-3, -2) if x.is_complex() else x


def complex_modes(x: Tensor, is_complex: bool) -> Tensor:
    """Real [..., 2N] with real and imaginary parts in turn -> complex128 [..., N]; float64 if there are no such pairs."""
    x = x.to(torch.float64)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if is_complex else x


def _fine_lags(length: int) -> int:
    """The smallest power of two whose square is at least `length`: both tables are then about equally long."""
    fine = 1
    while fine * fine < length:
        fine *= 2
    return fine


def _lags(log_poles: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The fine lags 0 .. C-1 and the coarse ones 0, C, 2C, .. < length."""
    fine, device = _fine_lags(length), log_poles.device
    return torch.arange(fine, device=device), torch.arange(0, length, fine, device=device)


def _blocks(log_poles: Tensor, coarse: int, fine: int) -> list[slice]:
    D, N = log_poles.shape
    width = max(1, BLOCK_ELEMENTS.get(log_poles.device.type, 1 << 22) // (coarse * fine + 2 * N * (coarse + fine)))
    return [slice(start, min(start + width, D)) for start in range(0, D, width)]


def whole_taps(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """`taps` of all channels at once, in operations that torch differentiates any number of times."""
    dtype = real_dtype(log_poles, residues)
    lags, starts = _lags(log_poles, length)
    at_start = residues[..., None] * powers(log_poles, starts)
    left = real_modes(at_start.conj_physical()).to(dtype).mT  # Re(a b) = Re a Re b + Im(conj a) Im b
    right = real_modes(powers(log_poles, lags)).to(dtype)
    return (left @ right).flatten(1)[:, :length]


def taps(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """k[d, t] = Re sum_n residues[d, n] exp(log_poles[d, n] t) for t < length, length >= 1; both real, or both complex."""
    lags, starts = _lags(log_poles, length)
    k = torch.empty(log_poles.shape[0], length, dtype=real_dtype(log_poles, residues), device=log_poles.device)
    with torch.autocast(log_poles.device.type, enabled=False):
        for block in _blocks(log_poles, len(starts), len(lags)):
            k[block] = whole_taps(log_poles[block], residues[block], length)
    return k


def gradients(dk: Tensor, log_poles: Tensor, residues: Tensor) -> tuple[Tensor, Tensor]:
    """Of log_poles, conj(residues sum_t dk t lambda^t), and of residues, conj(sum_t dk lambda^t)."""
    is_complex, length = log_poles.is_complex(), dk.shape[-1]
    lags, starts = _lags(log_poles, length)
    coarse, fine = len(starts), len(lags)
    d_log_poles = torch.empty(log_poles.shape, dtype=log_poles.dtype, device=log_poles.device)
    d_residues = torch.empty(residues.shape, dtype=residues.dtype, device=residues.device)
    with torch.autocast(dk.device.type, enabled=False):
        for block in _blocks(log_poles, coarse, fine):
            g = F.pad(dk[block], (0, coarse * fine - length)).unflatten(-1, (-1, fine))
            right = powers(log_poles[block], lags)
            plain = complex_modes(g @ real_modes(right).to(dk.dtype).mT, is_complex)  # [d, T/C, N]
            by_lag = complex_modes(g @ real_modes(right * lags).to(dk.dtype).mT, is_complex)
            at_start = powers(log_poles[block], starts).mT
            d_residues[block] = (at_start * plain).sum(dim=1).conj_physical()
            by_time = (at_start * (by_lag + starts[:, None] * plain)).sum(dim=1)
            d_log_poles[block] = (residues[block] * by_time).conj_physical()
    return d_log_poles, d_residues
