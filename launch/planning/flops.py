"""Floating-point operations of a model, by formula: one multiply-add counts two.

Linear layers: 2 per weight and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). What mixes the tokens, per token:

    short convolution     2 F C                      C channels, F taps
    long convolution      15 C log2(2 T)             3 real transforms of 2 T points for T tokens, 2.5 n log2 n each: half of a
                                                     complex one (Poli et al. 2023, arXiv:2302.10866, appendix A; Fu et al.
                                                     2023, arXiv:2311.05908, section 2). With F taps at most 2 F C
    modes                 4 C N, complex 12 C N      update and read N modes of C channels (Gu et al. 2022, arXiv:2206.11893)
    linear attention      4 H K V + H c (K + V)      states, and pairs within chunks of c = 64 (Yang et al. 2023,
                                                     arXiv:2312.06635, section 3.2)
    delta rule            6 H K V + 2 H c (2 K + V)  and the products of keys that undo what was written (Yang et al. 2024,
                                                     arXiv:2406.06484, section 3)
    softmax attention     4 H K S                    S keys that a token sees: T / 2 of a causal T, or a window (Dao 2023,
                                                     arXiv:2307.08691, section 4.1)
    sLSTM                 16 D D / H                 four input and four recurrent matrices a head (Beck et al. 2024,
                                                     arXiv:2405.04517, section 2.2)

The backward takes twice the forward (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); what activation.checkpoint makes
again is time, and does not count in MFU (the same). Networks that make filters run once a micro-batch: they are counted apart.
"""

import math
from dataclasses import dataclass
from functools import singledispatch

from torch import nn

from seqengine.mixers.attention import Attention
from seqengine.mixers.gated_delta import GatedDelta
from seqengine.mixers.gla import Gla
from seqengine.mixers.h3 import H3
from seqengine.mixers.heads import HeadInputs
from seqengine.mixers.hyena import Hyena, ImplicitFilter
from seqengine.mixers.hyena_li import HyenaLI
from seqengine.mixers.hyena_mr import HyenaMR
from seqengine.mixers.hyena_se import HyenaSE
from seqengine.mixers.linear_attention import LinearAttention
from seqengine.mixers.mixer import Mixer
from seqengine.mixers.retention import Retention
from seqengine.mixers.s4_layer import FilterLayer
from seqengine.mixers.s4d import DiagonalLayer
from seqengine.mixers.slstm import SLstm
from seqengine.mixers.ssd import Ssd
from seqengine.model import LanguageModel

CHUNK = 64
BACKWARD = 2
"""Times the forward."""


@dataclass(frozen=True)
class Flops:
    """Per token of one forward."""

    mixers: dict[str, float]
    """By kind, all layers of it together."""
    mlp: float
    head: float
    embedding: float
    """A look-up: none."""
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
    def backward(self) -> float:
        return BACKWARD * self.forward

    @property
    def total(self) -> float:
        return self.forward + self.backward


def linear_flops(module: nn.Module) -> float:
    """Of all linear layers but those that make filters, per token."""
    of_filters = {id(x) for m in module.modules() if isinstance(m, ImplicitFilter) for x in m.modules()}
    return sum(2.0 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in of_filters)


def filter_flops(module: nn.Module) -> tuple[float, float]:
    """Of the networks that make filters, per tap: (hidden layers, last layers)."""
    made = [m for m in module.modules() if isinstance(m, ImplicitFilter)]
    every = sum(2.0 * x.weight.numel() for m in made for x in m.modules() if isinstance(x, nn.Linear))
    last = sum(2.0 * x.weight.numel() for m in made for x in (m.output, m.backward_output) if x is not None)
    return every - last, last


def short(channels: int, taps: int) -> float:
    return 2.0 * channels * taps


def long(channels: int, tokens: int, taps: int | None = None) -> float:
    by_transform = 15.0 * channels * math.log2(max(2, 2 * tokens))
    return by_transform if taps is None else min(by_transform, short(channels, taps))


def modes(channels: int, count: int, *, is_complex: bool) -> float:
    return (12.0 if is_complex else 4.0) * channels * count


def linear_attention(heads: int, K: int, V: int) -> float:
    return 4.0 * heads * K * V + heads * CHUNK * (K + V)


def delta_rule(heads: int, K: int, V: int) -> float:
    return 6.0 * heads * K * V + 2.0 * heads * CHUNK * (2 * K + V)


