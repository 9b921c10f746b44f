"""H3 weights as published, in and out, whole models and single layers: Fu et al. 2022, arXiv:2212.14052.

Two layouts of one model are read. In both a block is norm, mixer, norm, MLP; the older one counts the norms from what they
follow instead of what they precede, so that the first norm stands before all layers and the last one in the last layer.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from seqengine.blocks import Block, Mlp
from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop.entries import Entry, key_problems
from seqengine.mixers.attention import Attention
from seqengine.mixers.diagonal import Initialisation
from seqengine.mixers.h3 import H3, H3Config
from seqengine.mixers.mixer import Place
from seqengine.mixers.rotary import Rotary
from seqengine.model import LanguageModel, to_float64

MAX_LEN = 1 << 20
"""Longest sequence of a model whose config sets no limit: its filters and rotary positions go on for ever."""
FIXED_LAYER = {"_name_": "h3", "mode": "diag", "real_type": "exp", "bandlimit": None, "force_real": False}
FIXED_ATTENTION = {"causal": True, "rotary_emb_scale_base": None, "softmax_scale": None, "dwconv": False}
"""Settings whose other values would be another model."""


@dataclass(frozen=True)
class Layout:
    """How a state dict spells its keys."""

    prefix: str = "backbone."
    embedding: str = "backbone.embeddings.word_embeddings.weight"
    head: str | None = "lm_head.weight"
    first_norm: str | None = None
    """Older layout: what the norm before all layers is called, after the prefix."""
    rotary: torch.dtype | None = None
    """Of the frequencies of rotary attention, if they are there."""


class H3Layer(nn.Module):
    """One H3 layer: layer(x [B, T, D]) -> y [B, T, D]."""

    def __init__(self, mixer: H3) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x)[0]
        return y


def load_layer(state_dict: Mapping[str, Tensor], *, head_dim: int, discretisation: str = "bilinear") -> H3Layer:
    """One published H3 layer, in evaluation mode: layer(x [B, T, D]) -> y. Any T.

    Dtype:  float64 if the weights are, else float32.
    Raises: InputError naming every key that is missing, unknown, or of the wrong shape.
    """
    first, shift = state_dict.get("q_proj.weight"), state_dict.get("ssm_k_kernel.kernel.B")
    if first is None or shift is None or first.ndim != 2 or shift.ndim != 2:
        raise InputError(
            "h3.load_layer: q_proj.weight [D, D] and ssm_k_kernel.kernel.B [D, N] must be given; "
            f"got the keys {sorted(state_dict)}. Pass the state dict of one layer, without a prefix."
        )
    try:
        config = H3Config(d_state=shift.shape[1], head_dim=head_dim, discretisation=discretisation)  # type: ignore[arg-type]
        mixer = H3(config, Place(first.shape[0], max_len=1))
    except ValueError as error:
        raise InputError(f"h3.load_layer: {_words(error)}.") from None
    mixer = mixer.double() if first.dtype == torch.float64 else mixer
    _write(state_dict, dict(_h3_entries(mixer)), "h3.load_layer")
    return H3Layer(mixer).eval()


def load(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """A model with published weights, in evaluation mode: model(input_ids [B, T]) -> logits [B, T, V].

    config:  what the published model is made with, as a dict: d_model, n_layer, vocab_size, ssm_cfg (or layer), attn_layer_idx,
             attn_cfg and so on. Dropout of attention weights is left out.
    Dtype:   float64 if the embedding is, else float32.
    Raises:  InputError naming every key that is missing, unknown, or of the wrong shape, or that this model cannot honour.
    """
    layout = _layout(state_dict)
    model = LanguageModel(to_config(config, tied_head=_is_tied(state_dict, layout)))
    if state_dict[layout.embedding].dtype == torch.float64:
        to_float64(model)
    _write(state_dict, dict(_entries(model, layout)), "h3.load")
    model.published_layout = layout
    return model.eval()


def state_dict(model: LanguageModel, *, layout: Layout | None = None) -> dict[str, Tensor]:
    """The published layout of a model's weights: by default the one it was loaded from, else the present one."""
    published = model.published_layout
    chosen = layout or (published if isinstance(published, Layout) else Layout())
    return {key: entry.read() for key, entry in _entries(model, chosen)}


