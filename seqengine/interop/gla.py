"""Gated linear attention models as flash-linear-attention publishes them, in and out: Yang et al. 2023, arXiv:2312.06635.

Two layouts of one model are read: the present one, and that of before 2025 with both matrices of an MLP in `mlp.gate_proj`.
Keys begin with `model.`, in some converted checkpoints with `model.model.`, and for a model without its head with nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from seqengine.blocks import Block, GatedMlp
from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop.entries import Entry, ShortFilter, key_problems
from seqengine.mixers.gla import Gla
from seqengine.model import LanguageModel, to_float64

DEFAULTS = {
    "hidden_size": 2048, "expand_k": 0.5, "expand_v": 1, "hidden_ratio": 4, "intermediate_size": None, "num_hidden_layers": 24,
    "num_heads": 4, "num_kv_heads": None, "feature_map": None, "use_short_conv": False, "conv_size": 4, "use_output_gate": True,
    "clamp_min": None, "elementwise_affine": True, "norm_eps": 1e-6, "fuse_norm": True, "max_position_embeddings": 2048,
    "vocab_size": 32000,
}  # fmt: skip
"""Of the published config; a config.json may leave out what it does not change."""
FIXED = {
    "model_type": "gla", "hidden_act": "swish", "attn": None, "use_gk": True, "use_gv": False, "conv_bias": False,
    "gate_logit_normalizer": 16, "gate_low_rank_dim": 16, "attnres_block_size": None,
}  # fmt: skip
"""Keys whose other values would be another model."""
FEATURE_MAPS = {
    None: "identity",
    "relu": "relu",
    "sqrelu": "squared_relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
}
MUST = {
    "arch": "lm", "norm": "rms", "norm_place": "pre", "mlp": "swiglu", "mlp_bias": False, "causal": True, "num_classes": 0,
}  # fmt: skip
"""What a model must be that the published code has."""
GATE_RANK, GATE_NORMALIZER = 16, 16.0
PREFIXES = ("model.", "model.model.", "")
MLP_MULTIPLE = 256


@dataclass(frozen=True)
class Layout:
    """How a state dict spells its keys."""

    prefix: str = "model."
    head: str | None = "lm_head.weight"
    norm: str = "g_norm_swish_gate"
    """Of the norm of the outputs: g_norm where the published code did not fuse it with the gate."""
    joined_mlp: bool = False
    """Whether mlp.gate_proj holds both the gate's rows and, after them, those of up_proj."""


