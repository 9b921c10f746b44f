"""The average of weights against a loop, its exchange with the trained ones, and its parts on several ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from seqengine.ema import Ema
from seqengine.parallel.mesh import Mesh
from seqengine.parallel.sharding import fully_shard_model
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CPU = torch.device("cpu")


def make(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 7)).to(dtype)


def move(model, step):
    """A step of training, as far as an average is concerned; the same on every mesh."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a pass without a backward leaves the root unit gathered
    for i, parameter in enumerate(model.parameters()):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        with torch.no_grad():
            local.mul_(1.0 - 0.1 * step).add_(0.01 * (i + 1))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_is_that_of_the_written_out_sum(decay):
    model = make()
    ema = Ema(model, decay)
    seen = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for step in range(1, 6):
        move(model, step)
        ema.update(model, tokens_step=10)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert ema.tensors().keys() == {f"ema.{name}" for name in seen[0]}
    for name in seen[0]:
        expected = decay**5 * seen[0][name] + sum((1 - decay) * decay ** (5 - n) * seen[n][name] for n in range(1, 6))
        assert_close(ema.tensors()[f"ema.{name}"], expected, name)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_average_is_kept_in_single_precision_at_least(dtype, kept):
    model = make(dtype)
    ema = Ema(model, 0.9)
    move(model, 1)
    ema.update(model, tokens_step=1)
    assert {t.dtype for t in ema.tensors().values()} == {kept}
    assert not any(t.requires_grad for t in ema.tensors().values())
    with ema.applied(model):
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_step_without_tokens_moves_nothing():
    model = make()
    ema = Ema(model, 0.5)
    before = {name: t.clone() for name, t in ema.tensors().items()}
    move(model, 1)
    ema.update(model, tokens_step=0)
    assert all(torch.equal(t, before[name]) for name, t in ema.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_applied_gives_the_averages_and_takes_them_back_bit_for_bit(dtype):
    model = make(dtype)
    ema = Ema(model, 0.9)
    move(model, 3)
    ema.update(model, tokens_step=1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: t.clone() for name, t in ema.tensors().items()}
    with ema.applied(model):
        assert all(torch.equal(p, averages[f"ema.{name}"].to(dtype)) for name, p in model.named_parameters())
        assert not any(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        raise KeyboardInterrupt
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert all(torch.equal(t, averages[name]) for name, t in ema.tensors().items())


def test_what_is_loaded_into_the_tensors_in_place_is_the_average():
    model = make()
    ema, other = Ema(model, 0.9), Ema(make(), 0.9)
    move(model, 1)
    ema.update(model, tokens_step=1)
    for name, tensor in other.tensors().items():
        tensor.copy_(ema.tensors()[name])
    for each in (ema, other):
        each.update(model, tokens_step=1)
    assert all(torch.equal(t, ema.tensors()[name]) for name, t in other.tensors().items())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda ema: Ema(make(), 1.0), r"decay must lie in \[0, 1\); got 1.0"),
        (lambda ema: Ema(make(), -0.1), r"decay must lie in \[0, 1\)"),
        (
            lambda ema: ema.update(nn.Linear(5, 3).double(), tokens_step=1),
            "must have the averaged parameters and no others",
        ),
        (lambda ema: ema.update(make(), tokens_step=-1), "tokens_step must be at least 0"),
        (
            lambda ema: ema.update(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 7)), tokens_step=1),
            r"0.weight must have the shape of its average; got \(3, 4\) and \(3, 5\)",
        ),
    ],
)
def test_rejects(use, message):
    with pytest.raises(ValueError, match=message):
        use(Ema(make(), 0.9))


def outputs(mesh):
    """Of a pass with the trained weights, the averages, and the trained ones again; each leaves the root unit gathered."""
    model = make()
    fully_shard_model(model, mesh, blocks=[model[0]])
    ema = Ema(model, 0.75)
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5)
    found = []
    for step in range(1, 4):
        move(model, step)
        ema.update(model, tokens_step=2)
        with torch.no_grad():
            found.append(model(x))
            with ema.applied(model):
                found.append(model(x))
            found.append(model(x))
    averages = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in ema.tensors().items()}
    return found, averages


def _rank(group):
    return outputs(Mesh.create(group.size(), 1, CPU, num_shards=group.size()))


def test_sharded_averages_are_those_of_one_process():
    expected, averages = outputs(Mesh.single(CPU))
    assert not torch.equal(expected[0], expected[1])
    for found, of_rank in run_ranks(2, _rank):
        assert all(torch.equal(a, b) for a, b in zip(found[::3], found[2::3], strict=True))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        assert of_rank.keys() == averages.keys()
        assert all(torch.equal(of_rank[name], averages[name]) for name in averages)
