"""The published HyenaDNA layout, in and out, against an independent forward pass written from the published formulas."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seqengine.errors import InputError
from seqengine.interop import hyenadna
from tests.tolerances import assert_close

D, LAYERS, L_MAX, WIDTH, FEATURES = 8, 2, 34, 16, 5


def config(order: int = 2) -> dict[str, Any]:
    layer = {
        "_name_": "hyena", "emb_dim": FEATURES, "filter_order": WIDTH, "short_filter_order": 3, "l_max": L_MAX,
        "modulate": True, "w": 10, "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0, "order": order,
    }  # fmt: skip
    return {
        "d_model": D, "n_layer": LAYERS, "d_inner": 4 * D, "vocab_size": 12, "resid_dropout": 0.0, "embed_dropout": 0.1,
        "fused_mlp": False, "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "layer": layer,
    }  # fmt: skip


def published(
    order: int = 2, prefix: str = "model.backbone.", head: str | None = "model.lm_head.weight", dtype=torch.float64
):
    """Random weights in the published layout."""
    generator = torch.Generator().manual_seed(order)

    def randn(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    weights = {"embeddings.word_embeddings.weight": randn(16, D), "ln_f.weight": 1 + randn(D), "ln_f.bias": randn(D)}
    for i in range(LAYERS):
        freq = 10 + randn(1, WIDTH)
        time = torch.linspace(0, 1, L_MAX, dtype=torch.float64)
        angle = 2 * math.pi * torch.arange(L_MAX, dtype=torch.float64)[:, None] / L_MAX
        bands = torch.linspace(1e-4, 1, 2, dtype=torch.float64)
        z = torch.cat([time[:, None], torch.cos(bands * angle), -torch.sin(bands * angle)], 1)
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, (order - 1) * D, dtype=torch.float64)
        layer = {
            "mixer.in_proj.weight": randn((order + 1) * D, D), "mixer.in_proj.bias": randn((order + 1) * D),
            "mixer.out_proj.weight": randn(D, D), "mixer.out_proj.bias": randn(D),
            "mixer.short_filter.weight": randn((order + 1) * D, 1, 3), "mixer.short_filter.bias": randn((order + 1) * D),
            "mixer.filter_fn.bias": randn((order - 1) * D),
            "mixer.filter_fn.pos_emb.z": z[None].to(dtype), "mixer.filter_fn.pos_emb.t": time[None, :, None].to(dtype),
            "mixer.filter_fn.implicit_filter.0.weight": randn(WIDTH, FEATURES),
            "mixer.filter_fn.implicit_filter.0.bias": randn(WIDTH),
            "mixer.filter_fn.implicit_filter.1.freq": freq,
            "mixer.filter_fn.implicit_filter.2.weight": randn(WIDTH, WIDTH),
            "mixer.filter_fn.implicit_filter.2.bias": randn(WIDTH),
            "mixer.filter_fn.implicit_filter.3.freq": freq,
            "mixer.filter_fn.implicit_filter.4.weight": randn(WIDTH, WIDTH),
            "mixer.filter_fn.implicit_filter.4.bias": randn(WIDTH),
            "mixer.filter_fn.implicit_filter.5.freq": freq,
            "mixer.filter_fn.implicit_filter.6.weight": randn((order - 1) * D, WIDTH),
            "mixer.filter_fn.modulation.deltas": deltas[None, None].to(dtype),
            "norm1.weight": 1 + randn(D), "norm1.bias": randn(D), "norm2.weight": 1 + randn(D), "norm2.bias": randn(D),
            "mlp.fc1.weight": randn(4 * D, D), "mlp.fc1.bias": randn(4 * D),
            "mlp.fc2.weight": randn(D, 4 * D), "mlp.fc2.bias": randn(D),
        }  # fmt: skip
        weights.update({f"layers.{i}.{key}": value for key, value in layer.items()})
    result = {prefix + key: value for key, value in weights.items()}
    if head is not None:
        result[head] = weights["embeddings.word_embeddings.weight"].clone()
    return result


def independent_logits(weights, ids, order, prefix="model.backbone.", shift=0.05, head="model.lm_head.weight"):
    """The published model, with functional calls only and an explicit double loop for the convolution."""
    w = {key.removeprefix(prefix): value for key, value in weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids]
    T = ids.shape[1]
    for i in range(LAYERS):
        p = {key.removeprefix(f"layers.{i}."): value for key, value in w.items() if key.startswith(f"layers.{i}.")}
        n = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-5)
        u = (n @ p["mixer.in_proj.weight"].T + p["mixer.in_proj.bias"]).transpose(1, 2)
        u = F.conv1d(u, p["mixer.short_filter.weight"], p["mixer.short_filter.bias"], padding=2, groups=u.shape[1])[
            ..., :T
        ]
        f = "mixer.filter_fn."
        h = p[f + "pos_emb.z"][0, :T]
        for j in (0, 2, 4):
            name = f"{f}implicit_filter.{j}"
            h = torch.sin(p[f"{f}implicit_filter.{j + 1}.freq"] * (h @ p[name + ".weight"].T + p[name + ".bias"]))
        h = h @ p[f + "implicit_filter.6.weight"].T
        h = h * (torch.exp(-p[f + "pos_emb.t"][0, :T] * p[f + "modulation.deltas"][0].abs()) + shift)
        *gates, v = u.split(D, dim=1)
        for o, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            k = h[:, o * D : (o + 1) * D].T
            y = torch.zeros_like(v)
            for t in range(T):
                y[:, :, t] = (k[:, : t + 1].flip(1) * v[:, :, : t + 1]).sum(-1)
            v = y + v * p[f + "bias"][o * D : (o + 1) * D, None]
        x = x + (v * gates[0]).transpose(1, 2) @ p["mixer.out_proj.weight"].T + p["mixer.out_proj.bias"]
        n = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-5)
        inner = F.gelu(n @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"], approximate="tanh")
        x = x + inner @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    x = F.layer_norm(x, (D,), w["ln_f.weight"], w["ln_f.bias"], 1e-5)
    return x @ weights[head].T


IDS = torch.randint(0, 12, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("shift", [0.05, 0.0])
def test_logits_are_those_of_the_published_model(order, shift):
    weights = published(order)
    model = hyenadna.load(weights, config(order), modulation_shift=shift)
    assert_close(model(IDS), independent_logits(weights, IDS, order, shift=shift))


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.backbone.", "model.lm_head.weight"),
        ("hyena.backbone.", "lm_head.weight"),
        ("backbone.", None),
        ("", None),
    ],
)
def test_every_layout_goes_in_and_comes_out_bit_for_bit(prefix, head):
    weights = published(prefix=prefix, head=head, dtype=torch.float32)
    written = hyenadna.state_dict(hyenadna.load(weights, config()))
    assert set(written) == set(weights)
    assert all(torch.equal(written[key], weights[key]) for key in weights)


def test_hugging_face_config_is_the_same_model():
    flat = {
        "d_model": D, "n_layer": LAYERS, "d_inner": 4 * D, "vocab_size": 12, "pad_vocab_size_multiple": 8, "emb_dim": FEATURES,
        "filter_order": WIDTH, "max_seq_len": L_MAX, "activation_freq": 10, "num_inner_mlps": 2, "hyena_order": 2,
        "short_filter_order": 3, "embed_dropout": 0.1, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    weights = published()
    assert torch.equal(hyenadna.load(weights, flat)(IDS), hyenadna.load(weights, config())(IDS))


def test_keys_of_models_trained_with_activation_checkpointing():
    weights = published()
    wrapped = {k.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): v for k, v in weights.items()}
    assert torch.equal(hyenadna.load(wrapped, config())(IDS), hyenadna.load(weights, config())(IDS))


def test_tied_frequencies_and_head_may_be_stored_once_and_features_not_at_all():
    weights = published()
    dropped = ("implicit_filter.3.freq", "implicit_filter.5.freq", "pos_emb.t", "pos_emb.z", "deltas", "lm_head.weight")
    lean = {key: value for key, value in weights.items() if not key.endswith(dropped)}
    expected = hyenadna.load(weights, config())(IDS)
    assert_close(hyenadna.load(lean, config())(IDS), expected)


def test_a_head_of_its_own_is_kept():
    weights = published()
    weights["model.lm_head.weight"] = weights["model.lm_head.weight"] + 1
    model = hyenadna.load(weights, config())
    assert_close(model(IDS), independent_logits(weights, IDS, 2))
    assert torch.equal(hyenadna.state_dict(model)["model.lm_head.weight"], weights["model.lm_head.weight"])


def test_trained_positional_features_are_taken_and_kept():
    weights = published()
    key = "model.backbone.layers.1.mixer.filter_fn.pos_emb.z"
    weights[key] = weights[key] + 0.1
    weights["model.backbone.layers.1.mixer.filter_fn.pos_emb.t"] = weights[key][..., :1]
    model = hyenadna.load(weights, config())
    assert_close(model(IDS), independent_logits(weights, IDS, 2))
    assert "blocks.1.mixer.filter.z" in model.state_dict()
    assert "blocks.0.mixer.filter.z" not in model.state_dict()
    assert torch.equal(hyenadna.state_dict(model)[key], weights[key])


def test_loaded_model_is_in_evaluation_mode():
    model = hyenadna.load(published(dtype=torch.float32), config())
    assert not model.training
    assert model(IDS).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.backbone.layers.1.norm2.bias"),
            r"layers\.1\.norm2\.bias is missing; its shape must be \(8,\)",
        ),
        (
            lambda w: w.update({"model.backbone.layers.0.mixer.extra": torch.zeros(1)}),
            r"layers\.0\.mixer\.extra is not a key",
        ),
        (
            lambda w: w.update({"model.backbone.layers.0.mlp.fc1.weight": torch.zeros(3, 8)}),
            r"layers\.0\.mlp\.fc1\.weight must have shape \(32, 8\); got \(3, 8\)",
        ),
        (
            lambda w: w.update({"model.backbone.layers.0.mixer.filter_fn.pos_emb.z": torch.zeros(1, 66, 5)}),
            r"pos_emb\.z must have shape \(1, 34, 5\); got \(1, 66, 5\)\. The filters depend on l_max",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_named(change, message):
    weights = published()
    change(weights)
    with pytest.raises(InputError, match=message):
        hyenadna.load(weights, config())


def test_all_wrong_keys_are_named_at_once():
    weights = published()
    del weights["model.backbone.ln_f.weight"], weights["model.backbone.ln_f.bias"]
    with pytest.raises(InputError) as raised:
        hyenadna.load(weights, config())
    assert len(raised.value.problems) == 2


def test_not_a_hyenadna_state_dict_or_config():
    with pytest.raises(InputError, match="no key begins with"):
        hyenadna.load({"state_dict": torch.zeros(1)}, config())
    with pytest.raises(InputError, match="d_model, l_max must be given"):
        hyenadna.load(published(), {"n_layer": 2})
    with pytest.raises(InputError, match=r"layer\._name_ must be 'hyena'"):
        hyenadna.load(published(), {**config(), "layer": {**config()["layer"], "_name_": "h3"}})
