"""A small form of every mixer, in float64, for the tests of what all mixers promise."""

from typing import Any

import torch

from seqengine.mixers.mixer import Mixer, Place
from seqengine.mixers.registry import MIXERS

D, MAX_LEN = 8, 24
SETTINGS: dict[str, dict[str, Any]] = {
    "hyena": {"order": 3, "filter": {"order": 8}},
}
"""By name of the mixer; those that are not here are small by default."""


def make(name: str, *, causal: bool = True, seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    kind = MIXERS[name]
    mixer = kind.make(kind.config(**SETTINGS.get(name, {})), Place(D, MAX_LEN, layer=1, num_layers=2, causal=causal))
    mixer.initialise()
    return mixer.double()


def inputs(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
