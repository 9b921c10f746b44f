"""StripedHyena 2 weights in the layout of the Evo 2 models (vortex), in and out: Ku et al. 2025, arXiv:2503.01868.

What differs from ours, and is changed on the way in and back on the way out:

    projections, short filters    rows of post-gate, pre-gate and value interleaved (p v x, p v x, ...), or grouped by heads
    Wqkv                          rows grouped by heads: q, k, v of the first head, then of the second
    taps                          lag 0 last (as Conv1d has them) in filters below 128 taps, lag 0 first from 128 on, which also
                                  have a skip connection D
    norm                          x / (rms(x) + eps) * scale, with eps outside of the root
    rotary frequencies            taken from the weights, where they are rounded, and not from the config
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from seqengine.blocks import Block, GatedMlp
from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop.entries import Entry, key_problems
from seqengine.mixers.attention import Attention
from seqengine.mixers.hyena_li import HyenaLI
from seqengine.mixers.hyena_mr import HyenaMR
from seqengine.mixers.hyena_se import HyenaSE
from seqengine.mixers.rotary import Rotary
from seqengine.mixers.striped import StripedOperator
from seqengine.model import LanguageModel, to_float64

REQUIRED = (
    "hidden_size", "num_layers", "vocab_size", "num_attention_heads", "eps", "short_filter_length", "attn_layer_idxs",
    "hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs",
)  # fmt: skip
REQUIRED_BY = {
    "hcl": ("state_size",),
    "hcm": ("hcm_filter_length", "hcm_filter_groups"),
    "hcs": ("hcs_filter_length", "hcs_filter_groups"),
}
MIXERS = {"attn": "attention", "hcl": "hyena_li", "hcm": "hyena_mr", "hcs": "hyena_se"}
LONG_TAPS = 128
"""Filters of so many taps and more have lag 0 first, and a skip connection."""
MUST = {"arch": "lm", "norm": "rms_outer", "norm_place": "pre", "mlp_bias": False, "causal": True, "num_classes": 0}
"""What a model must be that the published code has."""


@dataclass(frozen=True)
class Layout:
    """The order of rows, and of a loaded file also its keys and their dtypes. As it is: that of the published models."""

    interleave: bool = True
    column_split_hyena: bool = False
    hyena_flip_x1x2: bool = False
    column_split: bool = True
    heads: int = 1
    """Of the groups of column_split_hyena."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def load(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """A model with published weights, in evaluation mode: model(input_ids [B, T]) -> logits [B, T, V].

    config:  the published configuration (evo2-7b-1m.yml and so on) as a dict. Keys `*._extra_state`, which hold scales for
             8-bit arithmetic, are left out.
    Dtype:   float64 if the embedding is, else float32; `state_dict` gives back the dtypes of the file.
    Raises:  InputError naming every key that is missing, unknown, or of the wrong shape, or that this model cannot honour.
    """
    tensors = {key: value for key, value in state_dict.items() if not key.endswith("._extra_state")}
    layout = Layout(
        interleave=bool(config.get("interleave", False)),
        column_split_hyena=bool(config.get("column_split_hyena", True)),
        hyena_flip_x1x2=bool(config.get("hyena_flip_x1x2", False)),
        column_split=bool(config.get("column_split", True)),
        heads=config.get("num_attention_heads", 1),
        dtypes={key: value.dtype for key, value in tensors.items()},
    )
    model = LanguageModel(to_config(config))
    embedding = tensors.get("embedding_layer.weight")
    if embedding is not None and embedding.dtype == torch.float64:
        to_float64(model)
    expected = dict(_entries(model, layout))
    _check(tensors, expected)
    with torch.no_grad():
        for key, entry in expected.items():
            if key in tensors:
                entry.write(tensors[key])
    model.published_layout = layout
    return model.eval()


def state_dict(model: LanguageModel, *, layout: Layout | None = None) -> dict[str, Tensor]:
    """The published layout of a model's weights: by default the one it was loaded from, else that of the Evo 2 models.

    Filters are written as numbers, whatever they are made of. The published norms have eps outside of the root: a model with
    eps inside is written as it is, and is another by so much. Raises InputError if the published code has no such model.
    """
    kinds = set(model.config.mixer_names) - set(MIXERS.values())
    wrong = [key for key, must in MUST.items() if getattr(model.config, key) != must]
    if kinds or wrong or not isinstance(next(model.each_block()).mlp, GatedMlp):
        raise InputError(
            f"evo2.state_dict: model.pattern must be of {', '.join(MIXERS.values())}, model.mlp a gated one, and "
            f"{', '.join(f'model.{key} = {must!r}' for key, must in MUST.items())}; "
            f"got {sorted(kinds) or wrong or 'another mlp'}."
        )
    published = model.published_layout
    chosen = layout or (published if isinstance(published, Layout) else Layout())
    result = {}
    for key, entry in _entries(model, chosen):
        if key in chosen.dtypes or not chosen.dtypes:
            value = entry.read()
            result[key] = value.to(chosen.dtypes.get(key, entry.dtype))
    return result


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """The published configuration as a `ModelConfig`. Raises InputError naming each setting that is missing or unsupported."""
    problems = [
        f"evo2 config: {key} must be given; got the keys {sorted(config)}." for key in REQUIRED if key not in config
    ]
    if problems:
        raise InputError(*problems)
    names = _layer_names(config)
    for kind, keys in REQUIRED_BY.items():
        if MIXERS[kind] in names:
            problems += [
                f"evo2 config: {key} must be given with {kind}_layer_idxs." for key in keys if key not in config
            ]
    activation = config.get("mlp_activation", "gelu")
    is_evo2 = bool(config.get("evo2_style_activations", False))
    if activation not in ("gelu", "silu") or (is_evo2 and activation != "gelu"):
        problems.append(
            f"evo2 config: mlp_activation must be 'gelu', or 'silu' without evo2_style_activations; got {activation!r}."
        )
    if not config.get("final_norm", True) or config.get("smeared_gqa", False):
        problems.append("evo2 config: final_norm must be True and smeared_gqa False.")
    if config.get("proj_groups", 1) > 1 and config.get("column_split", True):
        problems.append(
            "evo2 config: column_split must be False with proj_groups above 1: heads have no keys of their own."
        )
    if problems:
        raise InputError(*problems)
    values = {
        "arch": "lm",
        "d_model": config["hidden_size"],
        "d_inner": config.get("inner_mlp_size") or _mlp_width(config),
        "max_len": config.get("max_seqlen", 8192),
        "layers": [{"mixer": name, "repeat": len(list(run))} for name, run in groupby(names)],
        "mixers": {name: _settings(config, kind) for kind, name in MIXERS.items() if name in names},
        "norm": "rms_outer",
        "norm_eps": float(config["eps"]),
        "mlp": "evo2" if is_evo2 else {"gelu": "geglu", "silu": "swiglu"}[activation],
        "mlp_bias": False,
        "embed_dropout": 0.0,
        "vocab_size": config["vocab_size"],
        "pad_vocab_multiple": 1,
        "tied_head": bool(config.get("tie_embeddings", False)),
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        told = (f"evo2 config: as model.{'.'.join(map(str, e['loc']))}: {e['msg']}; got {e['input']!r}." for e in found)
        raise InputError(*told) from None


def _layer_names(config: Mapping[str, Any]) -> list[str]:
    """The mixer of every layer."""
    count, problems, names = config["num_layers"], [], []
    lists = {kind: set(config[f"{kind}_layer_idxs"] or ()) for kind in MIXERS}
    for i in range(count):
        found = [kind for kind, layers in lists.items() if i in layers]
        if len(found) != 1:
            where = " and ".join(f"{kind}_layer_idxs" for kind in found) or "none"
            problems.append(f"evo2 config: layer {i} must be in one of the *_layer_idxs; it is in {where}.")
        names += [MIXERS[kind] for kind in found[:1]]
    outside = sorted(i for layers in lists.values() for i in layers if not 0 <= i < count)
    if outside:
        problems.append(f"evo2 config: *_layer_idxs must be below num_layers = {count}; got {outside}.")
    if problems:
        raise InputError(*problems)
    return names


def _settings(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Of a kind of layers, as its mixer's section has them."""
    if kind == "attn":
        heads = config["num_attention_heads"]
        is_scaled = config.get("use_interpolated_rotary_pos_emb", False)
        return {
            "num_heads": heads,
            "num_kv_heads": heads // config.get("proj_groups", 1),
            "rotary_base": float(config.get("rotary_emb_base", 1e6)),
            "rotary_scale": float(config.get("rotary_emb_scaling_factor", 1.0)) if is_scaled else 1.0,
            "bias": bool(config.get("qkv_proj_bias", True)),
            "out_bias": bool(config.get("mha_out_proj_bias", True)),
        }
    common = {
        "short_filter": config["short_filter_length"],
        "short_bias": bool(config.get("short_filter_bias", False)),
        "bias": bool(config.get("qkv_proj_bias", False)),
        "out_bias": bool(config.get("hyena_out_proj_bias", False)),
    }
    if kind == "hcl":
        return {**common, "state_size": config["state_size"], "poles": "log"}
    taps = config[f"{kind}_filter_length"]
    filter = {"taps": taps, "num_groups": config[f"{kind}_filter_groups"], "skip": taps >= LONG_TAPS}
    return {**common, **filter, **({"decay": "none"} if kind == "hcm" else {})}


