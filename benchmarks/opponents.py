"""What the convolutions are measured against, each as its users call it, and our own calls.

    fft             rfft of size 2 T of input and filter, product, irfft, skip and gates by torch: the field's models
    fft-blocked     on a CPU, the same eight channels at a time with a backward by hand that saves the inputs only: an hour's
                    work, without the page faults and the memory that cost most in the first
    conv1d          torch's Conv1d, depthwise, of which the first T outputs are kept; the skip stands in the tap at lag 0
    flash-fft-conv  FlashFFTConv of Fu et al. 2023, arXiv:2311.05908: transforms of 2 T points, gates inside
    causal-conv1d   the CUDA kernel of the Mamba models, 2 to 4 taps

The last two are measured where their packages (`flashfftconv`, `causal_conv1d`) are installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from measure import PRECISION_TOLERANCE, TOLERANCE, Contender, Function, Inputs, is_installed
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.api import long_conv, long_conv_bidirectional
from seqengine.kernels.conv.plan import fft_size

LONGEST_CONV1D = 512
"""Taps beyond which a direct convolution is not worth the wait."""
FLASH_SIZES = (256, 1024, *(2**i for i in range(12, 23)))
"""Transforms that FlashFFTConv has."""
BLOCK_OF_CHANNELS = 8
MODULES = {"flash-fft-conv": "flashfftconv", "causal-conv1d": "causal_conv1d"}
NAMES = ("fft", "fft-blocked", "conv1d", "flash-fft-conv", "causal-conv1d")


@dataclass(frozen=True)
class Case:
    """Sizes of a long convolution."""

    batch: int
    channels: int
    length: int
    taps: int
    dtype: str
    gated: bool = False
    bidirectional: bool = False

    def __str__(self) -> str:
        what = f"{' gated' if self.gated else ''}{' bidirectional' if self.bidirectional else ''}"
        return f"B {self.batch} D {self.channels} T {self.length:>7} L {self.taps:>7} {self.dtype}{what}"

    @property
    def needed_bytes(self) -> int:
        """About what forward and backward of the reference take in float32: 48 bytes an input, 40 a filter's point."""
        return (48 * self.batch + 40 * (2 if self.bidirectional else 1)) * self.channels * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def draw_inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    """Normal noise; u, gates and dy in the case's dtype, filters and skip in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    B, D, T, L, dtype = case.batch, case.channels, case.length, case.taps, case.torch_dtype
    inputs = {"u": normal(B, D, T).to(dtype), "k": normal(D, L) / L**0.5, "skip": normal(D)}
    if case.bidirectional:
        inputs["k_backward"] = normal(D, L) / L**0.5
    if case.gated:
        inputs |= {"pre_gate": normal(B, D, T).to(dtype), "post_gate": normal(B, D, T).to(dtype)}
    return inputs, normal(B, D, T).to(dtype)


def few(t: Tensor) -> Tensor:
    """Two samples at most, of four channels at most."""
    return t[:2, :4] if t.ndim == 3 else t[:4]


def fft(x: Inputs) -> Tensor:
    """In the filter's precision; two-sided by the conjugate spectrum of the second filter."""
    u, k = _gated(x["u"], x.get("pre_gate")), x["k"]
    T = u.shape[-1]
    n = 2 * T
    spectrum = torch.fft.rfft(k, n=n)
    if "k_backward" in x:
        spectrum = spectrum + torch.fft.rfft(x["k_backward"], n=n).conj()
    y = torch.fft.irfft(torch.fft.rfft(u.to(k.dtype), n=n) * spectrum, n=n)[..., :T]
    return _gated((y + u * x["skip"][:, None]).to(u.dtype), x.get("post_gate"))


