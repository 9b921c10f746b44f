"""Linear attention against its definition: weights of all pairs of tokens, and their sum."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from seqengine.mixers.mixer import START, Place
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.tiny import with_far_weights

D = 12
FEATURES = {
    "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1) + 1,
    "relu": lambda x: x.clamp(min=0),
    "identity": lambda x: x,
}


def mixer_and_inputs(T=9, **settings):
    return with_far_weights(LinearAttention(LinearAttentionConfig(**settings), Place(D, 16)), D, T, 1 / 3)


def definition(m, x, c):
    H, K, V = c.num_heads, int(D * c.expand_k) // c.num_heads, int(D * c.expand_v) // c.num_heads
    projected = x @ m.inputs.proj.weight.T
    if c.bias:
        projected = projected + m.inputs.proj.bias
    q, k, v = projected.split([H * K, H * K, H * V], dim=-1)
    q, k = FEATURES[c.feature_map](q), FEATURES[c.feature_map](k)
    heads = []
    for h in range(H):
        rows = []
        for t in range(x.shape[1]):
            o = total = 0
            for s in range(t + 1):
                weight = (q[:, t, h * K : (h + 1) * K] * k[:, s, h * K : (h + 1) * K]).sum(-1, keepdim=True)
                o, total = o + weight * v[:, s, h * V : (h + 1) * V], total + weight
            rows.append(o / (total + 1e-6) if c.normalize else o / math.sqrt(K))
        o = torch.stack(rows, dim=1)
        if c.output_norm:
            o = o / torch.sqrt(o.square().mean(dim=-1, keepdim=True) + c.norm_eps) * m.norm.weight
        heads.append(o)
    y = torch.cat(heads, dim=-1) @ m.out_proj.weight.T
    return y + m.out_proj.bias if c.bias else y


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 2},
        {"num_heads": 3, "feature_map": "relu", "expand_k": 2.0, "bias": False},
        {"num_heads": 2, "feature_map": "identity", "normalize": False, "output_norm": True, "expand_v": 2.0},
        {"num_heads": 1, "feature_map": "elu", "normalize": False},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_definition(settings):
    mixer, x = mixer_and_inputs(**settings)
    expected, (y, _) = definition(mixer, x, LinearAttentionConfig(**settings)), mixer(x)
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)


def test_normalised_outputs_of_equal_values_are_that_value():
    mixer, x = mixer_and_inputs(num_heads=2)
    with torch.no_grad():
        mixer.inputs.proj.weight[2 * D :] = 0.0
        mixer.inputs.proj.bias[2 * D :] = 1.0
        mixer.out_proj.weight.copy_(torch.eye(D))
        mixer.out_proj.bias.zero_()
        y, _ = mixer(x)
    assert float((y - 1).abs().max()) < 1e-4


def test_features_that_see_nothing_give_zeros_and_finite_gradients():
    mixer, x = mixer_and_inputs(num_heads=2, feature_map="relu")
    with torch.no_grad():
        mixer.inputs.proj.bias[: 2 * D] = -100.0
        mixer.out_proj.bias.zero_()
    y, _ = mixer(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert all(torch.isfinite(g).all() for g in gradients(mixer, x, y).values())


def test_sums_are_float32_under_autocast():
    mixer = LinearAttention(LinearAttentionConfig(num_heads=2), Place(D, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = mixer(torch.randn(1, 700, D), state=START)
    assert state.recurrent.dtype == torch.float32
    assert state.recurrent.shape == (1, 2, 6, 7)


def test_what_cannot_work_is_named():
    with pytest.raises(ValueError, match="feature_map = 'identity'"):
        LinearAttentionConfig(feature_map="identity")
    with pytest.raises(
        InputError, match=r"model\.mixers\.linear_attention: expand_k \* model\.d_model = 12 .* num_heads = 8"
    ):
        LinearAttention(LinearAttentionConfig(), Place(D, 16))
