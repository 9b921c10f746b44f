"""Weights that fit by their shapes and would compute something else are told apart."""

import re

import pytest

from seqengine.config.model import ModelConfig
from seqengine.meaning import meant_otherwise


def model(name, max_len=64, **settings):
    return ModelConfig(arch="lm", d_model=16, n_layer=2, max_len=max_len, pattern=(name,), mixers={name: settings})


CHANGES = [
    (
        "linear_attention",
        {"feature_map": "relu"},
        r"has model\.mixers\.linear_attention\.feature_map = 'elu'.*got 'relu'",
    ),
    ("linear_attention", {"normalize": False}, r"linear_attention\.normalize = True"),
    ("gla", {"gate_normalizer": 8.0}, r"gate_normalizer = 16\.0"),
    ("retention", {"rotary_base": 500.0}, r"rotary_base"),
    ("attention", {"rotary_interleaved": True}, r"rotary_interleaved = False"),
    ("gated_delta", {"negative_eigenvalues": True}, r"negative_eigenvalues"),
    ("long_conv", {"squash": 0.0}, r"squash = 0\.003"),
    ("h3", {"discretisation": "zoh"}, r"discretisation = 'bilinear'"),
    ("hyena", {"filter": {"shift": 0.0}}, r"model\.mixers\.hyena\.filter\.shift = 0\.05"),
    ("hyena_mr", {"decay": "strong"}, r"hyena_mr\.decay = 'weak'"),
]


@pytest.mark.parametrize(("name", "settings", "told"), CHANGES)
def test_a_setting_that_gives_weights_their_meaning_is_told_once(name, settings, told):
    (problem,) = meant_otherwise(model(name), model(name, **settings))
    assert re.search(told, problem)
    assert "got" in problem


FORGOTTEN = [
    ("s4d", {"init": "inv", "step_min": 0.01}),
    ("s4_ptd", {"perturbation": 0.2}),
    ("h3", {"step_max": 0.2}),
    ("long_conv", {"init": "random", "filter_lr": 0.1, "kernel_dropout": 0.2}),
    ("sgconv", {"filter_lr": 0.1, "decay_max": 3.0}),
    ("hyena", {"filter": {"sine_w": 1.0}}),
    ("hyena_li", {"gamma_max": 0.2}),
    ("ssd", {"decay_range": (1.0, 8.0)}),
    ("attention", {"rotary_scale": 4.0, "rotary_base": 1e6, "window": 32}),
]


@pytest.mark.parametrize(("name", "settings"), FORGOTTEN)
def test_how_weights_began_and_learn_may_change(name, settings):
    assert meant_otherwise(model(name), model(name, **settings)) == []


@pytest.mark.parametrize("name", ["hyena", "hyena_mr"])
def test_filters_as_functions_of_the_longest_sequence_stay_with_it(name):
    (problem,) = meant_otherwise(model(name), model(name, max_len=128))
    assert "Set model.max_len = 64" in problem


@pytest.mark.parametrize(
    ("name", "settings"), [("hyena_mr", {"decay_tokens": 64}), ("hyena_mr", {"decay": "none"}), ("gla", {})]
)
def test_other_mixers_take_longer_sequences(name, settings):
    assert meant_otherwise(model(name, **settings), model(name, max_len=128, **settings)) == []


def test_another_mixer_and_another_norm_are_told():
    problems = meant_otherwise(model("gla"), model("retention").model_copy(update={"norm": "rms"}))
    assert [problem.partition(";")[0] for problem in problems] == [
        "has model.norm = 'layer', which the weights were trained with",
        "has gla in layer 0",
        "has gla in layer 1",
    ]
