"""Tensors of more than 2^31 elements on a CUDA device: the last channels lie beyond what 32-bit offsets reach."""

import pytest
import torch

from seqengine.kernels.api import long_conv, short_conv
from tests.gpu.cases import exact_conv, relative

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _free_memory(_needs_cuda):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip(f"needs 60 GiB of free GPU memory; {free >> 30} GiB are free")
    yield
    torch.cuda.empty_cache()


def noise(device, *shape):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_short_conv_forward_and_backward(device, backend):
    D, T, W = 9, 2**28, 4
    u, w, dy = noise(device, 1, D, T).requires_grad_(), torch.randn(D, W, device=device), noise(device, 1, D, T)
    w = w.to(torch.bfloat16).requires_grad_()
    y, _ = short_conv(u, w, backend=backend)
    du, dw = torch.autograd.grad(y, (u, w), dy)
    for d in (0, 7, D - 1):
        for part in (slice(0, 1000), slice(T - 1000, T)):
            first = max(0, part.start - W + 1)
            own = [t.detach()[:, d : d + 1, first : part.stop].double() for t in (u, dy)]
            taps = w.detach()[d : d + 1].double()
            x = own[0]
            expected = sum(taps[:, s, None] * torch.nn.functional.pad(x, (s, 0))[..., : x.shape[-1]] for s in range(W))
            skip = part.start - first
            assert relative(y[:, d : d + 1, part], expected[..., skip:]) <= 2e-2
    x, g = u.detach()[0, D - 1].double(), dy[0, D - 1].double()
    last = T - 1 - torch.arange(1000, device=device)
    expected = sum(
        w.detach()[D - 1, s].double() * torch.where(last + s < T, g[(last + s).clamp(max=T - 1)], 0.0) for s in range(W)
    )
    assert relative(du[0, D - 1, last], expected) <= 2e-2
    sums = torch.stack([(g[s:] * x[: T - s]).sum() for s in range(W)])
    assert relative(dw[D - 1], sums) <= 2e-2


@pytest.mark.parametrize(("backend", "L"), [("torch", 2**20), ("triton", 2**20), ("triton", 100)])
def test_long_conv_forward(device, backend, L):
    T = 2**20
    D = 2**11 + 8
    u, pre = noise(device, 1, D, T), noise(device, 1, D, T)
    k = torch.randn(8, L, device=device) / L**0.5
    y, _ = long_conv(u, k, pre_gate=pre, backend=backend)
    for d in (0, D // 2, D - 2, D - 1):
        own = (u[:, d : d + 1].double(), k[d // (D // 8)][None].double(), None, pre[:, d : d + 1].double())
        assert relative(y[:, d : d + 1], exact_conv(*own)) <= 8e-3
