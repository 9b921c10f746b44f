"""The published layout of gated linear attention models, in and out, against an independent forward pass."""

import math
from typing import Any

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop import gla
from seqengine.mixers.mixer import START
from seqengine.model import LanguageModel
from tests.tolerances import assert_close

D, LAYERS, HEADS, INNER, VOCAB, RANK = 12, 2, 2, 20, 17, 16


def config(**changes) -> dict[str, Any]:
    """As in a config.json."""
    return {
        "architectures": ["GLAForCausalLM"], "attn": None, "attn_mode": "chunk", "bos_token_id": 1, "clamp_min": None,
        "conv_size": 4, "elementwise_affine": True, "eos_token_id": 2, "expand_k": 0.5, "expand_v": 1,
        "fuse_cross_entropy": True, "fuse_norm": True, "hidden_act": "swish", "hidden_ratio": 4,
        "hidden_size": D, "initializer_range": 0.02,
        "intermediate_size": INNER, "max_position_embeddings": 64, "model_type": "gla", "norm_eps": 1e-6, "num_heads": HEADS,
        "num_hidden_layers": LAYERS, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "use_gk": True,
        "use_gv": False, "use_output_gate": True, "use_short_conv": False, "vocab_size": VOCAB, **changes,
    }  # fmt: skip