def to_config(config: Mapping[str, Any], *, tied_head: bool = True) -> ModelConfig:
    """The published settings as a `ModelConfig`. Raises InputError naming each that is missing or not supported."""
    problems = [
        f"h3 config: {key} must be given; got the keys {sorted(config)}."
        for key in ("d_model", "n_layer", "vocab_size")
        if config.get(key) is None
    ]
    layer = config.get("ssm_cfg", config.get("layer")) or {}
    attention, where = config.get("attn_cfg") or {}, config.get("attn_layer_idx") or []
    for given, fixed, name in ((layer, FIXED_LAYER, "ssm_cfg"), (attention, FIXED_ATTENTION, "attn_cfg")):
        for key, must in fixed.items():
            value = given.get(key, must)
            if value != must and (value or must):
                problems.append(f"h3 config: {name}.{key} must be {must!r}; got {value!r}.")
    if config.get("max_position_embeddings"):
        problems.append(
            f"h3 config: max_position_embeddings must be 0 (no learned positions); got {config['max_position_embeddings']}."
        )
    if where and "num_heads" not in attention:
        problems.append("h3 config: attn_cfg.num_heads must be given with attn_layer_idx.")
    outside = [i for i in where if not 0 <= i < (config.get("n_layer") or 0)]
    if outside:
        problems.append(f"h3 config: attn_layer_idx must be in 0 .. n_layer - 1; got {outside}.")
    if problems:
        raise InputError(*problems)
    names = ["attention" if i in where else "h3" for i in range(config["n_layer"])]
    values = {
        "arch": "lm",
        "d_model": config["d_model"],
        "d_inner": config.get("d_inner"),
        "max_len": layer.get("l_max") or MAX_LEN,
        "layers": [{"mixer": name, "repeat": len(list(run))} for name, run in groupby(names)],
        "mixers": {"h3": _h3_settings(layer)} | ({"attention": _attention_settings(attention)} if where else {}),
        "embed_dropout": float(config.get("embed_dropout", 0.1)),
        "resid_dropout": float(config.get("resid_dropout", 0.0)),
        "vocab_size": config["vocab_size"],
        "pad_vocab_multiple": config.get("pad_vocab_size_multiple", 1),
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "tied_head": tied_head,
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"h3 config: {_words(error)}.") from None


def _h3_settings(layer: Mapping[str, Any]) -> dict[str, Any]:
    init = str(layer.get("measure", "diag-lin")).removeprefix("diag-")
    return {
        "d_state": layer.get("d_state", 64),
        "head_dim": layer.get("head_dim", 1),
        "discretisation": layer.get("disc", "bilinear"),
        "init": init if init in get_args(Initialisation) else "lin",  # of no account once weights are loaded
        "step_min": float(layer.get("dt_min", 0.001)),
        "step_max": float(layer.get("dt_max", 0.1)),
    }


def _attention_settings(attention: Mapping[str, Any]) -> dict[str, Any]:
    rotary_dim = attention.get("rotary_emb_dim") or 0
    return {
        "num_heads": attention["num_heads"],
        "num_kv_heads": attention.get("num_heads_kv"),
        "rotary": rotary_dim > 0,
        "rotary_dim": rotary_dim or None,
        "rotary_base": float(attention.get("rotary_emb_base", 10000.0)),
        "rotary_interleaved": bool(attention.get("rotary_emb_interleaved", False)),
        "bias": bool(attention.get("qkv_proj_bias", attention.get("bias", True))),
        "out_bias": bool(attention.get("out_proj_bias", True)),
    }