def load(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """A model with published weights, in evaluation mode: model(input_ids [B, T]) -> logits [B, T, V].

    config:  the published config.json as a dict. The head is the embedding if tie_word_embeddings says so, or, where it says
             nothing, if there is no lm_head.weight.
    Dtype:   float64 if the embedding is, else float32.
    Raises:  InputError naming every key that is missing, unknown, or of the wrong shape, or that this model cannot honour.
    """
    layout = _layout(state_dict, config)
    is_tied = bool(config.get("tie_word_embeddings", layout.head is None))
    if not is_tied and layout.head is None:
        layout = replace(layout, head=Layout.head)
    model = LanguageModel(to_config(config, tied_head=is_tied))
    embedding = state_dict.get(f"{layout.prefix}embeddings.weight")
    if embedding is not None and embedding.dtype == torch.float64:
        to_float64(model)
    expected = dict(_entries(model, layout))
    _check(state_dict, expected, layout)
    with torch.no_grad():
        for key, entry in expected.items():
            if key in state_dict:
                entry.write(state_dict[key])
    model.published_layout = layout
    return model.eval()


def state_dict(model: LanguageModel, *, layout: Layout | None = None) -> dict[str, Tensor]:
    """The published layout of a model's weights: by default the one it was loaded from, else the present one.

    Raises InputError if the published code has no such model.
    """
    _check_published(model.config, "gla.state_dict")
    return {key: entry.read() for key, entry in _entries(model, layout or _chosen_layout(model))}


def to_config(config: Mapping[str, Any], *, tied_head: bool | None = None) -> ModelConfig:
    """The published config.json as a `ModelConfig`. Raises InputError if a setting is not supported, for each of them.

    tied_head: whether the head is the embedding; None: what the config says, not if it says nothing.
    """
    problems = []
    for key, only in FIXED.items():
        if config.get(key, only) != only:
            problems.append(f"gla config: {key} must be {only!r}; got {config[key]!r}.")
    value = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    if value["hidden_ratio"] is None:
        value["hidden_ratio"] = DEFAULTS["hidden_ratio"]
    if value["feature_map"] not in FEATURE_MAPS:
        known = ", ".join(repr(name) for name in FEATURE_MAPS)
        problems.append(f"gla config: feature_map must be one of {known}; got {value['feature_map']!r}.")
    if value["use_short_conv"] and config.get("share_conv_kernel", False):
        problems.append("gla config: share_conv_kernel must be False with use_short_conv; got True.")
    for key, default in DEFAULTS.items():
        if type(default) in (int, float) and type(value[key]) not in (int, float):
            problems.append(f"gla config: {key} must be a number; got {value[key]!r}.")
    if problems:
        raise InputError(*problems)
    mixer = {
        "num_heads": value["num_heads"],
        "num_kv_heads": value["num_kv_heads"],
        "expand_k": float(value["expand_k"]),
        "expand_v": float(value["expand_v"]),
        "feature_map": FEATURE_MAPS[value["feature_map"]],
        "short_filter": value["conv_size"] if value["use_short_conv"] else 0,
        "gate_rank": GATE_RANK,
        "gate_normalizer": GATE_NORMALIZER,
        "gate_min": None if value["clamp_min"] is None else float(value["clamp_min"]),
        "output_gate": value["use_output_gate"],
        "norm_weight": bool(value["elementwise_affine"]),
        "norm_eps": float(value["norm_eps"]),
    }
    model = {
        "arch": "lm",
        "d_model": value["hidden_size"],
        "n_layer": value["num_hidden_layers"],
        "d_inner": value["intermediate_size"] or mlp_width(value["hidden_size"], value["hidden_ratio"]),
        "max_len": value["max_position_embeddings"],
        "pattern": ("gla",),
        "mixers": {"gla": mixer},
        "norm": "rms",
        "mlp": "swiglu",
        "mlp_bias": False,
        "embed_dropout": 0.0,
        "vocab_size": value["vocab_size"],
        "pad_vocab_multiple": 1,
        "norm_eps": float(value["norm_eps"]),
        "tied_head": bool(config.get("tie_word_embeddings", False)) if tied_head is None else tied_head,
    }
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        found = error.errors(include_url=False)
        told = (f"gla config: as model.{'.'.join(map(str, e['loc']))}: {e['msg']}; got {e['input']!r}." for e in found)
        raise InputError(*told) from None


def published_config(model: LanguageModel) -> dict[str, Any]:
    """The published config.json of a model, as a dict, without what is about tokens: the inverse of `to_config`.

    Raises InputError if the published code has no such model.
    """
    _check_published(model.config, "gla.published_config")
    c, mixer = model.config, _gla(model.config)
    names = {ours: published for published, ours in FEATURE_MAPS.items() if published != "silu"}
    return {
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer,
        "intermediate_size": c.inner,
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "feature_map": names[mixer.feature_map],
        "use_short_conv": mixer.short_filter > 0,
        "conv_size": mixer.short_filter or DEFAULTS["conv_size"],
        "clamp_min": mixer.gate_min,
        "use_output_gate": mixer.output_gate,
        "elementwise_affine": mixer.norm_weight,
        "fuse_norm": _chosen_layout(model).norm == Layout.norm or not mixer.output_gate,
        "hidden_act": "swish",
        "norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_len,
        "vocab_size": c.padded_vocab,
        "tie_word_embeddings": c.tied_head,
    }


def mlp_width(hidden_size: int, hidden_ratio: int) -> int:
    """Two thirds of hidden_ratio * hidden_size, rounded up to a multiple of 256."""
    width = int(hidden_size * hidden_ratio * 2 / 3)
    return -(-width // MLP_MULTIPLE) * MLP_MULTIPLE


class _Joined(Entry):
    """Rows of several of the model's tensors under one key."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(tensors[0], (sum(len(t) for t in tensors), *tensors[0].shape[1:]))
        self.tensors = tensors

    def read(self) -> Tensor:
        return torch.cat([t.detach() for t in self.tensors])

    def write(self, value: Tensor) -> None:
        for t, part in zip(self.tensors, value.split([len(t) for t in self.tensors]), strict=True):
            t.copy_(part)


def _entries(model: LanguageModel, layout: Layout) -> Iterator[tuple[str, Entry]]:
    prefix = layout.prefix
    yield f"{prefix}embeddings.weight", Entry(model.embedding.weight)
    for i, block in enumerate(model.each_block()):
        for key, entry in _block_entries(block, layout):
            yield f"{prefix}layers.{i}.{key}", entry
    yield f"{prefix}norm.weight", Entry(model.norm.weight)  # type: ignore[arg-type]
    if layout.head is not None:
        yield layout.head, Entry(model.head_weight, required=not model.config.tied_head)


def _block_entries(block: Block, layout: Layout) -> Iterator[tuple[str, Entry]]:
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, Gla)
    assert isinstance(mlp, GatedMlp)
    assert block.norm2 is not None
    yield "attn_norm.weight", Entry(block.norm1.weight)  # type: ignore[arg-type]
    inputs = mixer.inputs
    for name, rows in zip("qkv", inputs.proj.weight.split(inputs.widths), strict=True):
        yield f"attn.{name}_proj.weight", Entry(rows)
    if inputs.conv_weight is not None:
        for name, rows in zip("qkv", inputs.conv_weight.split(inputs.widths), strict=True):
            yield f"attn.{name}_conv1d.weight", ShortFilter(rows)
    yield "attn.gk_proj.0.weight", Entry(mixer.decay_in.weight)
    yield "attn.gk_proj.1.weight", Entry(mixer.decay_out.weight)
    yield "attn.gk_proj.1.bias", Entry(mixer.decay_out.bias)
    if mixer.gate is not None:
        yield "attn.g_proj.weight", Entry(mixer.gate.weight)
    if mixer.norm.weight is not None:
        yield f"attn.{layout.norm}.weight", Entry(mixer.norm.weight)
    yield "attn.o_proj.weight", Entry(mixer.out_proj.weight)
    yield "mlp_norm.weight", Entry(block.norm2.weight)  # type: ignore[arg-type]
    if layout.joined_mlp:
        yield "mlp.gate_proj.weight", _Joined(mlp.gate.weight, mlp.up.weight)
    else:
        yield "mlp.gate_proj.weight", Entry(mlp.gate.weight)
        yield "mlp.up_proj.weight", Entry(mlp.up.weight)
    yield "mlp.down_proj.weight", Entry(mlp.down.weight)


def _chosen_layout(model: LanguageModel) -> Layout:
    """The layout that a model was loaded from, else the present one."""
    if isinstance(model.published_layout, Layout):
        return model.published_layout
    return Layout() if _gla(model.config).output_gate else Layout(norm="g_norm")


def _layout(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layout:
    for prefix in PREFIXES:
        if any(key.startswith((f"{prefix}embeddings.", f"{prefix}layers.")) for key in state_dict):
            break
    else:
        raise InputError(
            "gla.load: no key begins with '[prefix]layers.' for a prefix in "
            f"{', '.join(repr(p) for p in PREFIXES)}; got {sorted(state_dict)[:5]}. Pass the state dict itself."
        )
    heads = [key for key in state_dict if key.endswith("lm_head.weight")]
    layer = f"{prefix}layers.0."
    is_fused = config.get("fuse_norm", True) and config.get("use_output_gate", True)
    if f"{layer}attn.g_norm.weight" in state_dict:
        is_fused = False
    has_one = f"{layer}mlp.gate_proj.weight" in state_dict and f"{layer}mlp.up_proj.weight" not in state_dict
    return Layout(prefix, heads[0] if heads else None, "g_norm_swish_gate" if is_fused else "g_norm", has_one)


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Entry], layout: Layout) -> None:
    problems = key_problems("gla.load", tensors, expected, prefix=layout.prefix, source=", by the config")
    head, embedding = layout.head, f"{layout.prefix}embeddings.weight"
    is_twice = head is not None and head in tensors and not expected[head].required
    if not problems and head is not None and is_twice and not torch.equal(tensors[head], tensors[embedding]):
        problems.append(f"gla.load: {head} must be {embedding}, for tie_word_embeddings = True; got other numbers.")
    if problems:
        raise InputError(*problems)


def _gla(config: ModelConfig) -> Any:
    return config.mixers.gla  # type: ignore[attr-defined]


def _check_published(config: ModelConfig, name: str) -> None:
    """InputError if the published code has no such model."""
    problems = [
        f"model.{key} must be {v!r}; got {getattr(config, key)!r}."
        for key, v in MUST.items()
        if getattr(config, key) != v
    ]
    others = sorted(set(config.mixer_names) - {"gla"})
    if others:
        problems.append(f"all mixers must be 'gla'; got {', '.join(others)}.")
    must = {"gate_rank": GATE_RANK, "gate_normalizer": GATE_NORMALIZER, "norm_eps": config.norm_eps}
    for key, value in must.items():
        if getattr(_gla(config), key) != value:
            problems.append(f"model.mixers.gla.{key} must be {value}; got {getattr(_gla(config), key)}.")
    if problems:
        raise InputError(*(f"{name}: {problem}" for problem in problems))
