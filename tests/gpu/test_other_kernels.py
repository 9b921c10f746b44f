"""The other kernels and the model on a CUDA device, against the same functions in float64 on the CPU."""

import pytest
import torch

from seqengine.kernels.api import linear_cross_entropy, modal_conv, modal_filter
from tests.gpu.cases import hold

pytestmark = pytest.mark.gpu

LIMIT = {torch.float64: 2e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def gradients(function, given, dy):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    y = function(**leaves)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(device=y.device, dtype=y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, found)}}


def compare(function, given, dy, dtype):
    found = gradients(function, given, dy)
    expected = gradients(function, {n: t.cpu().double() for n, t in given.items()}, dy.cpu().double())
    hold({n: t.cpu() for n, t in found.items()}, expected, LIMIT[dtype])


def as_pairs(given):
    """Complex tensors as real pairs."""
    return {n: torch.view_as_real(t) if t.is_complex() else t for n, t in given.items()}


def modal_inputs(device, dtype, B, D, T, N, kind):
    generator = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 0.2 - 1e-3
    log_poles = torch.complex(decay, normal(D, N)) if kind == "complex" else decay
    residues = torch.complex(normal(D, N), normal(D, N)) if kind == "complex" else normal(D, N)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    parameter = single.to_complex() if kind == "complex" else single
    given = {"u": normal(B, D, T).to(dtype), "log_poles": log_poles.to(parameter), "residues": residues.to(parameter)}
    given |= {
        "skip": normal(D).to(single),
        "pre_gate": normal(B, D, T).to(dtype),
        "post_gate": normal(B, D, T).to(dtype),
    }
    return {n: t.to(device) for n, t in given.items()}, normal(B, D, T).to(dtype).to(device)


def complex_safe(function, given):
    """The function of real tensors: complex arguments come in as pairs."""
    is_complex = {n for n, t in given.items() if t.is_complex()}
    return lambda **x: function(**{n: torch.view_as_complex(t) if n in is_complex else t for n, t in x.items()})


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("T", [1, 65, 3001])
def test_modal_conv_with_every_gradient(device, T, dtype, kind):
    given, dy = modal_inputs(device, dtype, 2, 5, T, 4, kind)
    function = complex_safe(lambda **x: modal_conv(**x)[0], given)
    compare(function, as_pairs(given), dy, dtype)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_modal_filter_with_every_gradient(device, kind):
    given, _ = modal_inputs(device, torch.float32, 1, 5, 1, 4, kind)
    poles = {n: given[n] for n in ("log_poles", "residues")}
    dk = torch.randn(5, 10_001, device=device)
    function = complex_safe(lambda **x: modal_filter(**x, length=10_001), poles)
    compare(function, as_pairs(poles), dk, torch.float32)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tile", [None, 37])
def test_linear_cross_entropy_with_every_gradient(device, dtype, tile):
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden": torch.randn(3, 101, 48, generator=generator).to(device, dtype),
        "weight": torch.randn(77, 48, generator=generator).to(device, dtype),
    }
    labels = torch.randint(77, (3, 101), generator=generator)
    labels[0, :7] = -100
    counts = []

    def loss(hidden, weight):
        nats, count = linear_cross_entropy(hidden, weight, labels.to(hidden.device), tile=tile)
        counts.append(int(count))
        return nats

    compare(loss, given, torch.tensor(0.5, device=device), dtype)
    assert counts == [296, 296]


def test_a_model_trains_as_on_the_cpu(device):
    """Loss and gradients of the first step as in float64, and a loss that falls."""
    pytest.importorskip("pydantic")
    from seqengine.model import LanguageModel, ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(d_model=32, n_layer=2, max_len=512, embed_dropout=0.0)
    model = LanguageModel(config).to(device)
    exact = LanguageModel(config).double()
    exact.load_state_dict({name: t.cpu().double() for name, t in model.state_dict().items()}, strict=False)
    ids = torch.randint(4, (2, 501), generator=torch.Generator().manual_seed(1))
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        nats, count = model.loss(ids[:, :-1].to(device), ids[:, 1:].to(device))
        (nats / count).backward()
        losses.append(float(nats.detach() / count))
        if step == 0:
            nats, count = exact.loss(ids[:, :-1], ids[:, 1:])
            (nats / count).backward()
            assert abs(losses[0] - float(nats.detach() / count)) <= 1e-5 * losses[0]
            own = dict(exact.named_parameters())
            found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
            largest = max(float(own[n].grad.abs().max()) for n in found)
            for name, gradient in found.items():
                assert float((gradient.double() - own[name].grad).abs().max()) <= 1e-4 * largest, name
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
