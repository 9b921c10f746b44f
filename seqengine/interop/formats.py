"""The published formats under their names: which one some weights have, weights in from files, and out to a folder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from seqengine.config.model import ModelConfig
from seqengine.errors import InputError
from seqengine.interop import evo2, gla, h3, hyenadna
from seqengine.interop.files import CONFIG, check_target, find_weights, read_folder, write_folder
from seqengine.interop.huggingface import HYENADNA_LAYOUT, gla_config, hyenadna_config, tokenizer_documents
from seqengine.interop.published import evo2_config, h3_config
from seqengine.model import LanguageModel

MOST_PROBLEMS = 5
"""Told of one file; the wrong weights are wrong in every key."""
OF_TRAINING = {
    "filter": {"sine_w"},
    "h3": {"init", "step_min", "step_max"},
    "hyena_li": {"gamma_min", "gamma_max", "poles"},
    "hyena_mr": {"decay", "decay_tokens"},
}
"""Settings that change initial weights or how weights are trained, and not what given numbers compute."""


@dataclass(frozen=True)
class Format:
    """How others write the weights of one family of models."""

    name: str
    arch: str
    mixers: frozenset[str]
    key: str
    """Part of a key that every state dict of this format has, and no other."""
    load: Callable[[Mapping[str, Tensor], Mapping[str, Any]], LanguageModel]
    to_config: Callable[[Mapping[str, Any]], ModelConfig]
    state_dict: Callable[[LanguageModel], dict[str, Tensor]]
    config: Callable[[LanguageModel], dict[str, Any]]
    """config.json: the inverse of to_config."""

    def fits(self, config: ModelConfig) -> bool:
        return config.arch == self.arch and set(config.mixer_names) <= self.mixers


def _hyenadna_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The frequencies of a filter are one tensor, stored under its first name; the head is one of its own."""
    tensors = hyenadna.state_dict(model, layout=HYENADNA_LAYOUT)
    return {k: v for k, v in tensors.items() if not k.endswith(".freq") or k.endswith("implicit_filter.1.freq")}


def _gla_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """A head that is the embedding is not stored."""
    tensors = gla.state_dict(model)
    if model.config.tied_head:
        tensors.pop(gla.Layout().head or "", None)
    return tensors


FORMATS = {
    f.name: f
    for f in (
        Format(
            "evo2", "lm", frozenset(evo2.MIXERS.values()), ".pre_norm.scale", evo2.load, evo2.to_config,
            lambda model: evo2.state_dict(model, layout=evo2.Layout()), lambda model: evo2_config(model.config),
        ),
        Format(
            "gla", "lm", frozenset(("gla",)), ".gk_proj.", gla.load, gla.to_config, _gla_tensors, gla_config
        ),
        Format(
            "h3", "lm", frozenset(("h3", "attention")), ".ssm_k_kernel.", h3.load, h3.to_config,
            lambda model: h3.state_dict(model, layout=h3.Layout()), lambda model: h3_config(model.config),
        ),
        Format(
            "hyenadna", "hyenadna", frozenset(("hyena",)), ".filter_fn.", hyenadna.load, hyenadna.to_config,
            _hyenadna_tensors, hyenadna_config,
        ),
    )
}  # fmt: skip


