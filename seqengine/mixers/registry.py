"""The mixers by name."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

from seqengine.config.values import Section
from seqengine.mixers.mixer import Mixer, Place

CLASSES = {
    "attention": "attention.Attention",
    "gated_delta": "gated_delta.GatedDelta",
    "gla": "gla.Gla",
    "h3": "h3.H3",
    "hyena": "hyena.Hyena",
    "hyena_li": "hyena_li.HyenaLI",
    "hyena_mr": "hyena_mr.HyenaMR",
    "hyena_se": "hyena_se.HyenaSE",
    "linear_attention": "linear_attention.LinearAttention",
    "long_conv": "long_conv.LongConv",
    "retention": "retention.Retention",
    "s4_ptd": "s4_ptd.S4PTD",
    "s4d": "s4d.S4D",
    "sgconv": "sgconv.SGConv",
    "slstm": "slstm.SLstm",
    "ssd": "ssd.Ssd",
}
"""Name in a config -> file in this folder and class in it. A new mixer is that file, and its line here."""


class Kind(NamedTuple):
    """A kind of mixer: its section of the config, and how one is made."""

    config: type[Section]
    make: Callable[[Any, Place], Mixer]


def _kind(place: str) -> Kind:
    """The class, and the section that its first argument is annotated with."""
    file, _, name = place.partition(".")
    mixer = getattr(import_module(f"seqengine.mixers.{file}"), name)
    return Kind(get_type_hints(mixer.__init__)["config"], mixer)


MIXERS: dict[str, Kind] = {name: _kind(place) for name, place in CLASSES.items()}
"""[model.mixers.<name>] -> kind."""
