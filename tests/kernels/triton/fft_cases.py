"""What the tests of both FFT kernels share: the gated convolution in float64, its gradients, limits by precision."""

import torch

LIMIT = {"ieee": 1e-5, "bf16x3": 2e-5, "tf32": 1e-3, "fp16": 2e-3}
"""Relative L2 error of one pair of rows, every gradient included."""


def convolve(u, k, skip, pre, post):
    """The gated convolution by torch.fft in the dtype of u, differentiable."""
    x = u if pre is None else pre * u
    size = x.shape[-1] + k.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(k, n=size), n=size)[..., : x.shape[-1]]
    y = y if skip is None else y + skip[:, None] * x
    return y if post is None else post * y


def relative(actual, expected):
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def single(*tensors):
    return [None if x is None else x.detach().float() for x in tensors]


def check_everything(launchers, u, k, skip, pre, post, precision):
    """(forward, input gradient, filter gradient) against autograd in float64."""
    forward, input_gradient, filter_gradient = launchers
    u, k = u.requires_grad_(), k.requires_grad_()
    y = convolve(u, k, skip, pre, post)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    du, dk = torch.autograd.grad(y, (u, k), dy)
    u, k, skip, pre, post, dy = single(u, k, skip, pre, post, dy)
    limit = LIMIT[precision]
    assert relative(forward(u, k, skip, pre, post, precision), y.detach()) <= limit
    assert relative(input_gradient(dy, k, skip, pre, post, precision), du) <= limit
    assert relative(filter_gradient(dy, u, k.shape[-1], pre, post, precision), dk) <= limit
