"""Whether weights that fit a model by their shapes would compute there what they were trained to compute."""

from collections.abc import Iterator
from typing import Any

from seqengine.config.model import ModelConfig
from seqengine.config.values import Section
from seqengine.errors import InputError
from seqengine.rundir import CheckpointTarget

OF_THE_MODEL = ("norm", "norm_place", "norm_eps", "mlp", "causal")


def check_beginning(target: CheckpointTarget, mine: ModelConfig) -> None:
    """Raises InputError if the weights of a run, which another is to begin with, were trained to compute something else."""
    theirs = target.run.read_config(need_data=False).config.model
    if problems := meant_otherwise(theirs, mine):
        raise InputError(*(f"train.init_from: {target.run.path} {problem}" for problem in problems))


def meant_otherwise(theirs: ModelConfig, mine: ModelConfig) -> list[str]:
    """What given weights computed there and would not compute here, each with what to set; empty if nothing differs.

    Not what the shapes of the weights tell anyway, nor settings that trained weights have FORGOTTEN.
    """
    problems = []
    for key in OF_THE_MODEL:
        there, here = getattr(theirs, key), getattr(mine, key)
        if there != here:
            problems.append(f"has model.{key} = {there!r}, which the weights were trained with; got {here!r}. Set it.")
    is_told_by_max_len = False
    for layer, (name, other) in enumerate(zip(mine.mixer_names, theirs.mixer_names, strict=False)):
        if name != other:
            problems.append(f"has {other} in layer {layer}; got {name}. Set model.pattern or model.layers.")
            continue
        own, their_own = mine.mixer(layer)[1], theirs.mixer(layer)[1]
        is_told_by_max_len |= own.is_told_by_max_len or their_own.is_told_by_max_len
        place = "model" if mine.arch == "hyenadna" else f"model.mixers.{name}"
        problems += [
            f"has {place}.{key} = {was!r}, which the weights were trained with; got {now!r}. Set it."
            for key, was, now in _differences(their_own, own)
        ]
    if is_told_by_max_len and theirs.l_max != mine.l_max:
        problems.append(
            f"has filters that are functions of t / {theirs.l_max:,}; got t / {mine.l_max:,}. Set model.max_len = "
            f"{mine.max_len + theirs.l_max - mine.l_max}."
        )
    return list(dict.fromkeys(problems))


def _differences(theirs: Section, mine: Section) -> Iterator[tuple[str, Any, Any]]:
    """Key, their value, mine; those of a section in a section with a point between."""
    for key in type(mine).model_fields:
        was, now = getattr(theirs, key), getattr(mine, key)
        if isinstance(now, Section):
            yield from ((f"{key}.{below}", there, here) for below, there, here in _differences(was, now))
        elif was != now and key not in mine.FORGOTTEN:
            yield key, was, now
