"""Parameter groups by name, the learning rate as a function of tokens, clipping."""

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimGroup, OptimSection, ScheduleSection
from seqengine.errors import InputError
from seqengine.model import LanguageModel
from seqengine.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    group_settings,
    learning_rate,
    set_learning_rate,
)

MODEL = LanguageModel(ModelConfig(d_model=8, n_layer=1, max_len=16))
NAMES = [name for name, _ in MODEL.named_parameters()]


def test_only_matrices_that_mix_channels_are_decayed_by_default():
    settings = group_settings(NAMES, OptimSection(weight_decay=0.1))
    decayed = {name.split(".", 2)[-1] for name, (decay, _) in settings.items() if decay > 0}
    assert decayed == {"mixer.in_proj.weight", "mixer.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_first_group_that_matches_wins():
    groups = (
        OptimGroup(match="*.filter.*", weight_decay=0.3, lr_scale=0.5),
        OptimGroup(match="*frequency", lr_scale=9.0),
    )
    with pytest.raises(InputError, match=r"match = '\*frequency' must match a parameter that no earlier group has"):
        group_settings(NAMES, OptimSection(groups=groups))
    settings = group_settings(NAMES, OptimSection(groups=groups[::-1]))
    assert settings["blocks.0.mixer.filter.frequency"] == (0.0, 9.0)
    assert settings["blocks.0.mixer.filter.output.weight"] == (0.3, 0.5)
    assert settings["norm.weight"] == (0.0, 1.0)


def test_every_pattern_that_matches_nothing_is_named():
    section = OptimSection(groups=(OptimGroup(match="*.fliter.*"), OptimGroup(match="*.attention.*")))
    with pytest.raises(InputError) as raised:
        build_optimizer(MODEL, section)
    assert ["fliter" in p or "attention" in p for p in raised.value.problems] == [True, True]


def test_groups_get_their_share_of_the_rate_and_every_parameter_is_in_one():
    section = OptimSection(lr=1.0, groups=(OptimGroup(match="*.filter.*", lr_scale=0.25),))
    optimizer = build_optimizer(MODEL, section)
    set_learning_rate(optimizer, 0.8)
    assert {g["lr"] for g in optimizer.param_groups} == {0.8, 0.2}
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in MODEL.parameters())


def test_cosine_with_warm_up():
    section = ScheduleSection(kind="cosine", warmup=100, min_ratio=0.1)
    rates = [learning_rate(t, 1100, 2.0, section) for t in range(0, 1101, 50)]
    assert 0 < rates[0] < 0.02
    assert rates[1] == pytest.approx(1.0, rel=0.02)
    assert rates[2] == 2.0
    assert learning_rate(600, 1100, 2.0, section) == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(5000, 1100, 2.0, section) == pytest.approx(0.2)


def test_linear_and_constant_schedules_and_warm_up_as_a_share():
    assert learning_rate(550, 1000, 1.0, ScheduleSection(kind="linear", warmup=0.1, min_ratio=0.0)) == pytest.approx(
        0.5
    )
    assert learning_rate(990, 1000, 1.0, ScheduleSection(kind="constant", warmup=0.1)) == 1.0
    assert learning_rate(0, 1000, 1.0, ScheduleSection(warmup=0)) == 1.0


def test_clipping_scales_to_the_limit_only_when_above_it():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(gradient_norm(model)) == 5.0
    clip_gradients(model, 5.0, 10.0)
    clip_gradients(model, 5.0, 0.0)
    assert float(gradient_norm(model)) == 5.0
    clip_gradients(model, 5.0, 1.0)
    assert float(gradient_norm(model)) == pytest.approx(1.0)
    assert torch.allclose(model.bias.grad, torch.tensor([0.8]))
