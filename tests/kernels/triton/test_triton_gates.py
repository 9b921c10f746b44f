"""Gates, casts and padding around cuFFT, fused in Triton, in its interpreter: alone, and inside the torch backend."""

import pytest
import torch

from seqengine.kernels.api import long_conv
from seqengine.kernels.conv import stream
from seqengine.kernels.conv.triton_gates import cut_gated, pad_gated
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("T", "keep", "size"), [(1, 0, 1), (7, 0, 16), (5, 9, 14), (2047, 3, 4100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_padding_gates_casts_and_puts_the_past_in_front(T, keep, size, dtype):
    x, gate = randn(2, T, 3, dtype=dtype).transpose(1, 2), randn(2, 3, T, seed=1, dtype=dtype)
    past = randn(2, 3, keep + 1, seed=2, dtype=dtype)[..., 1:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    zeros = torch.zeros(2, 3, size - keep - T, dtype=wide)
    own = x.to(wide) * gate.to(wide)
    assert torch.equal(pad_gated(x, gate, past, keep, size, wide), torch.cat([past.to(wide), own, zeros], -1))
    nothing = torch.zeros(2, 3, keep, dtype=wide)
    assert torch.equal(pad_gated(x, None, None, keep, size, wide), torch.cat([nothing, x.to(wide), zeros], -1))


def test_cutting_gates_twice_and_casts():
    z, gate, other = randn(2, 3, 40, dtype=torch.float32)[..., :33], randn(2, 3, 20, seed=1), randn(2, 3, 20, seed=2)
    y, second = torch.empty(2, 3, 20, dtype=torch.float16), torch.empty(2, 5, 20, dtype=torch.float32)[:, 1:4]
    cut_gated(z, 7, gate.half(), y, other.float(), second)
    assert torch.equal(y, (z[..., 7:27] * gate.half()).half())
    assert torch.equal(second, z[..., 7:27] * other.float())
    cut_gated(z.transpose(0, 1).contiguous().transpose(0, 1), 0, None, y)
    assert torch.equal(y, z[..., :20].half())


@pytest.mark.parametrize("left_out", [(), ("initial_state",), ("pre_gate", "post_gate", "skip")], ids=str)
@pytest.mark.parametrize(("T", "L"), [(1, 1), (30, 7), (30, 61)], ids=str)
def test_the_torch_backend_of_a_gpu_is_the_definition_with_every_gradient(T, L, left_out, monkeypatch):
    shapes = {
        "u": (2, 4, T), "k": (2, L), "skip": (4,), "pre_gate": (2, 4, T), "post_gate": (2, 4, T),
        "initial_state": (2, 4, L - 1),
    }  # fmt: skip
    given = {n: randn(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items()) if n not in left_out}

    def run(backend):
        leaves = {n: t.clone().requires_grad_() for n, t in given.items()}
        y, _ = long_conv(**leaves, backend=backend)
        wanted = torch.autograd.grad(y, list(leaves.values()), randn(*y.shape, seed=9))
        return {"y": y, **dict(zip(leaves, wanted, strict=True))}

    expected = run("reference")
    monkeypatch.setattr(stream, "is_fused", lambda device_type: True)
    for name, actual in run("torch").items():
        assert_close(actual, expected[name], name)