def _mlp_width(config: Mapping[str, Any]) -> int:
    """8/3 of the width, rounded up to a multiple."""
    multiple: int = config.get("inner_size_multiple_of", 64) * config.get("model_parallel_size", 1)
    width = int(2 * config["hidden_size"] * 4 / 3)
    return -(-width // multiple) * multiple


class _Ordered(Entry):
    """A tensor of the model in another shape and order.

    order: the file's rows in our order. flip: taps the other way round. value: what is written out, if not the tensor itself.
    """

    def __init__(
        self,
        tensor: Tensor,
        shape: tuple[int, ...] | None = None,
        *,
        order: Tensor | None = None,
        flip: bool = False,
        value: Callable[[], Tensor] | None = None,
        required: bool = True,
    ) -> None:
        super().__init__(tensor, shape, required=required)
        self.order, self.flip, self.value = order, flip, value
        self.dtype = tensor.dtype

    def read(self) -> Tensor:
        ours = (self.tensor if self.value is None else self.value()).detach()
        ours = ours.flip(1) if self.flip else ours
        ours = ours if self.order is None else ours[torch.argsort(self.order)]
        return ours.reshape(self.shape).clone()

    def write(self, value: Tensor) -> None:
        theirs = value.reshape(self.tensor.shape)
        theirs = theirs if self.order is None else theirs[self.order]
        self.tensor.copy_(theirs.flip(1) if self.flip else theirs)


class _Frequencies(_Ordered):
    """Of rotary attention, in float64: float32 unless the file has something else."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__(rotary.frequencies, required=False)
        self.rotary, self.dtype = rotary, torch.float32

    def write(self, value: Tensor) -> None:
        self.rotary.set_frequencies(value)


def _entries(model: LanguageModel, layout: Layout) -> Iterator[tuple[str, _Ordered]]:
    yield "embedding_layer.weight", _Ordered(model.embedding.weight)
    for i, block in enumerate(model.each_block()):
        for key, entry in _block_entries(block, layout):
            yield f"blocks.{i}.{key}", entry
    yield "norm.scale", _Ordered(model.norm.weight)  # type: ignore[arg-type]
    yield "unembed.weight", _Ordered(model.head_weight, required=not model.config.tied_head)


def _block_entries(block: Block, layout: Layout) -> Iterator[tuple[str, _Ordered]]:
    for name, ours in (("pre_norm.scale", "norm1"), ("post_norm.scale", "norm2")):
        yield name, _Ordered(block.get_submodule(ours).weight)  # type: ignore[arg-type]
    for name, ours in (("l1", "gate"), ("l2", "up"), ("l3", "down")):
        yield f"mlp.{name}.weight", _Ordered(block.get_submodule(f"mlp.{ours}").weight)  # type: ignore[arg-type]
    mixer = block.mixer
    if isinstance(mixer, Attention):
        yield from _attention_entries(mixer, layout)
    else:
        assert isinstance(mixer, StripedOperator)
        yield from _hyena_entries(mixer, layout)


def _linear_entries(name: str, layer: nn.Linear, order: Tensor | None = None) -> Iterator[tuple[str, _Ordered]]:
    yield f"{name}.weight", _Ordered(layer.weight, order=order)
    bias: Tensor | None = layer.bias
    if bias is not None:
        yield f"{name}.bias", _Ordered(bias, order=order)


def _attention_entries(mixer: Attention, layout: Layout) -> Iterator[tuple[str, _Ordered]]:
    name, order = "inner_mha_cls", None
    if layout.column_split and mixer.kv_heads == mixer.heads:
        rows = torch.arange(mixer.qkv_proj.out_features)
        order = rows.view(mixer.heads, 3, mixer.head_dim).transpose(0, 1).reshape(-1)
    yield from _linear_entries(f"{name}.Wqkv", mixer.qkv_proj, order)
    yield from _linear_entries(f"{name}.out_proj", mixer.out_proj)
    if mixer.rotary is not None:
        yield f"{name}.rotary_emb.inv_freq", _Frequencies(mixer.rotary)


def _hyena_entries(mixer: StripedOperator, layout: Layout) -> Iterator[tuple[str, _Ordered]]:
    order = _projection_order(mixer.in_proj.out_features, layout)
    yield from _linear_entries("projections", mixer.in_proj, order)
    yield from _linear_entries("out_filter_dense", mixer.out_proj)
    width, taps = mixer.short_weight.shape
    yield "filter.short_filter_weight", _Ordered(mixer.short_weight, (width, 1, taps), order=order, flip=True)
    if mixer.short_bias is not None:
        yield "filter.short_filter_bias", _Ordered(mixer.short_bias, order=order)
    if isinstance(mixer, HyenaLI):
        poles = mixer.residues if mixer.log_poles is None else mixer.log_poles
        yield "filter.log_poles", _Ordered(poles, (*poles.shape, 1), value=mixer.log_poles_now)
        yield "filter.residues", _Ordered(mixer.residues)
    else:
        assert isinstance(mixer, (HyenaSE, HyenaMR))
        groups, taps = mixer.filter.shape
        value = mixer.taps_now if isinstance(mixer, HyenaMR) else None
        yield "filter.h", _Ordered(mixer.filter, (groups, 1, taps), flip=taps < LONG_TAPS, value=value)
    if mixer.skip is not None:
        yield "filter.D", _Ordered(mixer.skip)


def _projection_order(rows: int, layout: Layout) -> Tensor:
    """The file's rows in our order: of the gate after the filter, of the gate before it, of the value."""
    order = torch.arange(rows)
    if layout.interleave:
        order = order.view(-1, 3).T.reshape(-1)
    if layout.column_split_hyena:
        order = order.view(layout.heads, 3, -1).transpose(0, 1).reshape(-1)
    if layout.hyena_flip_x1x2:
        post, pre, value = order.chunk(3)
        order = torch.cat([pre, post, value])
    return order


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, _Ordered]) -> None:
    problems = key_problems("evo2.load", tensors, expected)
    if problems:
        raise InputError(*problems)
    head, embedding = tensors.get("unembed.weight"), tensors["embedding_layer.weight"]
    if head is not None and not expected["unembed.weight"].required and not torch.equal(head, embedding):
        raise InputError(
            "evo2.load: with tie_embeddings, unembed.weight must be embedding_layer.weight, and is not; "
            "set tie_embeddings to False."
        )
