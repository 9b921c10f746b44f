"""HyenaDNA weights as published, in and out: Nguyen et al. 2023, arXiv:2306.15794.

Three layouts of one model are read: the training checkpoints (`model.backbone.*`, sometimes with `.mixer.layer.` and
`.mlp.layer.`), the Hugging Face ones (`hyena.backbone.*`), and a bare backbone. All hold the same tensors; the sine
frequencies of one filter are one tensor under several names, which some files store once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqengine.blocks import Block
from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop.entries import Entry, ShortFilter, key_problems
from seqengine.mixers.hyena import FilterConfig, Hyena
from seqengine.model import LanguageModel, to_float64

PREFIXES = ("model.backbone.", "hyena.backbone.", "backbone.", "")
FEATURE_TOLERANCE = 1e-5
"""Positional features and decays further than this from the analytic ones were trained, and are then saved as weights."""


@dataclass(frozen=True)
class Layout:
    """How a state dict spells its keys: the prefix of the backbone, and the head's key if it has one."""

    prefix: str = "model.backbone."
    head: str | None = "model.lm_head.weight"


def load(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, modulation_shift: float = 0.05
) -> LanguageModel:
    """A model with published weights, in evaluation mode: model(input_ids [B, T]) -> logits [B, T, V].

    config:           the published config.json as a dict, of the training repository (with a `layer` table) or of Hugging Face.
    modulation_shift: 0.05 for the standalone and Hugging Face models; 0.0 for weights used with the training repository.
    Dtype:            float64 if the embedding is, else float32.
    Raises:           InputError naming every key that is missing, unknown, or of the wrong shape.
    """
    layout = _layout(state_dict)
    model_config = to_config(config, modulation_shift=modulation_shift, tied_head=_is_tied(state_dict, layout))
    tensors = {_plain(key): value for key, value in state_dict.items()}
    model = LanguageModel(model_config)
    embedding = tensors.get(f"{layout.prefix}embeddings.word_embeddings.weight")
    if embedding is not None and embedding.dtype == torch.float64:
        to_float64(model)
    expected = dict(_entries(model, layout))
    _check(tensors, expected, layout)
    with torch.no_grad():
        for key, entry in expected.items():
            if key in tensors:
                entry.write(tensors[key])
    model.published_layout = layout
    return model.eval()


def state_dict(model: LanguageModel, *, layout: Layout | None = None) -> dict[str, Tensor]:
    """The published layout of a model's weights: by default the one it was loaded from, else that of the checkpoints."""
    chosen = layout or getattr(model, "published_layout", None) or Layout()
    return {key: entry.read() for key, entry in _entries(model, chosen)}


def to_config(config: Mapping[str, Any], *, modulation_shift: float = 0.05, tied_head: bool = True) -> ModelConfig:
    """The published config.json as a `ModelConfig`. Raises InputError if a key is missing or a setting is not supported."""
    layer = config.get("layer", {})
    renamed = {
        "d_model": config.get("d_model"),
        "n_layer": config.get("n_layer"),
        "l_max": layer.get("l_max", config.get("max_seq_len")),
    }
    missing = [key for key, value in renamed.items() if value is None]
    if missing:
        raise InputError(f"hyenadna config: {', '.join(missing)} must be given; got the keys {sorted(config)}.")
    name = layer.get("_name_", "hyena")
    if name != "hyena":
        raise InputError(f"hyenadna config: layer._name_ must be 'hyena'; got {name!r}.")

    def setting(in_layer: str, in_hugging_face: str, default: Any) -> Any:
        return layer.get(in_layer, config.get(in_hugging_face, default))

    return ModelConfig(
        d_model=config["d_model"],
        n_layer=config["n_layer"],
        d_inner=config.get("d_inner"),
        max_len=int(renamed["l_max"] or 0) - 2,
        order=setting("order", "hyena_order", 2),
        short_filter=3,
        filter=FilterConfig(
            order=setting("filter_order", "filter_order", 64),
            emb_dim=setting("emb_dim", "emb_dim", 3),
            sine_w=float(setting("w", "activation_freq", 1)),
            inner_layers=setting("num_inner_mlps", "num_inner_mlps", 2),
            modulate=layer.get("modulate", True),
            shift=modulation_shift,
        ),
        embed_dropout=float(config.get("embed_dropout", 0.1)),
        resid_dropout=float(config.get("resid_dropout", 0.0)),
        vocab_size=config.get("vocab_size", 12),
        pad_vocab_multiple=config.get("pad_vocab_size_multiple", 8),
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        tied_head=tied_head,
    )