def published(c=None, prefix="model.", head="lm_head.weight", dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random weights in the published layout."""
    c = c or config()
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return (0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    groups = c["num_heads"] // (c.get("num_kv_heads") or c["num_heads"])
    key, value, inner = int(D * c["expand_k"]), int(D * c["expand_v"]), c["intermediate_size"] or 256
    weights = {f"{prefix}embeddings.weight": 3 * randn(VOCAB, D), f"{prefix}norm.weight": 1 + randn(D)}
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": 1 + randn(D), "mlp_norm.weight": 1 + randn(D), "attn.q_proj.weight": randn(key, D),
            "attn.k_proj.weight": randn(key // groups, D), "attn.v_proj.weight": randn(value // groups, D),
            "attn.gk_proj.0.weight": randn(RANK, D), "attn.gk_proj.1.weight": 3 * randn(key // groups, RANK),
            "attn.gk_proj.1.bias": randn(key // groups), "attn.o_proj.weight": randn(D, value),
            "mlp.gate_proj.weight": randn(inner, D), "mlp.up_proj.weight": randn(inner, D),
            "mlp.down_proj.weight": randn(D, inner),
        }  # fmt: skip
        if c["use_output_gate"]:
            layer["attn.g_proj.weight"] = randn(value, D)
        if c["elementwise_affine"]:
            fused = c["fuse_norm"] and c["use_output_gate"]
            layer[f"attn.{'g_norm_swish_gate' if fused else 'g_norm'}.weight"] = 1 + randn(value // c["num_heads"])
        if c["use_short_conv"]:
            for name, channels in (("q", key), ("k", key // groups), ("v", value // groups)):
                layer[f"attn.{name}_conv1d.weight"] = randn(channels, 1, c["conv_size"])
        weights |= {f"{prefix}layers.{i}.{name}": t for name, t in layer.items()}
    if head is not None:
        embedding = weights[f"{prefix}embeddings.weight"]
        weights[head] = embedding.clone() if c["tie_word_embeddings"] else randn(VOCAB, D)
    return weights


def rms(x, weight, eps):
    y = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def swish(x):
    return x / (1 + torch.exp(-x))


def conv(x, weight):
    """A causal Conv1d, its last tap on the present token."""
    W = weight.shape[2]
    padded = torch.cat([torch.zeros(x.shape[0], W - 1, x.shape[2], dtype=x.dtype), x], dim=1)
    return swish(torch.stack([(padded[:, t : t + W] * weight[:, 0].T).sum(1) for t in range(x.shape[1])], dim=1))


def attention(n, p, c):
    H, G = c["num_heads"], c.get("num_kv_heads") or c["num_heads"]
    K, V = int(D * c["expand_k"]) // H, int(D * c["expand_v"]) // H
    q, k, v = (n @ p[f"attn.{name}_proj.weight"].T for name in "qkv")
    if c["use_short_conv"]:
        q, k, v = (conv(t, p[f"attn.{name}_conv1d.weight"]) for name, t in zip("qkv", (q, k, v), strict=True))
    logits = n @ p["attn.gk_proj.0.weight"].T @ p["attn.gk_proj.1.weight"].T + p["attn.gk_proj.1.bias"]
    gk = torch.log(torch.sigmoid(logits)) / 16
    if c["clamp_min"] is not None:
        gk = torch.maximum(gk, torch.tensor(c["clamp_min"], dtype=gk.dtype))
    if c.get("feature_map") == "relu":
        q, k = torch.relu(q), torch.relu(k)
    heads = []
    for h in range(H):
        j = h * G // H
        S = torch.zeros(n.shape[0], K, V, dtype=n.dtype)
        rows = []
        for t in range(n.shape[1]):
            decay = torch.exp(gk[:, t, j * K : (j + 1) * K])[:, :, None]
            S = decay * S + k[:, t, j * K : (j + 1) * K, None] * v[:, t, None, j * V : (j + 1) * V]
            rows.append((q[:, t, h * K : (h + 1) * K, None] * S).sum(1) / math.sqrt(K))
        norm = p.get("attn.g_norm_swish_gate.weight", p.get("attn.g_norm.weight"))
        heads.append(rms(torch.stack(rows, dim=1), norm, c["norm_eps"]))
    o = torch.cat(heads, dim=-1)
    if c["use_output_gate"]:
        o = o * swish(n @ p["attn.g_proj.weight"].T)
    return o @ p["attn.o_proj.weight"].T


def independent_logits(weights, ids, c, prefix="model."):
    w = {key.removeprefix(prefix): value for key, value in weights.items()}
    x = w["embeddings.weight"][ids]
    for i in range(LAYERS):
        p = {key.removeprefix(f"layers.{i}."): value for key, value in w.items() if key.startswith(f"layers.{i}.")}
        x = x + attention(rms(x, p["attn_norm.weight"], c["norm_eps"]), p, c)
        n = rms(x, p["mlp_norm.weight"], c["norm_eps"])
        inner = swish(n @ p["mlp.gate_proj.weight"].T) * (n @ p["mlp.up_proj.weight"].T)
        x = x + inner @ p["mlp.down_proj.weight"].T
    x = rms(x, w["norm.weight"], c["norm_eps"])
    return x @ (w["embeddings.weight"] if c["tie_word_embeddings"] else weights["lm_head.weight"]).T


IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"use_short_conv": True, "conv_size": 3, "norm_eps": 1e-2},
    {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "feature_map": "relu"},
    {"use_output_gate": False, "clamp_min": -0.03},
    {"fuse_norm": False},
    {"elementwise_affine": False, "intermediate_size": None, "hidden_ratio": None},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_and_every_gradient_are_those_of_the_published_model(changes):
    c = config(**changes)
    weights = published(c)
    model = gla.load(weights, c)
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    if c["tie_word_embeddings"]:
        del leaves["lm_head.weight"]
    expected, logits = independent_logits(leaves, IDS, c), model(IDS)
    assert_close(logits, expected, tolerance=1e-10)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected * towards).sum().backward()
    (logits * towards).sum().backward()
    gradients = LanguageModel(model.config).double()
    with torch.no_grad():
        for into, source in zip(gradients.parameters(), model.parameters(), strict=True):
            into.copy_(source.grad)
    found = gla.state_dict(gradients, layout=model.published_layout)
    for key, leaf in leaves.items():
        assert_close(found[key], leaf.grad, key, tolerance=1e-10)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_go_in_and_come_out_bit_for_bit(changes):
    c = config(**changes)
    weights = published(c, dtype=torch.float32)
    written = gla.state_dict(gla.load(weights, c))
    assert set(written) == set(weights)
    assert all(torch.equal(written[key], weights[key]) for key in weights)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_config_goes_in_and_comes_out(changes):
    c = config(**changes)
    model = gla.load(published(c), c)
    written = gla.published_config(model)
    assert gla.to_config(written) == model.config
    assert set(gla.state_dict(gla.load(gla.state_dict(model), written))) == set(gla.state_dict(model))
    for key, value in written.items():
        if key in c and key != "intermediate_size":
            assert value == c[key], key


@pytest.mark.parametrize(
    ("prefix", "head", "tied"),
    [
        ("model.model.", "model.lm_head.weight", False),
        ("", None, True),
        ("model.", None, True),
        ("", "lm_head.weight", False),
    ],
)
def test_every_prefix_goes_in_and_comes_out(prefix, head, tied):
    c = config(tie_word_embeddings=tied)
    weights = published(c, prefix, head, dtype=torch.float32)
    written = gla.state_dict(gla.load(weights, c))
    assert set(written) == set(weights)
    assert all(torch.equal(written[key], weights[key]) for key in weights)


def test_joined_mlp_of_older_weights_is_the_same_model():
    weights = published()
    older = {key: value for key, value in weights.items() if ".up_proj." not in key}
    for i in range(LAYERS):
        mlp = f"model.layers.{i}.mlp."
        older[f"{mlp}gate_proj.weight"] = torch.cat(
            [weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]
        )
    model = gla.load(older, config())
    assert torch.equal(model(IDS), gla.load(weights, config())(IDS))
    written = gla.state_dict(model)
    assert set(written) == set(older)
    assert all(torch.equal(written[key], older[key]) for key in older)


def test_head_is_tied_only_where_the_config_or_the_keys_say_so():
    silent = {key: value for key, value in config().items() if key != "tie_word_embeddings"}
    assert gla.load(published(), silent).head is not None
    alone = {key: value for key, value in published().items() if key != "lm_head.weight"}
    assert gla.load(alone, silent).head is None
    with pytest.raises(InputError, match=r"lm_head\.weight is missing; its shape must be \(17, 12\)"):
        gla.load(alone, config())
    with pytest.raises(InputError, match=r"lm_head\.weight must be model\.embeddings\.weight, for tie_word_embeddings"):
        gla.load(published(), config(tie_word_embeddings=True))


def test_loaded_model_decodes_token_by_token():
    model = gla.load(published(config(use_short_conv=True)), config(use_short_conv=True))
    state, logits = START, []
    for token in IDS.split(1, dim=1):
        out, state = model.step(token, state)
        logits.append(out)
    assert_close(torch.cat(logits, dim=1), model(IDS), tolerance=1e-10)


def test_loaded_model_is_in_evaluation_mode_and_float32_unless_float64():
    model = gla.load(published(dtype=torch.bfloat16), config())
    assert not model.training
    assert model(IDS).dtype == torch.float32


@pytest.mark.parametrize(("tied", "count"), [(False, 374_475_776), (True, 341_707_776)])
def test_published_parameter_counts(tied, count):
    published_340m = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "expand_k": 0.5, "expand_v": 1, "hidden_ratio": 4,
        "intermediate_size": None, "model_type": "gla", "vocab_size": 32000, "tie_word_embeddings": tied,
    }  # fmt: skip
    c = gla.to_config(published_340m)
    assert c.inner == 2816
    with torch.device("meta"):
        model = LanguageModel(c)
    assert sum(p.numel() for p in model.parameters()) == count
    shapes = {key: tuple(value.shape) for key, value in gla.state_dict(model).items()}
    assert shapes["model.layers.23.attn.gk_proj.1.weight"] == (512, 16)
    assert shapes["model.layers.0.attn.g_norm_swish_gate.weight"] == (256,)
    assert len(shapes) == 24 * 14 + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.attn.gk_proj.1.bias"),
            r"layers\.1\.attn\.gk_proj\.1\.bias is missing; .* \(6,\)",
        ),
        (lambda w: w.update({"model.layers.0.attn.extra": torch.zeros(1)}), r"layers\.0\.attn\.extra is not a key"),
        (
            lambda w: w.update({"model.layers.0.attn.q_proj.weight": torch.zeros(3, D)}),
            r"layers\.0\.attn\.q_proj\.weight must have shape \(6, 12\), by the config; got \(3, 12\)",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_named(change, message):
    weights = published()
    change(weights)
    with pytest.raises(InputError, match=message):
        gla.load(weights, config())


def test_all_wrong_keys_are_named_at_once():
    weights = published()
    del weights["model.norm.weight"], weights["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(InputError) as raised:
        gla.load(weights, config())
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "retnet"}, "model_type must be 'gla'; got 'retnet'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'swish'"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "attn must be None"),
        ({"feature_map": "dpfp"}, "feature_map must be one of None, 'relu'"),
        ({"use_gv": True, "attnres_block_size": 4}, r"use_gv must be False.*\n.*attnres_block_size must be None"),
        ({"gate_logit_normalizer": 8}, "gate_logit_normalizer must be 16; got 8"),
        ({"use_short_conv": True, "share_conv_kernel": True}, "share_conv_kernel must be False"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"hidden_size": "wide"}, r"gla config: hidden_size must be a number; got 'wide'"),
        ({"num_heads": 5}, r"must be a multiple of num_heads = 5"),
        ({"conv_size": -1, "use_short_conv": True}, r"short_filter"),
    ],
)
def test_settings_that_would_be_another_model_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        gla.load(published(), config(**changes))


def test_not_a_state_dict_of_this_model():
    with pytest.raises(InputError, match="no key begins with"):
        gla.load({"state_dict": torch.zeros(1)}, config())


def test_models_that_the_published_code_does_not_have_are_refused():
    other = ModelConfig(arch="lm", d_model=8, n_layer=1, pattern=("linear_attention",), norm="layer")
    with pytest.raises(InputError) as raised:
        gla.state_dict(LanguageModel(other))
    text = "\n".join(raised.value.problems)
    assert "gla.state_dict: all mixers must be 'gla'; got linear_attention." in text
    assert "gla.state_dict: model.norm must be 'rms'; got 'layer'." in text
    assert "gla.state_dict: model.mlp must be 'swiglu'; got 'gelu'." in text
