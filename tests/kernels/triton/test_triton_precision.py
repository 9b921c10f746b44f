"""Error of each precision against float64: the table of kernels/README.md. TF32 is emulated: operands rounded to 11 bits.

python -m pytest -s prints what was measured.
"""

import numpy as np
import pytest
import torch

from seqengine.kernels.api import long_conv

pytest.importorskip("triton.runtime.interpreter")

LIMIT = {
    ("toeplitz", "ieee"): 5e-7, ("toeplitz", "bf16x3"): 5e-5, ("toeplitz", "tf32"): 5e-4, ("toeplitz", "fp16"): 6e-4,
    ("monarch", "ieee"): 6e-7, ("monarch", "bf16x3"): 2e-5, ("monarch", "tf32"): 9e-4, ("monarch", "fp16"): 9e-4,
    ("two levels", "ieee"): 6e-7, ("two levels", "bf16x3"): 2e-5, ("two levels", "tf32"): 9e-4, ("two levels", "fp16"): 9e-4,
}  # fmt: skip
"""Relative L2 error of the output and of both gradients, float32 tensors of normal noise."""
SIZES = {"toeplitz": (2, 2, 300, 200), "monarch": (2, 2, 700, 700), "two levels": (1, 1, 5000, 5000)}


def rounded_to_tf32(x):
    """float32 with 10 bits of mantissa, to the nearest, ties to even."""
    bits = x.view(np.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).view(np.float32)


@pytest.fixture
def tensor_cores_round(monkeypatch):
    """tl.dot with input_precision tf32 rounds its operands, as tensor cores do."""
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *rest):
        if input_precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (interpreter.TensorHandle(rounded_to_tf32(t.data), t.dtype) for t in (a, b))
        return exact(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def outcome(u, k, dy, **settings):
    leaves = [t.clone().requires_grad_() for t in (u, k)]
    y, _ = long_conv(*leaves, **settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(("kernel", "precision"), LIMIT, ids=str)
def test_error_of_each_precision_is_as_documented(kernel, precision, tensor_cores_round):
    B, D, T, L = SIZES[kernel]
    generator = torch.Generator().manual_seed(0)
    u, k, dy = (torch.randn(*shape, generator=generator) for shape in ((B, D, T), (D, L), (B, D, T)))
    exact = outcome(u.double(), k.double(), dy.double())
    found = outcome(u, k, dy, backend="triton", precision=precision)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    print(f"\n{kernel} {precision}: y {errors[0]:.1e}, du {errors[1]:.1e}, dk {errors[2]:.1e}")
    assert max(errors) <= LIMIT[kernel, precision]


def test_emulated_tf32_does_round(tensor_cores_round):
    assert rounded_to_tf32(np.float32([1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [1.0, 1 + 2**-9]
    assert LIMIT["monarch", "tf32"] > 100 * LIMIT["monarch", "ieee"]