def _words(error: ValueError) -> str:
    """What a config's validation found, by key."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'layer'}: {e['msg']}; got {e['input']!r}" for e in found)


class _Frequencies(Entry):
    """Frequencies of rotary attention: computed, and taken from the file as they are there."""

    def __init__(self, rotary: Rotary, dtype: torch.dtype) -> None:
        super().__init__(rotary.frequencies, required=False)
        self.rotary, self.dtype = rotary, dtype

    def read(self) -> Tensor:
        return self.rotary.frequencies.to(self.dtype)

    def write(self, value: Tensor) -> None:
        self.rotary.set_frequencies(value)


def _named(name: str, module: nn.Module) -> Iterator[tuple[str, Entry]]:
    for key, parameter in module.named_parameters():
        yield f"{name}.{key}", Entry(parameter)


def _entries(model: LanguageModel, layout: Layout) -> Iterator[tuple[str, Entry]]:
    prefix, depth = layout.prefix, model.config.n_layer
    yield layout.embedding, Entry(model.embedding.weight)
    for i, block in enumerate(model.each_block()):
        layer = f"{prefix}layers.{i}."
        if layout.first_norm is None:
            first, second = f"{layer}norm1", f"{layer}norm2"
        else:
            first = f"{prefix}layers.{i - 1}.norm2" if i else f"{prefix}{layout.first_norm}"
            second = f"{layer}norm1"
        yield from _block_entries(block, layer, (first, second), layout)
    last = f"{prefix}ln_f" if layout.first_norm is None else f"{prefix}layers.{depth - 1}.norm2"
    yield from _named(last, model.norm)
    if layout.head is not None:
        yield layout.head, Entry(model.head_weight, required=not model.config.tied_head)


def _block_entries(block: Block, layer: str, norms: tuple[str, str], layout: Layout) -> Iterator[tuple[str, Entry]]:
    mixer, mlp = block.mixer, block.mlp
    if (
        not isinstance(mixer, H3 | Attention)
        or not isinstance(mlp, Mlp)
        or not block.is_pre_norm
        or block.norm2 is None
    ):
        kinds = f"{type(mixer).__name__}, {type(mlp).__name__}, {'pre' if block.is_pre_norm else 'post'}-norm"
        raise InputError(
            f"h3.state_dict: every block must be an H3 or attention layer and a GELU MLP, pre-norm; got {kinds}."
        )
    if isinstance(mixer, H3):
        for key, entry in _h3_entries(mixer):
            yield f"{layer}mixer.{key}", entry
    else:
        yield from _named(f"{layer}mixer.Wqkv", mixer.qkv_proj)
        yield from _named(f"{layer}mixer.out_proj", mixer.out_proj)
        if mixer.rotary is not None and layout.rotary is not None:
            yield f"{layer}mixer.rotary_emb.inv_freq", _Frequencies(mixer.rotary, layout.rotary)
    yield from _named(norms[0], block.norm1)
    yield from _named(norms[1], block.norm2)
    yield from _named(f"{layer}mlp", mlp)


def _h3_entries(mixer: H3) -> Iterator[tuple[str, Entry]]:
    weights, biases = mixer.in_proj.weight.chunk(3), mixer.in_proj.bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        yield f"{name}_proj.weight", Entry(weight)
        yield f"{name}_proj.bias", Entry(bias)
    yield "ssm_k_kernel.kernel.B", Entry(mixer.shift.B)
    yield "ssm_k_kernel.kernel.C", Entry(mixer.shift.C, (1, *mixer.shift.C.shape))
    yield "ssm_k_D", Entry(mixer.shift_skip)
    ssm = mixer.ssm
    yield "kernel.kernel.log_dt", Entry(ssm.log_step)
    yield "kernel.kernel.inv_A_real", Entry(ssm.log_decay)
    yield "kernel.kernel.A_imag", Entry(ssm.frequency)
    yield "kernel.kernel.B", Entry(ssm.B)
    yield "kernel.kernel.C", Entry(ssm.C, (1, *ssm.C.shape))
    yield "D", Entry(mixer.skip)
    yield from _named("output_linear", mixer.out_proj)


def _write(tensors: Mapping[str, Tensor], expected: Mapping[str, Entry], name: str) -> None:
    """Tensors into the model; InputError naming all keys that do not fit, and then nothing is written."""
    problems = key_problems(name, tensors, expected)
    if problems:
        raise InputError(*problems)
    with torch.no_grad():
        for key, value in tensors.items():
            expected[key].write(value)


def _layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """By the keys that are there: any prefix before `layers.0.mixer.`."""
    match = next((m for key in state_dict if (m := re.match(r"(.*?)layers\.0\.mixer\.", key))), None)
    if match is None:
        raise InputError(
            f"h3.load: a key must begin with '[prefix]layers.0.mixer.'; got {sorted(state_dict)[:5]}. Pass the state dict "
            "itself (of a training checkpoint: checkpoint['state_dict'])."
        )
    prefix = match[1]
    root = prefix.removesuffix("backbone.").removesuffix("s4seq.encoder.")
    choices = (f"{prefix}embeddings.word_embeddings.weight", f"{root}embedding.weight")
    embedding = next((key for key in choices if key in state_dict), None)
    if embedding is None:
        raise InputError(f"h3.load: {choices[0]} is missing.")
    heads = [key for key in state_dict if key.endswith("lm_head.weight")]
    first_norm = next((name for name in ("ln_0", "norm") if f"{prefix}{name}.weight" in state_dict), None)
    frequencies = [value.dtype for key, value in state_dict.items() if key.endswith("rotary_emb.inv_freq")]
    return Layout(prefix, embedding, heads[0] if heads else None, first_norm, frequencies[0] if frequencies else None)


def _is_tied(state_dict: Mapping[str, Tensor], layout: Layout) -> bool:
    embedding, head = state_dict[layout.embedding], state_dict.get(layout.head) if layout.head else None
    return head is None or (head.shape == embedding.shape and torch.equal(head, embedding))
