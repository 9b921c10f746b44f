"""Gated DeltaNet against its definition, token by token and head by head."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.gated_delta import GatedDelta, GatedDeltaConfig
from seqengine.mixers.mixer import START, Place
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.test_gla import short_conv
from tests.seqengine.mixers.tiny import with_far_weights

D = 8


def mixer_and_inputs(T=9, **settings):
    return with_far_weights(GatedDelta(GatedDeltaConfig(**settings), Place(D, 16)), D, T, 1 / 2)


def definition(m, x, c):
    H, K, V = c.num_heads, c.head_dim, int(c.head_dim * c.expand_v)
    widths = [H * K, H * K, H * V]
    q, k, v = (x @ m.inputs.proj.weight.T).split(widths, dim=-1)
    if c.short_filter:
        rows = m.inputs.conv_weight.split(widths)
        q, k, v = (short_conv(t, w) for t, w in zip((q, k, v), rows, strict=True))
    else:
        q, k, v = (t / (1 + torch.exp(-t)) for t in (q, k, v))
    beta = torch.sigmoid(x @ m.beta_proj.weight.T) * (2 if c.negative_eigenvalues else 1)
    dt = torch.log(1 + torch.exp(x @ m.decay_proj.weight.T + m.decay.dt_bias))
    decay = torch.exp(-torch.exp(m.decay.A_log) * dt)
    heads = []
    for h in range(H):
        S, rows = torch.zeros(x.shape[0], K, V, dtype=x.dtype), []
        for t in range(x.shape[1]):
            qt, kt = (y[:, t, h * K : (h + 1) * K] for y in (q, k))
            qt, kt = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (qt, kt))
            b, vt = beta[:, t, h, None, None], v[:, t, h * V : (h + 1) * V]
            project = torch.eye(K, dtype=x.dtype) - b * kt[:, :, None] * kt[:, None, :]
            S = decay[:, t, h, None, None] * project @ S + b * kt[:, :, None] * vt[:, None, :]
            rows.append(torch.einsum("bk,bkv->bv", qt, S) / math.sqrt(K))
        o = torch.stack(rows, dim=1)
        heads.append(o / torch.sqrt(o.square().mean(dim=-1, keepdim=True) + c.norm_eps) * m.norm.weight)
    o = torch.cat(heads, dim=-1)
    if c.output_gate:
        z = x @ m.gate.weight.T
        o = o * z / (1 + torch.exp(-z))
    return o @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 2, "head_dim": 3},
        {"num_heads": 1, "head_dim": 4, "expand_v": 0.5, "negative_eigenvalues": True, "short_filter": 2},
        {"num_heads": 3, "head_dim": 2, "short_filter": 0, "output_gate": False, "norm_eps": 0.1},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_definition(settings):
    mixer, x = mixer_and_inputs(**settings)
    expected, (y, _) = definition(mixer, x, GatedDeltaConfig(**settings)), mixer(x)
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)


def test_chunks_with_states_are_the_whole_without_a_short_convolution():
    mixer, x = mixer_and_inputs(T=11, num_heads=2, head_dim=3, short_filter=0)
    whole, state, outputs = mixer(x)[0], START, []
    for chunk in x.split([4, 1, 6], dim=1):
        y, state = mixer(chunk, state=state)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), whole)


def test_decays_begin_in_the_published_range_and_are_not_decayed():
    torch.manual_seed(0)
    mixer = GatedDelta(GatedDeltaConfig(num_heads=4096, head_dim=1, short_filter=0), Place(1, 16))
    A = torch.exp(mixer.decay.A_log.detach())
    assert 0.0 < float(A.min()) < 0.1
    assert 15.9 < float(A.max()) <= 16.001
    assert {name: rule.weight_decay for name, rule in mixer.rules.items()} == {"decay.A_log": 0.0, "decay.dt_bias": 0.0}
    assert set(mixer.rules) <= {name for name, _ in mixer.named_parameters()}


def test_values_of_no_whole_width_are_named():
    with pytest.raises(
        InputError, match=r"model\.mixers\.gated_delta: expand_v \* head_dim = 0\.9 must be a whole number"
    ):
        GatedDelta(GatedDeltaConfig(head_dim=3, expand_v=0.3), Place(D, 16))