class _Features(Entry):
    """Positional features, or decays: computed, and taken from the file as they are there."""

    def __init__(self, mixer: Hyena, name: str, shape: tuple[int, ...], sign: float = 1.0) -> None:
        super().__init__(getattr(mixer.filter, name), shape, required=False)
        self.mixer, self.name, self.sign = mixer, name, sign

    def read(self) -> Tensor:
        value: Tensor = getattr(self.mixer.filter, self.name).detach()
        return self.sign * value.reshape(self.shape)

    def write(self, value: Tensor) -> None:
        given = value.reshape(self.tensor.shape)
        if self.name == "decay":
            given = given.abs()
        trained = bool((given - self.tensor).abs().max() > FEATURE_TOLERANCE)
        self.mixer.filter.set_buffer(self.name, given, trained=trained)


class _Time(_Features):
    """t, which is the first column of z: written out, not read in."""

    def read(self) -> Tensor:
        return self.mixer.filter.z[:, 0].detach().reshape(self.shape).clone()

    def write(self, value: Tensor) -> None:
        """z brings it."""


def _entries(model: LanguageModel, layout: Layout) -> Iterator[tuple[str, Entry]]:
    prefix = layout.prefix
    yield f"{prefix}embeddings.word_embeddings.weight", Entry(model.embedding.weight)
    for i, block in enumerate(model.each_block()):
        for key, entry in _block_entries(block):
            yield f"{prefix}layers.{i}.{key}", entry
    for name, tensor in model.norm.named_parameters():
        yield f"{prefix}ln_f.{name}", Entry(tensor)
    if layout.head is not None:
        yield layout.head, Entry(model.head_weight, required=not model.config.tied_head)


def _block_entries(block: Block) -> Iterator[tuple[str, Entry]]:
    mixer = block.mixer
    assert isinstance(mixer, Hyena)
    filter = mixer.filter
    for name in ("in_proj", "out_proj"):
        yield f"mixer.{name}.weight", Entry(getattr(mixer, name).weight)
        yield f"mixer.{name}.bias", Entry(getattr(mixer, name).bias)
    yield "mixer.short_filter.weight", ShortFilter(mixer.short_filter_weight)
    yield "mixer.short_filter.bias", Entry(mixer.short_filter_bias)
    yield "mixer.filter_fn.bias", Entry(mixer.filter_skip)
    l_max, emb_dim = filter.z.shape
    yield "mixer.filter_fn.pos_emb.z", _Features(mixer, "z", (1, l_max, emb_dim))
    yield "mixer.filter_fn.pos_emb.t", _Time(mixer, "z", (1, l_max, 1))
    yield "mixer.filter_fn.modulation.deltas", _Features(mixer, "decay", (1, 1, filter.channels), sign=-1.0)
    order = filter.frequency.shape[0]
    for j, layer in enumerate(filter.hidden_layers):
        yield f"mixer.filter_fn.implicit_filter.{2 * j}.weight", Entry(layer.weight)  # type: ignore[arg-type]
        yield f"mixer.filter_fn.implicit_filter.{2 * j}.bias", Entry(layer.bias)  # type: ignore[arg-type]
        frequency = Entry(filter.frequency, (1, order), required=j == 0)
        yield f"mixer.filter_fn.implicit_filter.{2 * j + 1}.freq", frequency
    yield f"mixer.filter_fn.implicit_filter.{2 * len(filter.hidden_layers)}.weight", Entry(filter.output.weight)
    for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        module = block.get_submodule(name)
        yield f"{name}.weight", Entry(module.weight)  # type: ignore[arg-type]
        yield f"{name}.bias", Entry(module.bias)  # type: ignore[arg-type]


def _plain(key: str) -> str:
    """Models trained with activation checkpointing carry an extra `layer.` in their keys."""
    return key.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")


def _layout(state_dict: Mapping[str, Tensor]) -> Layout:
    for prefix in PREFIXES:
        if any(key.startswith((f"{prefix}embeddings.", f"{prefix}layers.")) for key in state_dict):
            heads = [key for key in state_dict if key.endswith("lm_head.weight")]
            return Layout(prefix, heads[0] if heads else None)
    raise InputError(
        "hyenadna.load: no key begins with '[prefix]layers.' for a prefix in "
        f"{', '.join(repr(p) for p in PREFIXES)}; got {sorted(state_dict)[:5]}. Pass the state dict itself "
        "(of a training checkpoint: checkpoint['state_dict'])."
    )


def _is_tied(state_dict: Mapping[str, Tensor], layout: Layout) -> bool:
    embedding = state_dict.get(f"{layout.prefix}embeddings.word_embeddings.weight")
    head = state_dict.get(layout.head) if layout.head else None
    return head is None or embedding is None or (head.shape == embedding.shape and torch.equal(head, embedding))


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Entry], layout: Layout) -> None:
    problems = key_problems("hyenadna.load", tensors, expected, prefix=layout.prefix, hint=_about_shape)
    if problems:
        raise InputError(*problems)


def _about_shape(key: str) -> str:
    return " The filters depend on l_max: pass the config.json of these weights." if key.endswith((".z", ".t")) else ""
