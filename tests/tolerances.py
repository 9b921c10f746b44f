"""Every tolerance of the tests, in one place: largest error relative to the largest expected value. Never loosened."""

import torch

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float | None = None) -> None:
    """Same shape, finite, and within the tolerance of the actual dtype."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    limit = RELATIVE[actual.dtype] if tolerance is None else tolerance
    scale = max(float(expected.double().abs().max()), 1e-30)
    error = float((actual.double() - expected.double()).abs().max()) / scale
    assert error <= limit, f"{what}: relative error {error:.2e} > {limit:.0e}"