class _Blocked(torch.autograd.Function):
    """y = k (*) u + skip u by transforms of a smooth size >= T + L - 1, block of channels by block."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(u, k, skip)
        T, n, y = u.shape[-1], fft_size(u.shape[-1] + k.shape[-1] - 1), torch.empty_like(u)
        for own in _blocks_of_channels(u):
            product = torch.fft.rfft(u[:, own], n=n).mul_(torch.fft.rfft(k[own], n=n))
            torch.addcmul(torch.fft.irfft(product, n=n)[..., :T], u[:, own], skip[own, None], out=y[:, own])
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dy,), (u, k, skip) = cotangents, ctx.saved_tensors
        T, L, n = u.shape[-1], k.shape[-1], fft_size(u.shape[-1] + k.shape[-1] - 1)
        du, dk, dskip = torch.empty_like(u), torch.empty_like(k), torch.empty_like(skip)
        for own in _blocks_of_channels(u):
            spectrum = torch.fft.rfft(dy[:, own], n=n)
            product = torch.fft.rfft(u[:, own], n=n).conj_physical_().mul_(spectrum).sum(dim=0)
            dk[own] = torch.fft.irfft(product, n=n)[..., :L]
            dskip[own] = (dy[:, own] * u[:, own]).sum(dim=(0, 2))
            product = spectrum.mul_(torch.fft.rfft(k[own], n=n).conj_physical_())
            torch.addcmul(torch.fft.irfft(product, n=n)[..., :T], dy[:, own], skip[own, None], out=du[:, own])
        return du, dk, dskip


def _blocks_of_channels(u: Tensor) -> list[slice]:
    return [slice(first, first + BLOCK_OF_CHANNELS) for first in range(0, u.shape[1], BLOCK_OF_CHANNELS)]


def fft_blocked(x: Inputs) -> Tensor:
    u = _gated(x["u"], x.get("pre_gate")).to(x["k"].dtype)
    y: Tensor = _Blocked.apply(u, x["k"], x["skip"])  # type: ignore[no-untyped-call]
    return _gated(y.to(x["u"].dtype), x.get("post_gate"))


def conv1d(x: Inputs) -> Tensor:
    u = _gated(x["u"], x.get("pre_gate"))
    T, L = u.shape[-1], x["k"].shape[-1]
    taps = torch.cat([x["k"][:, :1] + x["skip"][:, None], x["k"][:, 1:]], dim=1).flip(-1).to(u.dtype)
    y = F.conv1d(u, taps[:, None], padding=L - 1, groups=u.shape[1])[..., :T]
    return _gated(y, x.get("post_gate"))


@lru_cache(maxsize=4)
def _flash(size: int, dtype: torch.dtype, device: torch.device) -> Any:
    from flashfftconv import FlashFFTConv

    return FlashFFTConv(size, dtype=dtype).to(device)


def flash_fft_conv(x: Inputs) -> Tensor:
    u, k, pre, post = x["u"], x["k"], x.get("pre_gate"), x.get("post_gate")
    module = _flash(2 * u.shape[-1], u.dtype, u.device)
    if pre is None or post is None:
        y: Tensor = module(u, k)
        return y + (u * x["skip"][:, None]).to(u.dtype)
    y = module(u, k, pre, post)
    return y + (pre * u * x["skip"][:, None] * post).to(u.dtype)


def causal_conv1d(x: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    u = _gated(x["u"], x.get("pre_gate"))
    taps = torch.cat([x["k"][:, :1] + x["skip"][:, None], x["k"][:, 1:]], dim=1).flip(-1)
    y: Tensor = causal_conv1d_fn(u, taps.contiguous(), None, activation=None)
    return _gated(y, x.get("post_gate"))


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate * x


def ours(backend: str, precision: str) -> Function:
    """long_conv, or the two-sided one where there are two filters."""

    def call(x: Inputs) -> Tensor:
        arguments: dict[str, Any] = {name: t for name, t in x.items() if name not in ("u", "k", "k_backward")}
        if "k_backward" in x:
            return long_conv_bidirectional(x["u"], x["k"], x["k_backward"], backend=backend, **arguments)  # type: ignore[arg-type]
        return long_conv(x["u"], x["k"], backend=backend, precision=precision, **arguments)[0]  # type: ignore[arg-type]

    return call


def our_contender(backend: str, precision: str, case: Case) -> Contender:
    name = backend if precision == "auto" else f"{backend}/{precision}"
    allowed = max(TOLERANCE[case.torch_dtype], _precision_tolerance(backend, precision, case.torch_dtype))
    return Contender(name, ours(backend, precision), allowed)


def _precision_tolerance(backend: str, precision: str, dtype: torch.dtype) -> float:
    """Triton's auto is bf16x3 for float32."""
    resolved = "bf16x3" if (backend, precision, dtype) == ("triton", "auto", torch.float32) else precision
    return PRECISION_TOLERANCE[resolved]


def our_unfit(backend: str, precision: str, case: Case) -> str | None:
    """Why ours does not take part; None if it does."""
    if case.bidirectional and precision != "auto":
        return "long_conv_bidirectional has no precision"
    if backend != "triton" and precision not in ("auto", "ieee"):
        return f"backend {backend} has no precision {precision}"
    return None


def unfit(name: str, case: Case, device: torch.device) -> str | None:
    """Why an opponent does not take part; None if it does."""
    if name == "fft":
        return None
    if name == "fft-blocked":
        return "causal only" if case.bidirectional else "CPU only" if device.type != "cpu" else None
    if name == "conv1d":
        if case.bidirectional:
            return "causal only"
        return f"more than {LONGEST_CONV1D} taps" if case.taps > LONGEST_CONV1D else None
    if device.type != "cuda":
        return "CUDA only"
    if case.bidirectional:
        return "causal only"
    if name == "causal-conv1d":
        return None if 2 <= case.taps <= 4 else "2 to 4 taps only"
    if case.dtype == "float32":
        return "no float32"
    return None if 2 * case.length in FLASH_SIZES else f"no transform of {2 * case.length} points"


def missing(names: list[str]) -> list[str]:
    """Those whose package is not installed."""
    return [name for name in names if name in MODULES and not is_installed(MODULES[name])]


FUNCTIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "fft": fft,
    "fft-blocked": fft_blocked,
    "conv1d": conv1d,
    "flash-fft-conv": flash_fft_conv,
    "causal-conv1d": causal_conv1d,
}


def opponent(name: str, case: Case) -> Contender:
    return Contender(name, FUNCTIONS[name], TOLERANCE[case.torch_dtype])
