"""H3 weights in and out: against an independent reading of the published definition, in every published layout."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from seqengine.errors import InputError
from seqengine.interop import h3
from seqengine.mixers.mixer import START
from tests.tolerances import assert_close

D, N, LAYERS, HEADS, VOCAB = 8, 6, 3, 2, 13
ATTENTION = [1]


def config(head_dim: int = 1, rotary: int = 0, **changes: Any) -> dict[str, Any]:
    attention = {"num_heads": HEADS, "dropout": 0.1, "use_flash_attn": True} | (
        {"rotary_emb_dim": rotary} if rotary else {}
    )
    return {
        "d_model": D, "n_layer": LAYERS, "d_inner": 4 * D, "vocab_size": VOCAB, "pad_vocab_size_multiple": 8,
        "ssm_cfg": {"mode": "diag", "measure": "diag-lin", "d_state": N, "head_dim": head_dim}, "attn_layer_idx": ATTENTION,
        "attn_cfg": attention, "embed_dropout": 0.1, "resid_dropout": 0.0, "layer_norm_epsilon": 1e-5,
    } | changes  # fmt: skip


def randoms(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def layer_weights(head_dim: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    randn, H = randoms(seed, dtype), D // head_dim
    weights = {f"{n}.weight": 3 * randn(D, D) for n in ("q_proj", "k_proj", "v_proj", "output_linear")}
    weights |= {f"{n}.bias": randn(D) for n in ("q_proj", "k_proj", "v_proj", "output_linear")}
    return weights | {
        "ssm_k_kernel.kernel.B": randn(D, N), "ssm_k_kernel.kernel.C": randn(1, D, N), "ssm_k_D": randn(D), "D": randn(H),
        "kernel.kernel.C": randn(1, H, N // 2, 2), "kernel.kernel.log_dt": -2 + randn(H),
        "kernel.kernel.B": randn(H, N // 2, 2), "kernel.kernel.inv_A_real": randn(H, N // 2),
        "kernel.kernel.A_imag": 3 * randn(H, N // 2),
    }  # fmt: skip


def complex_of(pairs: torch.Tensor) -> torch.Tensor:
    return torch.complex(pairs[..., 0], pairs[..., 1])


def convolve(k: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """k [..., T], u [..., T], lag by lag."""
    y = torch.zeros(torch.broadcast_shapes(k.shape, u.shape), dtype=u.dtype)
    for lag in range(u.shape[-1]):
        y = y + F.pad(k[..., lag, None] * u[..., : u.shape[-1] - lag], (lag, 0))
    return y


def independent_layer(w, x, head_dim, bilinear=True):
    """The published layer: filters as powers of poles; outer products b d1 d2 h l, read by q over d1, put out as (d2 h)."""
    B, T, _ = x.shape
    q, k, v = ((x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"]).transpose(1, 2) for n in "qkv")
    b, c = w["ssm_k_kernel.kernel.B"], w["ssm_k_kernel.kernel.C"][0]
    shift = torch.zeros(D, T, dtype=x.dtype)
    for lag in range(min(N, T)):
        shift[:, lag] = sum(b[:, j] * c[:, j + lag] for j in range(N - lag))
    k = convolve(shift, k) + w["ssm_k_D"][:, None] * k
    dt = w["kernel.kernel.log_dt"].exp()[:, None]
    A = torch.complex(-w["kernel.kernel.inv_A_real"].exp(), w["kernel.kernel.A_imag"])
    if bilinear:
        pole, gain = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    else:
        pole, gain = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    weight = complex_of(w["kernel.kernel.B"]) * complex_of(w["kernel.kernel.C"][0]) * gain
    K = torch.stack([2 * (weight * pole**t).sum(1).real for t in range(T)], dim=1)
    y = torch.zeros(B, D, T, dtype=x.dtype)
    H = D // head_dim
    for h in range(H):
        for i in range(head_dim):
            for j in range(head_dim):
                product = k[:, h * head_dim + i] * v[:, h * head_dim + j]
                read = convolve(K[h], product) + w["D"][h] * product
                y[:, j * H + h] += q[:, h * head_dim + i] * read
    return y.transpose(1, 2) @ w["output_linear.weight"].T + w["output_linear.bias"]


@pytest.mark.parametrize("head_dim", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 4, 21])
def test_layer_is_the_published_one(head_dim, T):
    weights = layer_weights(head_dim)
    x = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer = h3.load_layer(weights, head_dim=head_dim)
    y, expected = layer(x), independent_layer(weights, x, head_dim)
    assert_close(y, expected)
    (found,), (dx,) = (torch.autograd.grad(z.square().sum(), x) for z in (y, expected))
    assert_close(found, dx, "dx")
    zoh = h3.load_layer(weights, head_dim=head_dim, discretisation="zoh")
    assert_close(zoh(x), independent_layer(weights, x, head_dim, bilinear=False))


def test_layer_in_float32():
    weights = layer_weights(2, dtype=torch.float32)
    x = torch.randn(2, 300, D, generator=torch.Generator().manual_seed(1))
    exact = independent_layer({k: v.double() for k, v in weights.items()}, x.double(), 2)
    y = h3.load_layer(weights, head_dim=2)(x)
    assert y.dtype == torch.float32
    assert_close(y, exact)


@pytest.mark.parametrize(
    ("change", "head_dim", "message"),
    [
        (lambda w: w.pop("D"), 1, r"D is missing; its shape must be \(8,\)"),
        (lambda w: w.update(extra=torch.zeros(1)), 1, "extra is not a key"),
        (lambda w: None, 2, r"kernel\.kernel\.log_dt must have shape \(4,\); got \(8,\)"),
        (lambda w: None, 3, "head_dim must divide d_model = 8; got 3"),
        (lambda w: w.update({"ssm_k_kernel.kernel.B": torch.zeros(8, 5)}), 1, "d_state must be even"),
        (lambda w: w.pop("q_proj.weight"), 1, r"q_proj\.weight \[D, D\] and ssm_k_kernel\.kernel\.B .* must be given"),
    ],
)
def test_wrong_layers_are_named(change, head_dim, message):
    weights = layer_weights()
    change(weights)
    with pytest.raises(InputError, match=message):
        h3.load_layer(weights, head_dim=head_dim)


def published(head_dim: int = 1, rotary: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random weights of a hybrid in the present layout."""
    randn = randoms(5, dtype)
    weights = {"backbone.embeddings.word_embeddings.weight": randn(16, D)}
    weights |= {"backbone.ln_f.weight": 1 + randn(D), "backbone.ln_f.bias": randn(D)}
    for i in range(LAYERS):
        if i in ATTENTION:
            mixer = {
                "Wqkv.weight": 3 * randn(3 * D, D), "Wqkv.bias": randn(3 * D), "out_proj.weight": 3 * randn(D, D),
                "out_proj.bias": randn(D),
            }  # fmt: skip
            if rotary:
                mixer["rotary_emb.inv_freq"] = (10000 ** (-torch.arange(0, rotary, 2) / rotary)).float()
        else:
            mixer = layer_weights(head_dim, seed=i, dtype=dtype)
        layer = {f"mixer.{key}": value for key, value in mixer.items()}
        layer |= {f"norm{n}.weight": 1 + randn(D) for n in (1, 2)} | {f"norm{n}.bias": randn(D) for n in (1, 2)}
        layer |= {"mlp.fc1.weight": 3 * randn(4 * D, D), "mlp.fc1.bias": randn(4 * D)}
        layer |= {"mlp.fc2.weight": 3 * randn(D, 4 * D), "mlp.fc2.bias": randn(D)}
        weights |= {f"backbone.layers.{i}.{key}": value for key, value in layer.items()}
    return weights | {"lm_head.weight": weights["backbone.embeddings.word_embeddings.weight"].clone()}


