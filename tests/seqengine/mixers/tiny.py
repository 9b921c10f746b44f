"""A small form of every mixer, in float64, for the tests of what all mixers promise."""

from typing import Any

import torch

from seqengine.mixers.mixer import Mixer, Place
from seqengine.mixers.registry import MIXERS

D, MAX_LEN = 8, 24
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"num_kv_heads": 2},
    "gated_delta": {"num_heads": 2, "head_dim": 3},
    "gla": {"num_heads": 2, "short_filter": 3},
    "h3": {"d_state": 4, "head_dim": 2, "step_min": 0.1, "step_max": 0.5},
    "hyena": {"order": 3, "filter": {"order": 8}},
    "hyena_li": {"state_size": 3},
    "hyena_mr": {"taps": 9, "num_groups": 4, "decay_tokens": 16},
    "hyena_se": {"num_groups": 2},
    "linear_attention": {"num_heads": 2},
    "long_conv": {"smooth": 3},
    "retention": {"num_heads": 2},
    "s4_ptd": {"d_state": 4, "step_min": 0.1, "step_max": 0.5},
    "s4d": {"d_state": 4, "step_min": 0.1, "step_max": 0.5},
    "sgconv": {"kernel_dim": 4},
    "slstm": {"num_heads": 2},
    "ssd": {"head_dim": 4, "state_size": 3, "num_groups": 2},
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


def with_far_weights(mixer: Mixer, width: int, tokens: int, deviation: float) -> tuple[Mixer, torch.Tensor]:
    """The mixer with weights far from those at the start, so that every path of the gradient matters, and inputs for it."""
    mixer = mixer.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * deviation)
    return mixer, torch.randn(2, tokens, width, generator=generator, dtype=torch.float64).requires_grad_()