def find_format(name: str) -> Format:
    """Raises InputError if there is none of this name."""
    if name in FORMATS:
        return FORMATS[name]
    close = get_close_matches(name, FORMATS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(f"format: must be one of {', '.join(FORMATS)}; got {name!r}.{hint}")


def detect(keys: Iterable[str], config: Mapping[str, Any]) -> Format | None:
    """The format of a state dict by its keys; if these say nothing, by the config; None if that says nothing either."""
    for key in keys:
        for form in FORMATS.values():
            if form.key in key:
                return form
    return _of_config(config)


def _of_config(config: Mapping[str, Any]) -> Format | None:
    layer = config.get("layer")
    name = layer.get("_name_") if isinstance(layer, dict) else None
    if config.get("model_type") in FORMATS:
        return FORMATS[config["model_type"]]
    if "hcl_layer_idxs" in config:
        return FORMATS["evo2"]
    if "ssm_cfg" in config or name == "h3":
        return FORMATS["h3"]
    return FORMATS["hyenadna"] if name == "hyena" else None


def load(path: Path, name: str | None = None) -> tuple[LanguageModel, Format]:
    """The model that a folder, or a file of weights with config.json beside it, holds, in evaluation mode; and its format.

    name: of the format; by default it is what the keys and the config say.
    Raises: InputError naming the file, and every key (at most a few are told) or setting that does not fit.
    """
    named = None if name is None else find_format(name)
    weights = find_weights(path)
    tensors, config = read_folder(path)
    found = detect(tensors, config)
    form = named or found
    if form is None:
        raise InputError(f"{weights}: is of no format that is known by its keys; name one: {', '.join(FORMATS)}.")
    if found is not None and found is not form:
        raise InputError(f"{weights}: must hold {form.name} weights; its keys are those of {found.name}.")
    settings, said = weights.parent / CONFIG, _of_config(config)
    if said is not None and said is not form:
        raise InputError(f"{settings}: must be the config of {form.name} weights; it is one of {said.name}.")
    try:
        form.to_config(config)
    except InputError as error:
        raise InputError(*(f"{settings}: {problem}" for problem in error.problems)) from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{settings}: is no config of {form.name} weights: {' '.join(str(error).split())}.") from None
    try:
        return form.load(tensors, config), form
    except InputError as error:
        told = [f"{weights}: {problem}" for problem in error.problems[:MOST_PROBLEMS]]
        more = len(error.problems) - len(told)
        raise InputError(*told, *([f"{weights}: and {more} more keys that do not fit."] if more else [])) from None


def save(model: LanguageModel, folder: Path, name: str, *, replace: bool = False) -> None:
    """A folder with a model's weights in a published format: model.safetensors, config.json, HyenaDNA's tokenizer.

    replace: put it in the place of an earlier one.
    Raises:  InputError if the format has no such model, or the folder exists.
    """
    form = find_format(name)
    check_target(folder, replace=replace)
    check_fits(model, form)
    documents = {CONFIG: form.config(model)}
    if form.name == "hyenadna":
        documents |= tokenizer_documents(model.config)
    write_folder(folder, form.state_dict(model), documents, replace=replace)


def check_fits(model: LanguageModel, form: Format) -> None:
    """Raises InputError naming every setting of a model that would not come back from the format's config."""
    config = model.config
    if not form.fits(config):
        others = [f.name for f in FORMATS.values() if f.fits(config)]
        hint = f"use {' or '.join(others)}" if others else "no published format has such a model"
        raise InputError(
            f"{form.name}: needs model.arch = {form.arch!r} with mixers of {', '.join(sorted(form.mixers))}; got "
            f"{config.arch!r} with {', '.join(sorted(set(config.mixer_names)))}: {hint}."
        )
    back, mine = _meaning(form.to_config(form.config(model))), _meaning(config)
    if form.name in ("hyenadna", "h3"):
        back["tied_head"] = mine["tied_head"]  # told by the weights
    problems = [
        f"{form.name}: cannot hold model.{key} = {value!r}; the format has {back.get(key)!r}."
        for key, value in mine.items()
        if back.get(key) != value
    ]
    if problems:
        raise InputError(*problems)


def _meaning(config: ModelConfig) -> dict[str, object]:
    """All that decides what given weights compute, by dotted key."""
    keys = ["d_model", "max_len", "norm_eps", "tied_head", "inner", "padded_vocab", "mixer_names"]
    sections: dict[str, Any] = {}
    if config.arch == "hyenadna":
        keys += ["order", "short_filter"]
        sections["filter"] = config.filter
    else:
        keys += ["norm", "norm_place", "mlp", "mlp_bias", "causal", "num_classes"]
        sections |= {f"mixers.{name}": getattr(config.mixers, name) for name in set(config.mixer_names)}
    found = {key: getattr(config, key) for key in keys}
    for path, section in sections.items():
        values = section.model_dump()
        if "num_kv_heads" in values:
            values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
        if "num_groups" in values:
            values["num_groups"] = values["num_groups"] or config.d_model
        if values.get("rotary") is False:
            values = {k: v for k, v in values.items() if not k.startswith("rotary_")}
        elif "rotary_dim" in values:
            values["rotary_dim"] = values["rotary_dim"] or config.d_model // values["num_heads"]
        left_out = OF_TRAINING.get(path.removeprefix("mixers."), set())
        found |= {f"{path}.{key}": value for key, value in values.items() if key not in left_out}
    return found