def turn(x, frequencies):
    """x [B, T, H, K]: channel i with channel i + R / 2, for the first R channels."""
    R = 2 * len(frequencies)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies.to(x.dtype)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
    return torch.cat([a * c - b * s, a * s + b * c, rest], dim=-1)


def independent_attention(w, x):
    B, T, _ = x.shape
    q, k, v = (x @ w["Wqkv.weight"].T + w["Wqkv.bias"]).reshape(B, T, 3, HEADS, D // HEADS).unbind(2)
    if "rotary_emb.inv_freq" in w:
        q, k = turn(q, w["rotary_emb.inv_freq"]), turn(k, w["rotary_emb.inv_freq"])
    scores = torch.einsum("bthk,bshk->bhts", q, k) / (D // HEADS) ** 0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).reshape(B, T, D)
    return y @ w["out_proj.weight"].T + w["out_proj.bias"]


def independent_logits(weights, ids, head_dim=1):
    w = {key.removeprefix("backbone."): value for key, value in weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids]
    for i in range(LAYERS):
        p = {key.removeprefix(f"layers.{i}."): value for key, value in w.items() if key.startswith(f"layers.{i}.")}
        mixer = {key.removeprefix("mixer."): value for key, value in p.items()}
        n = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-5)
        x = x + (independent_attention(mixer, n) if i in ATTENTION else independent_layer(mixer, n, head_dim))
        n = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-5)
        inner = F.gelu(n @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"], approximate="tanh")
        x = x + inner @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return F.layer_norm(x, (D,), w["ln_f.weight"], w["ln_f.bias"], 1e-5) @ w["lm_head.weight"].T


IDS = torch.randint(0, VOCAB, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("rotary", [0, 2, 4])
def test_logits_are_those_of_the_published_hybrid(head_dim, rotary):
    weights = published(head_dim, rotary)
    model = h3.load(weights, config(head_dim, rotary))
    assert not model.training
    assert_close(model(IDS), independent_logits(weights, IDS, head_dim))


def test_published_hybrid_generates_with_states():
    model = h3.load(published(2, 4), config(2, 4))
    state, logits = START, []
    for chunk in IDS.split([6, 1, 8], dim=1):
        out, state = model.step(chunk, state)
        logits.append(out)
    assert_close(torch.cat(logits, 1), model(IDS))


def older(weights):
    """Norms counted from what they follow, under the names of the first checkpoints."""
    renamed = {}
    for key, value in weights.items():
        key = key.replace("backbone.embeddings.word_embeddings.", "embedding.")
        for i in reversed(range(LAYERS)):
            after = "norm." if i == 0 else f"layers.{i - 1}.norm2."
            key = key.replace(f"backbone.layers.{i}.norm1.", f"old.{after}")
            key = key.replace(f"backbone.layers.{i}.norm2.", f"old.layers.{i}.norm1.")
        key = key.replace("backbone.ln_f.", f"old.layers.{LAYERS - 1}.norm2.")
        renamed[key.replace("old.", "s4seq.encoder.").replace("backbone.", "s4seq.encoder.")] = value
    return renamed


LAYOUTS = {
    "present": lambda w: w,
    "lightning": lambda w: {f"model.{key}": value for key, value in w.items()},
    "older": older,
    "older, in lightning": lambda w: {f"model.{key}": value for key, value in older(w).items()},
    "no head": lambda w: {key: value for key, value in w.items() if key != "lm_head.weight"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary", [0, 4])
def test_every_layout_goes_in_and_comes_out_bit_for_bit(layout, rotary):
    weights = published(1, rotary, torch.float32)
    spelt = LAYOUTS[layout](weights)
    model = h3.load(spelt, config(1, rotary))
    assert torch.equal(model(IDS), h3.load(weights, config(1, rotary))(IDS))
    written = h3.state_dict(model)
    assert set(written) == set(spelt)
    assert all(torch.equal(written[key], spelt[key]) and written[key].dtype == spelt[key].dtype for key in spelt)


def test_a_head_of_its_own_is_kept():
    weights = published()
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    model = h3.load(weights, config())
    assert_close(model(IDS), independent_logits(weights, IDS))
    assert torch.equal(h3.state_dict(model)["lm_head.weight"], weights["lm_head.weight"])


def test_models_without_attention():
    weights = published()
    renamed = {
        key.replace(".layers.2.", ".layers.1."): value for key, value in weights.items() if ".layers.1." not in key
    }
    model = h3.load(renamed, config(n_layer=2, attn_layer_idx=None, attn_cfg=None))
    assert model.config.mixer_names == ("h3", "h3")
    assert set(h3.state_dict(model)) == set(renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.layers.1.norm2.bias"), r"layers\.1\.norm2\.bias is missing; its shape must be \(8,\)"),
        (lambda w: w.update({"backbone.layers.0.mixer.extra": torch.zeros(1)}), r"layers\.0\.mixer\.extra is not a key"),
        (
            lambda w: w.update({"backbone.layers.1.mixer.Wqkv.weight": torch.zeros(8, 8)}),
            r"layers\.1\.mixer\.Wqkv\.weight must have shape \(24, 8\); got \(8, 8\)",
        ),
        (lambda w: w.pop("backbone.embeddings.word_embeddings.weight"), r"word_embeddings\.weight is missing"),
    ],
)  # fmt: skip
def test_wrong_keys_and_shapes_are_named(change, message):
    weights = published()
    change(weights)
    with pytest.raises(InputError, match=message):
        h3.load(weights, config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": None}, "d_model must be given"),
        ({"ssm_cfg": {"mode": "nplr"}}, r"ssm_cfg\.mode must be 'diag'; got 'nplr'"),
        ({"ssm_cfg": {"disc": "dss"}}, r"mixers\.h3\.discretisation: .*; got 'dss'"),
        ({"attn_cfg": {"num_heads": 2, "causal": False}}, r"attn_cfg\.causal must be True; got False"),
        ({"attn_cfg": {}}, r"attn_cfg\.num_heads must be given"),
        ({"attn_layer_idx": [1, 3]}, r"attn_layer_idx must be in 0 \.\. n_layer - 1; got \[3\]"),
        ({"max_position_embeddings": 128}, "max_position_embeddings must be 0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        h3.load(published(), config(**changes))


def test_all_wrong_keys_are_named_at_once():
    weights = published()
    del weights["backbone.ln_f.weight"], weights["backbone.ln_f.bias"]
    with pytest.raises(InputError) as raised:
        h3.load(weights, config())
    assert len(raised.value.problems) == 2


def test_not_an_h3_state_dict():
    with pytest.raises(InputError, match="a key must begin with"):
        h3.load({"state_dict": torch.zeros(1)}, config())
