"""Gated linear attention against its definition, token by token and head by head."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.gla import Gla, GlaConfig
from seqengine.mixers.mixer import START, Place
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.tiny import with_far_weights

D = 24


def mixer_and_inputs(T=9, **settings):
    return with_far_weights(Gla(GlaConfig(**settings), Place(D, 16)), D, T, 1 / 3)


def short_conv(x, w):
    """x [B, T, C], w [C, W]: the tap at lag s in column s; then SiLU."""
    rows = []
    for t in range(x.shape[1]):
        rows.append(sum(w[:, s] * x[:, t - s] for s in range(min(w.shape[1], t + 1))))
    y = torch.stack(rows, dim=1)
    return y * torch.sigmoid(y)


FEATURES = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def definition(m, x, c):
    G, H = c.num_kv_heads or c.num_heads, c.num_heads
    K, V = int(D * c.expand_k) // H, int(D * c.expand_v) // H
    q, k, v = (x @ m.inputs.proj.weight.T).split([H * K, G * K, G * V], dim=-1)
    if c.short_filter:
        w = m.inputs.conv_weight.split([H * K, G * K, G * V])
        q, k, v = (short_conv(t, rows) for t, rows in zip((q, k, v), w, strict=True))
    q, k = FEATURES[c.feature_map](q), FEATURES[c.feature_map](k)
    logits = x @ m.decay_in.weight.T @ m.decay_out.weight.T + m.decay_out.bias
    g = -torch.log(1 + torch.exp(-logits)) / c.gate_normalizer
    if c.gate_min is not None:
        g = torch.where(g > c.gate_min, g, c.gate_min)
    heads = []
    for h in range(H):
        j = h // (H // G)
        S, rows = torch.zeros(x.shape[0], K, V, dtype=x.dtype), []
        for t in range(x.shape[1]):
            kt, vt = k[:, t, j * K : (j + 1) * K], v[:, t, j * V : (j + 1) * V]
            S = torch.exp(g[:, t, j * K : (j + 1) * K])[:, :, None] * S + kt[:, :, None] * vt[:, None, :]
            rows.append(torch.einsum("bk,bkv->bv", q[:, t, h * K : (h + 1) * K], S) / math.sqrt(K))
        o = torch.stack(rows, dim=1)
        o = o / torch.sqrt(o.square().mean(dim=-1, keepdim=True) + c.norm_eps)
        heads.append(o if m.norm.weight is None else o * m.norm.weight)
    o = torch.cat(heads, dim=-1)
    if c.output_gate:
        z = x @ m.gate.weight.T
        o = o * z / (1 + torch.exp(-z))
    return o @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 2},
        {"num_heads": 6, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 3},
        {"num_heads": 1, "short_filter": 4, "feature_map": "silu", "gate_normalizer": 1.0},
        {"num_heads": 4, "num_kv_heads": 1, "expand_k": 1.0, "short_filter": 2, "feature_map": "sigmoid", "output_gate": False},
        {"num_heads": 3, "feature_map": "relu", "norm_weight": False, "expand_k": 1.0, "gate_min": -0.04, "norm_eps": 0.1},
        {"num_heads": 2, "feature_map": "squared_relu"},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_definition(settings):
    mixer, x = mixer_and_inputs(**settings)
    expected, (y, _) = definition(mixer, x, GlaConfig(**settings)), mixer(x)
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)


@pytest.mark.parametrize("settings", [{"num_kv_heads": 2}, {"short_filter": 0}, {"output_gate": False}], ids=str)
def test_chunks_with_states_are_the_whole(settings):
    mixer, x = mixer_and_inputs(T=11, **settings)
    whole, state, outputs = mixer(x)[0], START, []
    for chunk in x.split([4, 1, 6], dim=1):
        y, state = mixer(chunk, state=state)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), whole)


def test_gates_are_float32_under_autocast():
    """A gate so near 1 that half precision would round it to 1 still forgets."""
    mixer = Gla(GlaConfig(), Place(D, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g = mixer._decay(torch.randn(1, 3, D))
    assert g.dtype == torch.float32
    assert not torch.equal(g, g.bfloat16().float())


def test_size_of_the_state_does_not_depend_on_the_tokens():
    mixer, x = mixer_and_inputs(T=40, short_filter=3)
    _, few = mixer(x[:, :5], state=START)
    _, many = mixer(x, state=START)
    assert [t.shape for t in few] == [t.shape for t in many]


def test_published_number_of_parameters():
    """4 d_model^2 and the gates: d_model 1024, 4 heads."""
    with torch.device("meta"):
        mixer = Gla(GlaConfig(), Place(1024, 2048))
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 1024**2 + 16 * 1024 + 512 * 16 + 512 + 256


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"num_heads = 4 must be a multiple of num_kv_heads = 3"):
        GlaConfig(num_kv_heads=3)
    with pytest.raises(
        InputError, match=r"model\.mixers\.gla: expand_k \* model\.d_model = 12 channels .* num_heads = 5"
    ):
        Gla(GlaConfig(num_heads=5), Place(D, 16))
    with pytest.raises(InputError, match=r"expand_v \* model\.d_model = 4 "):
        Gla(GlaConfig(num_heads=6, expand_v=0.2), Place(D, 16))
