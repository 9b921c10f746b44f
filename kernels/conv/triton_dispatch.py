"""Which Triton kernels a long convolution takes on a GPU, and its gradients from them. Launches only, no autograd.

    taps that reach an input <= TOEPLITZ_TAPS, or float64    blocked Toeplitz product (past and grouped filters inside)
    T + L - 1 <= 4096 (8192 in fp16)                         fused Monarch transform, one program a pair of rows
    else                                                     two-level transform

The FFT kernels know neither a past nor groups: a past goes in front of the gated input, filters are repeated. A filter for
each sample makes every (sample, channel) a channel of a batch of one. Block sizes and TOEPLITZ_TAPS follow from operation
counts and machine code; they have not been timed.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.conv import triton_monarch, triton_toeplitz, triton_two_level
from seqengine.kernels.conv.plan import TRITON_FLOAT64_TAPS
from seqengine.kernels.conv.spectral import Six, empty_gradients
from seqengine.kernels.conv.triton_monarch import Precision

TOEPLITZ_TAPS = 512
"""Most taps of the Toeplitz product, in general and in float64, which the FFT kernels do not have."""


def resolve_precision(precision: str, dtype: torch.dtype) -> Precision:
    """auto: fp16 operands for 16-bit tensors, three bfloat16 products for float32, ieee for float64."""
    if precision != "auto":
        return cast(Precision, precision)
    return "ieee" if dtype == torch.float64 else "bf16x3" if dtype == torch.float32 else "fp16"


def convolve(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    precision: str,
) -> Tensor:
    """`spectral.convolve` on a GPU, contiguous, in u.dtype. Traffic: see the kernel that the table names."""
    if u.numel() == 0:
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shape, how = u.shape, resolve_precision(precision, u.dtype)
    if k.ndim == 3:
        skip = None if skip is None else skip.repeat(shape[0])
        u, k = u.flatten(0, 1)[None], k.flatten(0, 1)
        pre_gate, post_gate, past = _fold(pre_gate), _fold(post_gate), _fold(past)
    if _takes_toeplitz(u, k, past):
        with torch.cuda.device_of(u):
            y = triton_toeplitz.toeplitz_forward(u, _used(k, u, past), past, skip, pre_gate, post_gate, how)
        return y.view(shape)
    filters = k.repeat_interleave(u.shape[1] // k.shape[0], dim=0)
    if past is None:
        forward, _, _ = _fft_kernels(u.shape[-1], k.shape[-1], how)
        return forward(u, filters, skip, pre_gate, post_gate, how).view(shape)
    stream = _stream(u, pre_gate, past)
    forward, _, _ = _fft_kernels(stream.shape[-1], k.shape[-1], how)
    y = forward(stream, filters, skip, None, None, how)[..., past.shape[-1] :]
    return (y.clone() if post_gate is None else (y * post_gate).to(y.dtype)).view(shape)


def gradients(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    precision: str,
) -> Six:
    """`spectral.gradients` on a GPU. The gradient of post_gate is a convolution gated by dy: nothing is kept for it."""
    out = list(empty_gradients(u, k, skip, pre_gate, post_gate, past, needed))
    if u.numel() == 0:
        return cast(Six, tuple(t.zero_() for t in out))
    found: dict[int, Tensor | None] = {}
    if needed[2]:
        found[2] = _dot(_gated(dy, post_gate), _gated(u, pre_gate))
    if needed[4]:
        found[4] = convolve(u, k, skip, pre_gate, dy, past, precision)
    if k.ndim == 3:
        skip = None if skip is None else skip.repeat(u.shape[0])
        own = [_fold(t) for t in (dy, u, pre_gate, post_gate, past)]
        filters = k.flatten(0, 1)
    else:
        own, filters = [dy, u, pre_gate, post_gate, past], k
    how = resolve_precision(precision, u.dtype)
    by_kernels = _toeplitz_gradients if _takes_toeplitz(u, k, past) else _fft_gradients
    found |= by_kernels(filters, skip, *own, needed, how)  # type: ignore[arg-type, call-arg]
    for i, gradient in found.items():
        if needed[i] and gradient is not None:
            out[i] = gradient.to(out[i].dtype).reshape(out[i].shape)
    return cast(Six, tuple(out))


def _toeplitz_gradients(
    k: Tensor,
    skip: Tensor | None,
    dy: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    how: Precision,
) -> dict[int, Tensor | None]:
    """Those of u, k, pre_gate and past, by their places."""
    found: dict[int, Tensor | None] = {}
    taps = _used(k, u, past)
    with torch.cuda.device_of(u):
        if needed[0] or needed[3] or needed[5]:
            found[0], found[3], found[5] = triton_toeplitz.toeplitz_input_gradient(
                dy, taps, skip, pre_gate, post_gate, u, how, past=needed[5]
            )
        if needed[1]:
            dk = triton_toeplitz.toeplitz_filter_gradient(
                dy, u, taps.shape[-1], k.shape[0], past, pre_gate, post_gate, how
            )
            found[1] = F.pad(dk, (0, k.shape[-1] - taps.shape[-1]))
    return found


def _fft_gradients(
    k: Tensor,
    skip: Tensor | None,
    dy: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    how: Precision,
) -> dict[int, Tensor | None]:
    """Those of u, k, pre_gate and past, by their places. With a past, both gates are applied before the kernels."""
    found: dict[int, Tensor | None] = {}
    x, x_gate, keep = u, pre_gate, 0
    if past is not None:
        keep = past.shape[-1]
        dy, post_gate = F.pad(_gated(dy, post_gate).to(dy.dtype), (keep, 0)), None
        x, x_gate = _stream(u, pre_gate, past), None
    _, input_gradient, filter_gradient = _fft_kernels(x.shape[-1], k.shape[-1], how)
    if needed[0] or needed[3] or needed[5]:
        filters = k.repeat_interleave(u.shape[1] // k.shape[0], dim=0)
        fused = None if needed[3] else x_gate
        dstream = input_gradient(dy, filters, skip, fused, post_gate, how)
        dx = dstream[..., keep:]
        found[0] = (dx * pre_gate) if fused is None and pre_gate is not None else dx.clone() if keep else dx
        found[3] = dx * u if needed[3] else None
        found[5] = dstream[..., :keep].clone()
    if needed[1]:
        dk = filter_gradient(dy, x, k.shape[-1], x_gate, post_gate, how)
        found[1] = dk.unflatten(0, (k.shape[0], -1)).sum(dim=1)
    return found


def _fft_kernels(T: int, L: int, how: Precision) -> tuple[Callable[..., Tensor], ...]:
    """Forward, input gradient and filter gradient: by the Monarch transform where it holds T + L - 1 points."""
    longest = 8192 if how == "fp16" else 4096
    if T + min(L, T) - 1 <= longest:
        m = triton_monarch
        return m.monarch_forward, m.monarch_input_gradient, m.monarch_filter_gradient
    t = triton_two_level
    return t.two_level_forward, t.two_level_input_gradient, t.two_level_filter_gradient


def _takes_toeplitz(u: Tensor, k: Tensor, past: Tensor | None) -> bool:
    return _reach(u, k, past) <= (TRITON_FLOAT64_TAPS if u.dtype == torch.float64 else TOEPLITZ_TAPS)


def _reach(u: Tensor, k: Tensor, past: Tensor | None) -> int:
    """Taps that reach an input."""
    return k.shape[-1] if past is not None else min(k.shape[-1], u.shape[-1])


def _used(k: Tensor, u: Tensor, past: Tensor | None) -> Tensor:
    return k[:, : _reach(u, k, past)]


def _fold(x: Tensor | None) -> Tensor | None:
    """[B, D, n] -> [1, B D, n]."""
    return None if x is None else x.flatten(0, 1)[None]


def _stream(u: Tensor, pre_gate: Tensor | None, past: Tensor) -> Tensor:
    """The gated input after the past."""
    return torch.cat([past.to(u.dtype), _gated(u, pre_gate).to(u.dtype)], dim=-1)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over batch and time, in float32 at least, [D]."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    products: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return products.sum(dim=0)
