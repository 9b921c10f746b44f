"""The mixers by name: one line each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from seqengine.config.values import Section
from seqengine.mixers.hyena import Hyena, HyenaConfig
from seqengine.mixers.mixer import Mixer, Place


class Kind(NamedTuple):
    """A kind of mixer: its section of the config, and how one is made."""

    config: type[Section]
    make: Callable[[Any, Place], Mixer]


MIXERS: dict[str, Kind] = {
    "hyena": Kind(HyenaConfig, Hyena),
}
"""[model.mixers.<name>] -> kind."""
