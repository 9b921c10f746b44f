"""Tensors without data come out of every operation as tensors with data do: shape, strides, dtype, shared storage."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from seqengine.unfilled import NeedsDataError, Unfilled, Unfilling

aten = torch.ops.aten
LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "moved": lambda x: x.movedim(2, 0),
    "cut": lambda x: x[:, 1:],
    "every other": lambda x: x[..., ::2],
    "spread": lambda x: x[:, :1].expand_as(x),
}
ELEMENTWISE = {
    "sin": torch.sin,
    "half": lambda x: x.half() * 2,
    "to complex": lambda x: torch.complex(x, x).abs(),
    "of integers": lambda x: x.long() / 3,
    "comparison": lambda x: (x > 0) & (x < 1) | (x == 2),
    "with a row": lambda x: x + torch.ones(x.shape[-1], dtype=torch.float64),
    "with a column": lambda x: torch.ones(x.shape[0], 1, 1) * x,
    "with another order": lambda x: x * torch.ones(*reversed(x.shape)).permute(2, 1, 0),
    "other, then it": lambda x: torch.ones(*reversed(x.shape)).permute(2, 1, 0) - x,
    "where": lambda x: torch.where(x > 0, x, 0),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
    "cumsum": lambda x: x.cumsum(1),
    "tril": lambda x: x.tril(),
    "cumsum of integers": lambda x: x.long().cumsum(0),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.int32),
    "clone": lambda x: x.clone(),
    "clone, contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "in place": lambda x: torch.zeros_like(x).add_(x).mul_(2).clamp_(0),
    "out": lambda x: torch.mul(x, x, out=torch.empty_like(x)),
}
OTHERS = {
    "sum": lambda x: x.sum((0, 2)),
    "sum, kept": lambda x: x.long().sum(1, keepdim=True),
    "mean": lambda x: x.mean(-1),
    "all": lambda x: (x > 0).all(),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "vecdot": lambda x: torch.linalg.vecdot(x, x[:1]),
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 5),
    "linear": lambda x: F.linear(x, torch.ones(5, x.shape[-1]), torch.ones(5)),
    "cat": lambda x: torch.cat([x, x.double()], 1),
    "stack": lambda x: torch.stack([x, x, x], -1),
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1]), torch.ones(x.shape[-1])),
    "rfft": lambda x: torch.fft.rfft(x, n=16),
    "pad": lambda x: F.pad(x, (1, 2)),
    "views": lambda x: x.reshape(-1)[3:].view(1, -1).unbind(1)[2],
    "flip": lambda x: x.flip(1),
    "embedding": lambda x: F.embedding(x.long().clamp(0, 1), torch.ones(2, 3)),
}
FACTORIES = {
    "arange": lambda: torch.arange(7),
    "arange, steps": lambda: torch.arange(1, 8, 2),
    "arange, fractions": lambda: torch.arange(0.5, 3, 0.7),
    "arange, dtype": lambda: torch.arange(3, dtype=torch.float64),
    "linspace": lambda: torch.linspace(0, 1, 5),
    "full": lambda: torch.full((2, 3), 1.5),
    "randn": lambda: torch.randn(2, 3),
    "rand": lambda: torch.rand(4, dtype=torch.float64),
    "eye": lambda: torch.eye(3, dtype=torch.float64),
    "numbers": lambda: torch.tensor([1, 2, 3]) * 2,
}


def told(x):
    """Strides of axes of one element say nothing."""
    return x.dtype, tuple(x.shape), [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1], x.device


def compare(make):
    real = make()
    with Unfilling():
        unfilled = make()
    assert told(unfilled) == told(real)
    return unfilled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_elementwise_results_lie_as_real_ones(operation, layout):
    compare(lambda: ELEMENTWISE[operation](LAYOUTS[layout](torch.ones(4, 6, 8))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OTHERS)
def test_results_lie_as_real_ones(operation, layout):
    compare(lambda: OTHERS[operation](LAYOUTS[layout](torch.ones(4, 6, 8))))


@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_made_has_no_data_but_numbers_that_are_given(name):
    assert isinstance(compare(FACTORIES[name]), Unfilled) == (name != "numbers")


@pytest.mark.parametrize("operation", ["sin", "gelu", "silu", "softplus", "log_sigmoid", "cumsum", "with a row"])
def test_gradients_lie_as_real_ones(operation):
    def gradient():
        x = torch.ones(4, 6, 8, requires_grad=True)
        y = ELEMENTWISE[operation](x.transpose(1, 2))
        y.backward(torch.ones_like(y))
        return x.grad

    compare(gradient)


@pytest.mark.parametrize("operation", ["layer_norm", "glu", "linear", "cat", "stack", "rfft", "views", "mean"])
def test_other_gradients_lie_as_real_ones(operation):
    def gradient():
        x = torch.ones(4, 6, 8, requires_grad=True)
        y = OTHERS[operation](x)
        y.backward(torch.ones_like(y))
        return x.grad

    compare(gradient)


def test_a_view_shares_its_storage_and_a_copy_has_its_own():
    with Unfilling():
        x = torch.ones(4, 6)
        views = x[1:], x.t(), x.view(-1), x.detach(), x.add_(1)
        assert {v.untyped_storage()._cdata for v in views} == {x.untyped_storage()._cdata}
        assert x.untyped_storage().nbytes() == 4 * 6 * 4
        assert x.clone().untyped_storage()._cdata != x.untyped_storage()._cdata


@pytest.mark.parametrize(
    "look",
    [lambda x: x.item(), lambda x: float(x), lambda x: x.tolist(), lambda x: bool(x), lambda x: torch.equal(x, x)],
)
def test_a_value_that_is_not_there_cannot_be_looked_at(look):
    with Unfilling(), pytest.raises(NeedsDataError, match="without data has none"):
        look(torch.ones(()))


def test_a_change_of_shape_in_place_is_refused_when_it_is_met():
    with Unfilling():
        x = torch.ones(4, 6)
        x.data = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"became torch.float32 \[3\] in place"):
            x + 1


def test_a_plan_does_not_import_the_compiler():
    code = (
        "import sys; from seqengine.launch.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'torch._dynamo' in sys.modules)"
    )
    words = ["plan", "hyenadna-large-1m", "--nodes", "512", "--gpus-per-node", "8", "--search"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
