"""What the GPU tests share: inputs, the long convolution in float64, and errors held against limits."""

import torch

from seqengine.kernels.api import long_conv
from tests.kernels.triton.fft_cases import LIMIT as PRECISION_LIMIT

LIMIT = {**PRECISION_LIMIT, "torch": 1e-5, "float64": 1e-12}
"""Relative L2 errors of float32 arithmetic with these operands."""
TOEPLITZ_BF16X3, TOEPLITZ_TAPS = 1e-4, 512
"""What the Toeplitz product promises in bf16x3, and the taps up to which it is taken."""
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""What rounding a gated input, a product and the result to this dtype may add."""
AUTO = {torch.float64: "ieee", torch.float32: "bf16x3", torch.bfloat16: "fp16", torch.float16: "fp16"}
"""What precision 'auto' of the Triton kernels stands for."""


def draw(device, B, D, T, L, dtype, *, filters=None, gated=True, skip=True, past=False):
    """Arguments of long_conv and dy. filters: D, a divisor of D, or 'each' for a filter a sample."""
    generator = torch.Generator(device).manual_seed(B * 7919 + D * 104729 + T * 31 + L)

    def normal(*shape, of=dtype):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64).to(of)

    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (B, D, L) if filters == "each" else (filters or D, L)
    given = {"u": normal(B, D, T), "k": (normal(*shape, of=torch.float64) / L**0.5).to(parameters)}
    if skip:
        given["skip"] = normal(D, of=parameters)
    if gated:
        given |= {"pre_gate": normal(B, D, T), "post_gate": normal(B, D, T)}
    if past:
        given["initial_state"] = normal(B, D, L - 1)
    return given, normal(B, D, T)


def exact_conv(u, k, skip=None, pre_gate=None, post_gate=None, initial_state=None):
    """The gated convolution by one transform, differentiable by torch."""
    x = u if pre_gate is None else pre_gate * u
    stream = x if initial_state is None else torch.cat([initial_state, x], dim=-1)
    own = k if k.ndim == 3 else k.repeat_interleave(u.shape[1] // k.shape[0], dim=0)
    size = stream.shape[-1] + k.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(stream, n=size) * torch.fft.rfft(own, n=size), n=size)
    y = y[..., stream.shape[-1] - x.shape[-1] : stream.shape[-1]]
    y = y if skip is None else y + skip[:, None] * x
    return y if post_gate is None else post_gate * y


def outcome(function, given, dy):
    """The output and the gradient of every argument."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients)}}


def exact_outcome(given, dy):
    return outcome(exact_conv, {name: t.double() for name, t in given.items()}, dy.double())


def relative(actual, expected):
    """Relative L2 error; infinite if anything is not finite."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def limit(backend, precision, dtype, taps):
    """Of long_conv with so many taps."""
    if dtype == torch.float64:
        return LIMIT["float64"]
    way = "torch" if backend == "torch" else AUTO[dtype] if precision == "auto" else precision
    allowed = TOEPLITZ_BF16X3 if way == "bf16x3" and taps <= TOEPLITZ_TAPS else LIMIT[way]
    return allowed + ROUNDING[dtype]


def hold(found, expected, allowed, record=None, how="", dtype=torch.float32):
    """Every tensor within the limit; all errors are told, and recorded, before any fails."""
    errors = {name: relative(found[name], expected[name]) for name in expected}
    if record is not None:
        for name, error in errors.items():
            record(how, dtype, name, error, allowed)
    beyond = {name: f"{error:.2e}" for name, error in errors.items() if not error <= allowed}
    assert not beyond, f"{how}: relative errors {beyond} > {allowed:.0e}"


def check_long_conv(given, dy, backend, precision, record=None, kernel=""):
    """long_conv with every gradient, against float64."""

    def run(**arguments):
        return long_conv(**arguments, backend=backend, precision=precision)[0]

    dtype = given["u"].dtype
    found = outcome(run, given, dy)
    assert found["y"].dtype == dtype
    how = " ".join(part for part in (backend, kernel, precision) if part)
    hold(found, exact_outcome(given, dy), limit(backend, precision, dtype, given["k"].shape[-1]), record, how, dtype)


def same_bits(function, runs):
    """Tensors of every run equal those of the first, bit by bit; a race shows here."""
    first = [t.clone() for t in function()]
    assert all(bool(torch.isfinite(t).all()) for t in first)
    for run in range(1, runs):
        for i, (a, b) in enumerate(zip(function(), first)):
            assert torch.equal(a, b), (
                f"tensor {i} of run {run} differs in {int((a != b).sum())} of {b.numel()} elements"
            )
    return first
