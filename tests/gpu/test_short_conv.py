"""short_conv on a CUDA device: both backends, every gradient, against float64 on the CPU."""

import pytest
import torch

from seqengine.kernels.api import short_conv
from tests.gpu.cases import same_bits
from tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(device, B, D, T, W, dtype, past=True):
    generator = torch.Generator().manual_seed(T * 31 + W)
    sizes = {"u": (B, D, T), "w": (D, W), "bias": (D,), "initial_state": (B, D, W - 1), "dy": (B, D, T)}
    drawn = {n: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for n, s in sizes.items()}
    dy = drawn.pop("dy")
    if not past:
        del drawn["initial_state"]
    return {n: t.to(device) for n, t in drawn.items()}, dy.to(device)


def outcome(given, dy, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
    y, _ = short_conv(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


def check(given, dy, backend, **options):
    exact = outcome({n: t.cpu().double() for n, t in given.items()}, dy.cpu().double(), backend="reference", **options)
    found = outcome(given, dy, backend=backend, **options)
    for name, a, b in zip(("y", *given), found, exact, strict=True):
        assert_close(a.cpu(), b, name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 2, 3, 4, 7, 31])
def test_every_gradient(device, backend, dtype, W):
    for T, activation in ((1, None), (257, "silu"), (4099, None)):
        check(*tensors(device, 2, 5, T, W, dtype), backend, activation=activation)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_documents(device, backend):
    given, dy = tensors(device, 1, 5, 1000, 4, torch.float32, past=False)
    bounds = torch.tensor([0, 1, 3, 600, 1000])
    exact = outcome(
        {n: t.cpu().double() for n, t in given.items()}, dy.cpu().double(), backend="reference", cu_seqlens=bounds
    )
    found = outcome(given, dy, backend=backend, cu_seqlens=bounds.to(device))
    for a, b in zip(found, exact, strict=True):
        assert_close(a.cpu(), b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_channels_last(device, backend):
    given, dy = tensors(device, 2, 33, 1001, 4, torch.bfloat16, past=False)
    given["u"] = given["u"].mT.contiguous().mT
    check(given, dy.mT.contiguous().mT, backend, activation="silu")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bitwise_the_same_in_five_runs(device, backend):
    given, dy = tensors(device, 3, 64, 5001, 4, torch.bfloat16)
    same_bits(lambda: outcome(given, dy, backend=backend, activation="silu"), 5)
