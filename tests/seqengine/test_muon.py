"""Muon against its definition written out in float64, against torch's, and the parameters that it takes in every mixer."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.mixers.registry import MIXERS
from seqengine.model import LanguageModel
from seqengine.muon import Muon, orthogonalise
from seqengine.optim import muon_names
from tests.ranks import run_ranks
from tests.tolerances import assert_close

SHAPES = [(4, 4), (3, 8), (8, 3), (1, 5), (6, 1)]
OUT = "out_proj"
PROJECTIONS = {
    "attention": {"qkv_proj", OUT},
    "gated_delta": {"inputs.proj", "gate", OUT},
    "gla": {"inputs.proj", "gate", OUT},
    "h3": {"in_proj", OUT},
    "hyena": {"in_proj", OUT},
    "hyena_li": {"in_proj", OUT},
    "hyena_mr": {"in_proj", OUT},
    "hyena_se": {"in_proj", OUT},
    "linear_attention": {"inputs.proj", OUT},
    "long_conv": {OUT},
    "retention": {"inputs.proj", "gate", OUT},
    "s4_ptd": {OUT},
    "s4d": {OUT},
    "sgconv": {OUT},
    "slstm": set(),
    "ssd": {"inputs.proj", "gate", OUT},
}
"""What Muon takes of each mixer; a new mixer has to say."""


def matrices(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(step, parameter):
    generator = torch.Generator().manual_seed(100 * step + parameter.numel())
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def train(optimizer, parameters, steps=4):
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = gradients(step, parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def written_out(parameters, steps, lr, weight_decay, mu, num_steps):
    """The formulas, with polynomials of singular values in place of products of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    found = []
    for parameter in parameters:
        weight, momentum = parameter.detach().clone(), torch.zeros_like(parameter)
        for step in range(steps):
            gradient = gradients(step, parameter)
            momentum = mu * momentum + (1 - mu) * gradient
            u, s, vh = torch.linalg.svd(mu * momentum + (1 - mu) * gradient, full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(num_steps):
                s = a * s + b * s**3 + c * s**5
            update = 0.2 * max(weight.shape) ** 0.5 * (u * s) @ vh
            weight = weight - lr * weight_decay * weight - lr * update
        found.append(weight)
    return found


@pytest.mark.parametrize(("mu", "num_steps", "weight_decay"), [(0.95, 5, 0.1), (0.0, 1, 0.0), (0.5, 7, 0.3)])
def test_steps_follow_the_definition(mu, num_steps, weight_decay):
    parameters = matrices()
    expected = written_out(parameters, 4, 0.05, weight_decay, mu, num_steps)
    optimizer = Muon(parameters, lr=0.05, weight_decay=weight_decay, momentum=mu, num_steps=num_steps)
    for actual, wanted in zip(train(optimizer, parameters), expected, strict=True):
        assert_close(actual, wanted, str(tuple(wanted.shape)))


def test_in_bfloat16_it_is_torchs():
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    mine = train(Muon(ours, lr=0.05, weight_decay=0.1, dtype=torch.bfloat16), ours)
    other = train(torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b in zip(mine, other, strict=True):
        assert_close(a, b)


def test_float32_is_near_float64():
    single, double = matrices(torch.float32), matrices()
    for a, b in zip(train(Muon(single, lr=0.05), single), train(Muon(double, lr=0.05), double), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b.float(), tolerance=2e-5)


def test_steps_are_as_large_as_those_of_adamw():
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=1.0).step()
    assert 0.15 < float(parameter.detach().square().mean().sqrt()) < 0.25


def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_vectors():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = matrix.clone()
    found = orthogonalise(matrix, 5, torch.float64)
    assert torch.equal(matrix, kept)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ found @ vh.T
    assert_close(core, torch.diag(core.diagonal()))
    assert 0.6 < float(core.diagonal().min()) <= float(core.diagonal().max()) < 1.3
    assert_close(orthogonalise(matrix.T, 5, torch.float64), found.T)
    assert torch.equal(orthogonalise(torch.zeros(3, 4), 5, torch.float32), torch.zeros(3, 4))


def test_scale_of_the_gradient_does_not_matter_and_nothing_moves_without_one():
    one, other, idle = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(3))
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one.grad, other.grad = gradient, 1e6 * gradient
    Muon([one, other, idle], lr=0.1).step()
    assert_close(one, other)
    assert torch.equal(idle, torch.ones(3, 4, dtype=torch.float64))


def test_two_runs_and_a_resumed_one_agree_bit_for_bit():
    runs = []
    for _ in range(2):
        parameters = matrices(torch.float32)
        runs.append(train(Muon(parameters, lr=0.05), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    parameters = matrices(torch.float32)
    first = Muon(parameters, lr=0.05)
    train(first, parameters, steps=2)
    second = Muon(parameters, lr=9.0)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        assert {tuple(s) for s in optimizer.state.values()} == {("momentum_buffer",)}
    for step in (2, 3):
        for parameter in parameters:
            parameter.grad = gradients(step, parameter)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, runs[0], strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_parameters_it_takes(mixer):
    config = ModelConfig(arch="lm", pattern=(mixer,), d_model=32, n_layer=2, max_len=64, mlp="swiglu", tied_head=False)
    with torch.device("meta"):
        model = LanguageModel(config)
    taken = {name.removesuffix(".weight") for name in muon_names(model)}
    inside = PROJECTIONS[mixer]
    mlp = {f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("gate", "up", "down")}
    assert taken == mlp | {f"blocks.{i}.mixer.{name}" for i in range(2) for name in inside}


@pytest.mark.parametrize(
    "parameter", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.complex64)], ids=str
)
def test_what_is_no_real_matrix_is_refused(parameter):
    with pytest.raises(ValueError, match="Muon: parameters must be real matrices; got"):
        Muon([nn.Parameter(parameter)], lr=0.1)


def _by_columns(group):
    mesh = init_device_mesh("cpu", (group.size(),))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    try:
        Muon([parameter], lr=0.1)
    except InputError as error:
        return str(error)


def test_matrices_that_are_cut_by_columns_are_refused():
    assert all("needs parameters that are whole or cut by rows" in told for told in run_ranks(2, _by_columns))
