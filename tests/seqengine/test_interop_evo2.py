"""The layout of the Evo 2 models, in and out, against an independent forward pass written from the published formulas."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop import evo2
from seqengine.mixers.mixer import START
from seqengine.model import LanguageModel
from tests.tolerances import assert_close

D, HEADS, VOCAB, INNER, T = 12, 3, 20, 16, 14


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_name": "shc-evo2-tiny", "vocab_size": VOCAB, "hidden_size": D, "num_filters": D, "num_layers": 5,
        "attn_layer_idxs": [2], "hcl_layer_idxs": [3], "hcm_layer_idxs": [1, 4], "hcs_layer_idxs": [0],
        "hcm_filter_length": 128, "hcm_filter_groups": 4, "hcs_filter_length": 7, "hcs_filter_groups": 2,
        "hcl_filter_groups": D, "short_filter_length": 3, "num_attention_heads": HEADS, "short_filter_bias": False,
        "eps": 1e-6, "state_size": 4, "rotary_emb_base": 10000, "rotary_emb_scaling_factor": 8,
        "use_interpolated_rotary_pos_emb": True, "inner_mlp_size": INNER, "proj_groups": 1, "column_split_hyena": False,
        "column_split": True, "interleave": True, "evo2_style_activations": True, "tie_embeddings": True,
        "mha_out_proj_bias": True, "hyena_out_proj_bias": True, "hyena_flip_x1x2": False, "qkv_proj_bias": False,
        "max_seqlen": 64, "final_norm": True, "mlp_activation": "gelu",
    } | changes  # fmt: skip


def published(c: dict[str, Any], dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random weights in the published layout."""
    generator = torch.Generator().manual_seed(len(c))

    def randn(*shape: int, std: float = 0.4) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    w = {"embedding_layer.weight": randn(VOCAB, D), "norm.scale": 1 + randn(D)}
    if not c["tie_embeddings"]:
        w["unembed.weight"] = randn(VOCAB, D)
    for i in range(c["num_layers"]):
        p = {"pre_norm.scale": 1 + randn(D), "post_norm.scale": 1 + randn(D)}
        p |= {"mlp.l1.weight": randn(INNER, D), "mlp.l2.weight": randn(INNER, D), "mlp.l3.weight": randn(D, INNER)}
        if i in c["attn_layer_idxs"]:
            width = D + 2 * D // c["proj_groups"]
            p["inner_mha_cls.Wqkv.weight"] = randn(width, D)
            p["inner_mha_cls.out_proj.weight"] = randn(D, D)
            frequencies = c["rotary_emb_base"] ** (-torch.arange(0, D // HEADS, 2, dtype=torch.float64) / (D // HEADS))
            p["inner_mha_cls.rotary_emb.inv_freq"] = (
                frequencies.bfloat16().float()
            )  # as the published weights have them
            if c["qkv_proj_bias"]:
                p["inner_mha_cls.Wqkv.bias"] = randn(width)
            if c["mha_out_proj_bias"]:
                p["inner_mha_cls.out_proj.bias"] = randn(D)
        else:
            p["projections.weight"] = randn(3 * D, D)
            p["out_filter_dense.weight"] = randn(D, D)
            p["filter.short_filter_weight"] = randn(3 * D, 1, c["short_filter_length"])
            if c["qkv_proj_bias"]:
                p["projections.bias"] = randn(3 * D)
            if c["hyena_out_proj_bias"]:
                p["out_filter_dense.bias"] = randn(D)
            if c["short_filter_bias"]:
                p["filter.short_filter_bias"] = randn(3 * D)
            if i in c["hcl_layer_idxs"]:
                p["filter.log_poles"] = -randn(D, c["state_size"], 1).abs()
                p["filter.residues"] = randn(D, c["state_size"])
                p["filter.D"] = randn(D)
            else:
                kind = "hcm" if i in c["hcm_layer_idxs"] else "hcs"
                taps = c[f"{kind}_filter_length"]
                p["filter.h"] = randn(c[f"{kind}_filter_groups"], 1, taps)
                if taps >= 128:
                    p["filter.D"] = randn(D)
        w |= {f"blocks.{i}.{key}": value for key, value in p.items()}
    return w


def norm(x, scale, eps):
    return x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + eps) * scale


def three_parts(z, c):
    """What the published code calls x2, x1, v, of z [B, 3 D, T]."""
    if c["interleave"]:
        z = torch.cat([z[:, 0::3], z[:, 1::3], z[:, 2::3]], dim=1)
    if c["column_split_hyena"]:
        z = z.reshape(z.shape[0], HEADS, 3 * (D // HEADS), -1)
        parts = [part.reshape(z.shape[0], D, -1) for part in z.split(D // HEADS, dim=2)]
    else:
        parts = list(z.split(D, dim=1))
    return [parts[1], parts[0], parts[2]] if c["hyena_flip_x1x2"] else parts


def hyena(p, x, c, i):
    u = F.linear(x, p["projections.weight"], p.get("projections.bias")).transpose(1, 2)
    taps = c["short_filter_length"]
    z = F.conv1d(u, p["filter.short_filter_weight"], padding=taps - 1, groups=3 * D)[..., : x.shape[1]]
    if c["short_filter_bias"]:
        z = z + p["filter.short_filter_bias"][:, None]
    x2, x1, v = three_parts(z, c)
    gated = x1 * v
    steps = torch.arange(x.shape[1])
    if i in c["hcl_layer_idxs"]:
        k = (p["filter.residues"][..., None] * torch.exp(p["filter.log_poles"] * steps)).sum(1)
    else:
        h = p["filter.h"][:, 0].repeat_interleave(D // p["filter.h"].shape[0], dim=0)
        k = h if h.shape[1] >= 128 else h.flip(1)
        k = F.pad(k, (0, max(0, x.shape[1] - k.shape[1])))
    y = torch.zeros_like(gated)
    for t in range(x.shape[1]):
        y[..., t] = (k[:, : t + 1].flip(1) * gated[..., : t + 1]).sum(-1)
    if "filter.D" in p:
        y = y + p["filter.D"][:, None] * gated
    return F.linear((x2 * y).transpose(1, 2), p["out_filter_dense.weight"], p.get("out_filter_dense.bias"))


def attention(p, x, c):
    B, T, K = *x.shape[:2], D // HEADS
    weight, bias = p["inner_mha_cls.Wqkv.weight"], p.get("inner_mha_cls.Wqkv.bias")
    qkv = F.linear(x, weight, bias)
    if c["column_split"]:
        q, k, v = qkv.view(B, T, HEADS, 3, K).unbind(3)
    else:
        groups = HEADS // c["proj_groups"]
        q, k, v = qkv.view(B, T, HEADS + 2 * groups, K).split([HEADS, groups, groups], dim=2)
        k, v = (z.repeat_interleave(HEADS // groups, dim=2) for z in (k, v))
    scale = c["rotary_emb_scaling_factor"] if c["use_interpolated_rotary_pos_emb"] else 1
    angle = torch.arange(T)[:, None] / scale * p["inner_mha_cls.rotary_emb.inv_freq"].double()
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]

    def turn(z):
        a, b = z.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    scores = torch.einsum("bthk,bshk->bhts", turn(q), turn(k)) / math.sqrt(K)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).reshape(B, T, D)
    return F.linear(y, p["inner_mha_cls.out_proj.weight"], p.get("inner_mha_cls.out_proj.bias"))


def independent_logits(w, ids, c):
    x = w["embedding_layer.weight"][ids]
    for i in range(c["num_layers"]):
        p = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        n = norm(x, p["pre_norm.scale"], c["eps"])
        x = x + (attention(p, n, c) if i in c["attn_layer_idxs"] else hyena(p, n, c, i))
        n = norm(x, p["post_norm.scale"], c["eps"])
        a = n @ p["mlp.l1.weight"].T
        if i == 0 or not c["evo2_style_activations"]:
            a = F.gelu(a) if c["mlp_activation"] == "gelu" else F.silu(a)
        x = x + (a * (n @ p["mlp.l2.weight"].T)) @ p["mlp.l3.weight"].T
    head = w["embedding_layer.weight"] if c["tie_embeddings"] else w["unembed.weight"]
    return norm(x, w["norm.scale"], c["eps"]) @ head.T


IDS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, dict[str, Any]] = {
    "as Evo 2": {},
    "a large eps, no interpolation": {"eps": 0.1, "use_interpolated_rotary_pos_emb": False},
    "all biases, an own head": {"qkv_proj_bias": True, "short_filter_bias": True, "tie_embeddings": False},
    "no biases": {"mha_out_proj_bias": False, "hyena_out_proj_bias": False},
    "short filters of the middle": {"hcm_filter_length": 9, "hcs_filter_length": 4, "short_filter_length": 4},
    "long filters everywhere": {"hcs_filter_length": 130},
    "grouped by heads": {"column_split_hyena": True, "interleave": False},
    "grouped by heads and interleaved, flipped": {"column_split_hyena": True, "hyena_flip_x1x2": True},
    "rows in order": {"interleave": False, "column_split": False},
    "multi-query": {"proj_groups": 3, "column_split": False},
    "GELU in every layer": {"evo2_style_activations": False},
    "SiLU in every layer": {"evo2_style_activations": False, "mlp_activation": "silu"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_published_model(name):
    c = config(**VARIANTS[name])
    weights = published(c)
    model = evo2.load(weights, c)
    with torch.no_grad():
        expected = independent_logits(weights, IDS, c)
        assert_close(model(IDS), expected, name, 1e-10)
        state, chunks = START, []
        for chunk in IDS.split([6, 1, 7], dim=1):
            logits, state = model.step(chunk, state)
            chunks.append(logits)
        assert_close(torch.cat(chunks, dim=1), expected, f"{name}, by chunks", 1e-10)
    written = evo2.state_dict(model)
    assert list(written) == [key for key in written if torch.equal(written[key], weights[key])]
    assert set(written) == set(weights)


def test_gradients_are_those_of_the_published_model():
    c = config()
    weights = {key: value.requires_grad_() for key, value in published(c).items()}
    weights["blocks.2.inner_mha_cls.rotary_emb.inv_freq"].requires_grad_(False)
    model = evo2.load(weights, c)
    names = [key for key, value in weights.items() if value.requires_grad]
    expected = torch.autograd.grad(independent_logits(weights, IDS, c).square().sum(), [weights[n] for n in names])
    model(IDS).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    found = evo2.state_dict(model)  # gradients in the published layout
    for name, value in zip(names, expected, strict=True):
        assert_close(found[name], value, name, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_dtype_goes_in_and_comes_out_bit_for_bit(dtype):
    c = config()
    weights = published(c, dtype)
    weights["blocks.3.filter.log_poles"] = weights["blocks.3.filter.log_poles"].float()
    weights["unembed.weight"] = weights["embedding_layer.weight"].clone()
    extra = {"blocks.0.projections._extra_state": torch.zeros(3, dtype=torch.uint8)}
    model = evo2.load(weights | extra, c)
    assert not model.training
    assert model.embedding.weight.dtype == torch.float32
    written = evo2.state_dict(model)
    assert set(written) == set(weights)
    assert all(written[key].dtype == weights[key].dtype and torch.equal(written[key], weights[key]) for key in weights)


def test_frequencies_that_are_not_there_come_from_the_config():
    c = config(rotary_emb_base=100.0)
    weights = published(c)
    key = "blocks.2.inner_mha_cls.rotary_emb.inv_freq"
    exact = 100.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    lean = {k: v for k, v in weights.items() if k != key}
    assert_close(evo2.load(lean, c)(IDS), independent_logits(lean | {key: exact}, IDS, c), tolerance=1e-10)
    assert key not in evo2.state_dict(evo2.load(lean, c))


def test_a_model_of_our_own_is_written_with_its_filters_as_numbers():
    torch.manual_seed(0)
    layers = [{"mixer": name} for name in ("hyena_se", "hyena_mr", "attention", "hyena_li", "hyena_mr")]
    mixers = {"hyena_se": {"num_groups": 2}, "hyena_mr": {"num_groups": 4}, "hyena_li": {"state_size": 4}}
    settings = {"bias": False, "num_heads": HEADS}
    model = LanguageModel(
        ModelConfig.model_validate(
            {
                "arch": "lm", "d_model": D, "d_inner": INNER, "max_len": 64, "layers": layers, "norm": "rms_outer",
                "mlp": "evo2", "mlp_bias": False, "embed_dropout": 0.0, "vocab_size": VOCAB,
                "pad_vocab_multiple": 1, "norm_eps": 1e-14,
                "mixers": mixers | {"attention": settings},
            }
        )
    ).double()  # fmt: skip
    written = evo2.state_dict(model)
    c = config(use_interpolated_rotary_pos_emb=False)
    assert set(written) == {*published(c), "unembed.weight"}
    assert written["blocks.2.inner_mha_cls.rotary_emb.inv_freq"].dtype == torch.float32
    assert_close(
        independent_logits(written, IDS, c | {"eps": 1e-14}), model(IDS), tolerance=1e-6
    )  # float32 frequencies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("blocks.3.filter.residues"),
            r"blocks\.3\.filter\.residues is missing; its shape must be \(12, 4\)",
        ),
        (lambda w: w.update({"blocks.0.filter.D": torch.zeros(D)}), r"blocks\.0\.filter\.D is not a key"),
        (
            lambda w: w.update({"blocks.1.filter.h": torch.zeros(4, 1, 64)}),
            r"blocks\.1\.filter\.h must have shape \(4, 1, 128\); got \(4, 1, 64\)",
        ),
        (
            lambda w: w.update({"unembed.weight": torch.zeros(VOCAB, D)}),
            r"unembed\.weight must be embedding_layer\.weight",
        ),
        (lambda w: w.pop("embedding_layer.weight"), r"embedding_layer\.weight is missing"),
    ],
)
def test_wrong_keys_and_shapes_are_named(change, message):
    weights = published(config())
    change(weights)
    with pytest.raises(InputError, match=message):
        evo2.load(weights, config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idxs": [2, 3]}, r"layer 3 must be in one of the \*_layer_idxs; it is in attn_layer_idxs and hcl"),
        ({"num_layers": 6}, r"layer 5 must be in one of the \*_layer_idxs; it is in none"),
        ({"hcs_layer_idxs": [0, 9]}, r"must be below num_layers = 5; got \[9\]"),
        ({"mlp_activation": "silu"}, "mlp_activation must be 'gelu'"),
        ({"proj_groups": 3}, "column_split must be False with proj_groups above 1"),
        ({"final_norm": False}, "final_norm must be True"),
        ({"vocab_size": -1}, r"as model\.vocab_size"),
        ({"hcs_filter_groups": 5}, r"hyena_se\.num_groups = 5 must divide"),
    ],
)
def test_wrong_configs_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        evo2.load(published(config()), config(**changes))


def test_missing_settings_are_named_all_at_once():
    c = config()
    del c["eps"], c["hidden_size"]
    with pytest.raises(InputError) as raised:
        evo2.load({}, c)
    assert len(raised.value.problems) == 2
    c = config()
    del c["hcm_filter_length"]
    with pytest.raises(InputError, match="hcm_filter_length must be given with hcm_layer_idxs"):
        evo2.load({}, c)


def test_a_model_that_the_published_code_does_not_have_is_not_written():
    with pytest.raises(InputError, match=r"evo2\.state_dict: model\.pattern must be of attention"):
        evo2.state_dict(LanguageModel(ModelConfig()))


def test_width_of_the_mlp_that_is_not_given():
    c = config()
    del c["inner_mlp_size"]
    assert evo2.to_config(c).inner == 64  # int(2 * 12 * 4 / 3) = 32, rounded up to 64
    assert evo2.to_config(c | {"hidden_size": 48, "inner_size_multiple_of": 16}).inner == 128