def attention(heads: int, K: int, tokens: int, causal: bool, window: int | None) -> float:
    seen = tokens / 2 if causal else float(tokens)
    if window is not None:
        seen = min(seen, window if causal else 2 * window)
    return 4.0 * heads * K * seen


@singledispatch
def mixing_flops(mixer: Mixer, tokens: int) -> float:
    """Of one token of a window of `tokens`, besides linear layers."""
    raise NotImplementedError(f"mixing_flops: no formula for {type(mixer).__name__}")


def _inputs(inputs: HeadInputs) -> float:
    return short(sum(inputs.widths), inputs.taps)


@mixing_flops.register
def _(mixer: Hyena, tokens: int) -> float:
    sides = 1 if mixer.causal else 2
    return short(*mixer.short_filter_weight.shape) + sides * (mixer.order - 1) * long(mixer.d_model, tokens)


@mixing_flops.register(HyenaSE)
@mixing_flops.register(HyenaMR)
def _(mixer: HyenaSE | HyenaMR, tokens: int) -> float:
    width, taps = mixer.short_weight.shape
    return short(width, taps) + long(width // 3, tokens, mixer.filter.shape[1])


@mixing_flops.register
def _(mixer: HyenaLI, tokens: int) -> float:
    return short(*mixer.short_weight.shape) + modes(*mixer.residues.shape, is_complex=False)


@mixing_flops.register
def _(mixer: H3, tokens: int) -> float:
    channels, taps = mixer.shift.C.shape
    systems = mixer.head_dim**2 * mixer.heads
    return long(channels, tokens, taps) + modes(systems, mixer.ssm.C.shape[-2], is_complex=True)


@mixing_flops.register
def _(mixer: FilterLayer, tokens: int) -> float:
    return (1 if mixer.causal else 2) * long(mixer.d_model, tokens)


@mixing_flops.register
def _(mixer: DiagonalLayer, tokens: int) -> float:
    channels = mixer.skip.shape[0]
    if mixer.causal:
        return modes(channels, mixer.ssm.C.shape[-2], is_complex=True)
    return 2 * long(channels, tokens)


@mixing_flops.register
def _(mixer: Gla, tokens: int) -> float:
    heads = mixer.config.num_heads
    K, V = mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // mixer.kv_heads
    return _inputs(mixer.inputs) + linear_attention(heads, K, V)


@mixing_flops.register(LinearAttention)
@mixing_flops.register(Retention)
def _(mixer: LinearAttention | Retention, tokens: int) -> float:
    heads = mixer.config.num_heads if isinstance(mixer, LinearAttention) else mixer.num_heads
    return linear_attention(heads, mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // heads)


@mixing_flops.register
def _(mixer: Ssd, tokens: int) -> float:
    inner, states, _ = mixer.inputs.widths
    return _inputs(mixer.inputs) + linear_attention(mixer.heads, states // mixer.groups, inner // mixer.heads)


@mixing_flops.register
def _(mixer: GatedDelta, tokens: int) -> float:
    heads = mixer.config.num_heads
    K, V = mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // heads
    return _inputs(mixer.inputs) + delta_rule(heads, K, V)


@mixing_flops.register
def _(mixer: SLstm, tokens: int) -> float:
    channels = mixer.norm_weight.numel()
    gates = 2.0 * mixer.gate_weight.numel() + 2.0 * mixer.recurrent.numel()
    return gates + (0.0 if mixer.short_weight is None else short(channels, mixer.short_weight.shape[1]))


@mixing_flops.register
def _(mixer: Attention, tokens: int) -> float:
    return attention(mixer.heads, mixer.head_dim, tokens, mixer.causal, mixer.window)


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
    for name, block in zip(model.config.mixer_names, model.each_block(), strict=True):
        found = linear_flops(block.mixer) + mixing_flops(block.mixer, tokens)
        mixers[name] = mixers.get(name, 0.0) + found
    made = [filter_flops(block.mixer) for block in model.each_block()]
    return Flops(
        mixers=mixers,
        mlp=sum(linear_flops(block.mlp) for block in model.each_block() if block.mlp is not None),
        head=2.0 * model.head_weight.numel(),
        embedding=0.0,
        filters=sum(hidden for hidden, _ in made),
        filter_outputs=sum(last for _, last in made),
        transformed=sum(transformed_channels(block.mixer) for block in model.each_block()),
    )
