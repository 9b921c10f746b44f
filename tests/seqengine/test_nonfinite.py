"""Reports of steps that are not finite."""

import json
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqengine.nonfinite import layer_norms, write_report
from tests.ranks import run_ranks


def model_with_gradients(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False))
    model(torch.randn(4, 3)).square().sum().backward()
    return model


def test_norms_are_those_of_each_parameter_by_name():
    model = model_with_gradients()
    norms = layer_norms(model)
    assert list(norms) == ["0.weight", "0.bias", "1.weight"]
    for name, parameter in model.named_parameters():
        assert norms[name] == pytest.approx(math.sqrt(parameter.grad.double().square().sum()), rel=1e-12)
        assert layer_norms(model, of="weights")[name] == pytest.approx(
            math.sqrt(parameter.detach().double().square().sum()), rel=1e-12
        )
    model[0].bias.grad = None
    assert list(layer_norms(model)) == ["0.weight", "1.weight"]
    assert layer_norms(nn.Linear(2, 2)) == {}


def test_large_finite_gradients_have_finite_norms_and_others_have_not():
    model = model_with_gradients().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    assert all(math.isfinite(norm) for norm in layer_norms(model).values())
    model[0].bias.grad[1] = math.inf
    model[1].weight.grad[0, 0] = math.nan
    assert {name: math.isfinite(norm) for name, norm in layer_norms(model).items()} == {
        "0.weight": True,
        "0.bias": False,
        "1.weight": False,
    }


def test_complex_and_empty_parameters_have_norms():
    model = nn.Module()
    model.poles = nn.Parameter(torch.tensor([3 + 4j, 0j]))
    model.none = nn.Parameter(torch.empty(0))
    assert layer_norms(model, of="weights") == {"poles": 5.0, "none": 0.0}


def test_a_report_names_what_is_not_finite_and_any_json_reader_takes_it(tmp_path):
    norms = {"a.weight": 1.5, "b.weight": math.nan, "c.weight": math.inf}
    path = write_report(
        tmp_path, rank=3, step=17, samples=range(8, 11), loss=-math.inf, norms=norms, weights={"a.weight": 2.0}
    )
    assert path == tmp_path / "nonfinite" / "step-17-rank-3.json"

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 17,
        "rank": 3,
        "samples": [8, 9, 10],
        "loss": "-inf",
        "not_finite": {"gradients": ["b.weight", "c.weight"], "weights": []},
        "norms": {
            "gradients": {"a.weight": 1.5, "b.weight": "nan", "c.weight": "inf"},
            "weights": {"a.weight": 2.0},
        },
    }
    assert list(path.parent.iterdir()) == [path]


def sharded_norms(group):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (group.size(),)))
    torch.manual_seed(0)
    model(torch.randn(4, 3)).square().sum().backward()
    whole = {n: float(p.grad.full_tensor().double().norm()) for n, p in model.named_parameters()}
    return layer_norms(model), layer_norms(model, of="weights"), whole


def test_norms_of_sharded_parameters_are_those_of_this_rank():
    ranks = run_ranks(2, sharded_norms)
    for name, whole in ranks[0][2].items():
        assert math.hypot(*(gradients[name] for gradients, _, _ in ranks)) == pytest.approx(whole, rel=1e-6)
    assert ranks[0][0] != ranks[1][0]
    assert set(ranks[0][1]) == set(ranks[0][2])
