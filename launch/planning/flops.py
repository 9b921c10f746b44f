"""Floating-point operations of a model by where they come from: `seqengine.flops` counts a layer, here they are added up.

The log's MFU and the plan's are of the same count. Networks that make filters run once a micro-batch, for all its windows: they
are no operations of a token, and are counted apart, for the time that they take.
"""

from dataclasses import dataclass

from torch import nn

from seqengine.flops import layer_flops, mlp_flops
from seqengine.mixers.hyena import Hyena, ImplicitFilter
from seqengine.mixers.mixer import Mixer
from seqengine.mixers.s4_layer import FilterLayer
from seqengine.mixers.s4d import DiagonalLayer
from seqengine.model import LanguageModel


@dataclass(frozen=True)
class Flops:
    """Per token; `backward` of all together, the others of one forward."""

    mixers: dict[str, float]
    """By kind, all layers of it together."""
    mlp: float
    head: float
    embedding: float
    """A look-up: none."""
    backward: float
    filters: float
    """Of networks that make filters, per tap and forward; not per token, and not part of the others. On every rank."""
    filter_outputs: float
    """Of their last layers, which a rank applies for its own channels."""
    transformed: int
    """Channels of all layers that go through long convolutions: what they move through memory decides their time."""

    @property
    def forward(self) -> float:
        return sum(self.mixers.values()) + self.mlp + self.head + self.embedding

    @property
    def total(self) -> float:
        return self.forward + self.backward


def filter_flops(module: nn.Module) -> tuple[float, float]:
    """Of the networks that make filters, per tap: (hidden layers, last layers)."""
    made = [m for m in module.modules() if isinstance(m, ImplicitFilter)]
    every = sum(2.0 * x.weight.numel() for m in made for x in m.modules() if isinstance(x, nn.Linear))
    last = sum(2.0 * x.weight.numel() for m in made for x in (m.output, m.backward_output) if x is not None)
    return every - last, last


def transformed_channels(mixer: Mixer) -> int:
    """Channels that go through transforms as long as the window."""
    if isinstance(mixer, Hyena):
        return mixer.d_model * (mixer.order - 1) * (1 if mixer.causal else 2)
    if isinstance(mixer, FilterLayer):
        return mixer.d_model * (1 if mixer.causal else 2)
    if isinstance(mixer, DiagonalLayer) and not mixer.causal:
        return 2 * int(mixer.skip.shape[0])
    return 0


def count_flops(model: LanguageModel, tokens: int) -> Flops:
    """For windows of `tokens`; a model on any device, meta included."""
    mixers: dict[str, float] = {}
    head = 2.0 * model.head_weight.numel() / (tokens if model.config.num_classes else 1)
    mlp, backward = 0.0, 2 * head
    for name, block in zip(model.config.mixer_names, model.each_block(), strict=True):
        mixing, dense = layer_flops(block.mixer, tokens), mlp_flops(block.mlp)
        mixers[name] = mixers.get(name, 0.0) + mixing.forward
        mlp += dense.forward
        backward += mixing.backward + dense.backward
    made = [filter_flops(block.mixer) for block in model.each_block()]
    return Flops(
        mixers=mixers,
        mlp=mlp,
        head=head,
        embedding=0.0,
        backward=backward,
        filters=sum(hidden for hidden, _ in made),
        filter_outputs=sum(last for _, last in made),
        transformed=sum(transformed_channels(block.mixer) for block in model.each_block()),
    )
