"""attention on a CUDA device, every backend that runs there, against the definition in float64 on the CPU."""

from importlib.util import find_spec

import pytest
import torch

from seqengine.kernels.attention.op import attention

pytestmark = pytest.mark.gpu
LIMIT = {torch.float64: 2e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BACKENDS = ["auto", "torch", "sdpa", "flex", *(["flash-attn"] if find_spec("flash_attn") else [])]


def gradients(q, k, v, dout, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("T", "S", "G", "options"),
    [
        (1000, 1000, 4, {}),
        (1000, 1000, 2, {}),
        (1000, 1000, 4, {"causal": False}),
        (1, 1000, 2, {}),
        (700, 1000, 4, {}),
        (1000, 700, 2, {}),
        (1000, 1000, 2, {"window": 100}),
        (1000, 1000, 2, {"cu_seqlens": torch.tensor([0, 0, 3, 500, 1000])}),
    ],
    ids=str,
)
def test_matches_float64(T, S, G, options, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, T, 4, 64), (1, S, G, 64), (1, S, G, 64), (1, T, 4, 64))
    q, k, v, dout = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    expected = gradients(*(t.double() for t in (q, k, v, dout)), **options, backend="reference")
    moved = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    try:
        found = gradients(*(t.cuda() for t in (q, k, v, dout)), **moved, backend=backend)
    except ValueError as refusal:
        assert backend not in ("auto", "torch")
        pytest.skip(str(refusal))
    except RuntimeError as refusal:  # no fused kernel takes these tensors, and the unfused form is not allowed
        assert backend == "sdpa"
        pytest.skip(str(refusal))
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = float((a.cpu().double() - b).abs().max() / b.abs().max())
        assert error <= LIMIT[dtype], f"{name}: {error:.1e}"
