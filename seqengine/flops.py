"""Floating-point operations of a model for a token, forward and backward, and the share of a machine's peak that is reached.

What is counted is what the model asks for, not what a kernel happens to do: no recomputation under activation checkpointing, no
padding, nothing elementwise (norms, gates, activations), and no filter, which all windows of a batch share. A product of a
weight [n, m] with a token is 2 n m forward, twice that backward. The mixing of tokens, by kind and for each channel or head:

    convolution  of L taps and T tokens, m = min(T, L): the fewer of 2 L (tap by tap) and 10 log2(2 m) + 6 (a real FFT of
                 2 m points and its inverse, 5/2 n log2 n each, and m products of complex numbers). Backward: twice the former;
                 the same transforms and twice the products of the latter, for the filter's own transform is shared
    modes        as many operations as the convolution, or by the recurrence, if fewer: 4 for a real mode, 11 for a complex one
    states K x V 4 K V: k v^T added to the state, and q S. A delta rule also reads with k: 6 K V
    attention    4 K for each key that a token sees, on average: (T + 1) / 2 with causality, fewer within a window
    recurrent    the matrices of a cell as weights

References: Poli et al. 2023, Hyena, arXiv:2302.10866, appendix (the same FFT term, 2 * 5 log2 T); Chowdhery et al. 2022, PaLM,
arXiv:2204.02311, appendix B (model FLOPs utilisation; there attention counts without causality); the count of an FFT is the
FFTW benchmark's. Softmax attention alone is quadratic in T.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from seqengine.blocks import make_mlp
from seqengine.config.model import ModelConfig
from seqengine.mixers.attention import Attention
from seqengine.mixers.diagonal import DiagonalSSM
from seqengine.mixers.gated_delta import GatedDelta
from seqengine.mixers.gla import Gla
from seqengine.mixers.h3 import H3
from seqengine.mixers.hyena import Hyena, ImplicitFilter
from seqengine.mixers.hyena_li import HyenaLI
from seqengine.mixers.hyena_mr import HyenaMR
from seqengine.mixers.hyena_se import HyenaSE
from seqengine.mixers.linear_attention import LinearAttention
from seqengine.mixers.mixer import Mixer
from seqengine.mixers.retention import Retention
from seqengine.mixers.s4_layer import FilterLayer, S4Layer
from seqengine.mixers.slstm import SLstm
from seqengine.mixers.ssd import Ssd
from seqengine.unfilled import Unfilling

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989.4, "fp32": 66.9, "fp64": 66.9},
    "H100 NVL": {"bf16": 835.5, "fp32": 60.0, "fp64": 60.0},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0, "fp64": 51.0},
    "H100": {"bf16": 989.4, "fp32": 66.9, "fp64": 66.9},
    "A100": {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5},
}
"""TFLOP/s without sparsity by part of the device's name and precision.params, from NVIDIA's data sheets; the first name that
fits counts. float32 without TF32, float64 with tensor cores."""


@dataclass(frozen=True)
class Flops:
    """Operations for a token."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class ModelFlops:
    """Of a model for a token, by where they come from."""

    weights: Flops
    """Products with weights of blocks: projections, MLPs, recurrent matrices."""
    mixing: Flops
    """What mixes tokens: transforms, states, attention."""
    head: Flops

    @property
    def total(self) -> float:
        return self.weights.total + self.mixing.total + self.head.total


def flops_per_token(model: ModelConfig, tokens: int) -> float:
    """Forward and backward of one token of a window of so many tokens. Raises ValueError for no tokens."""
    return model_flops(model, tokens).total


@lru_cache(maxsize=64)
def _layer(model: str, layer: int, tokens: int) -> tuple[Flops, Flops]:
    """(weights, mixing) of a layer of the model with this JSON: mixers are built, without data, but once."""
    config = ModelConfig.model_validate_json(model)
    kind, settings, place = config.mixer(layer)
    with Unfilling():
        mixer = kind.make(settings, place)
        mlp = make_mlp(config, layer)
    matrices = _matrices(mixer) + (_matrices(mlp) if mlp is not None else 0)
    return _products(matrices), _mixing(mixer, tokens) + _short(mixer)


def model_flops(model: ModelConfig, tokens: int) -> ModelFlops:
    """`flops_per_token` by part."""
    if tokens < 1:
        raise ValueError(f"tokens: must be at least 1; got {tokens}.")
    text, names = model.model_dump_json(), model.mixer_names
    weights, mixing = Flops(), Flops()
    for name, times in Counter(names).items():
        layer_weights, layer_mixing = _layer(text, names.index(name), tokens)
        weights, mixing = weights + layer_weights * times, mixing + layer_mixing * times
    outputs = model.num_classes / tokens if model.num_classes else model.padded_vocab
    return ModelFlops(weights, mixing, _products(outputs * model.d_model))


def layer_flops(mixer: Mixer, tokens: int) -> Flops:
    """Of a mixer for a token of a window of so many: its weights, its short convolutions, and how it mixes tokens."""
    return _products(_matrices(mixer)) + _short(mixer) + _mixing(mixer, tokens)


def mlp_flops(mlp: nn.Module | None) -> Flops:
    """Of an MLP for a token."""
    return Flops() if mlp is None else _products(_matrices(mlp))


def _products(numbers: float) -> Flops:
    return Flops(2.0 * numbers, 4.0 * numbers)


def _matrices(module: nn.Module) -> int:
    """Numbers of the weights that every token meets."""
    shared = {id(m) for f in module.modules() if isinstance(f, ImplicitFilter) for m in f.modules()}
    linear = (m for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in shared)
    cells = (m for m in module.modules() if isinstance(m, SLstm))
    return sum(m.weight.numel() for m in linear) + sum(c.gate_weight.numel() + c.recurrent.numel() for c in cells)


def _short(mixer: Mixer) -> Flops:
    """Short convolutions of the inputs, tap by tap."""
    names = ("short_filter_weight", "short_weight", "inputs.conv_weight")
    return _products(sum(p.numel() for name, p in mixer.named_parameters() if name in names))


def convolution(tokens: int, taps: int) -> Flops:
    """Of one channel, for a token."""
    direct = _products(taps)
    m = min(tokens, taps)
    transforms = 10.0 * math.log2(2 * m)
    fast = Flops(transforms + 6.0, transforms + 12.0)
    return min(direct, fast, key=lambda flops: flops.total)


def _modes(tokens: int, modes: int, *, is_complex: bool, both_ways: bool = False) -> Flops:
    """A modal filter of one channel."""
    forward = (11.0 if is_complex else 4.0) * modes * (2 if both_ways else 1)
    return min(Flops(forward, 2 * forward), convolution(tokens, tokens), key=lambda flops: flops.total)


def _mixing(mixer: Mixer, tokens: int) -> Flops:
    """What mixes tokens, without short convolutions."""
    if isinstance(mixer, Hyena):
        return convolution(tokens, mixer.l_max) * (mixer.d_model * (mixer.order - 1))
    if isinstance(mixer, HyenaLI):
        channels, modes = mixer.residues.shape
        return _modes(tokens, modes, is_complex=False) * channels
    if isinstance(mixer, HyenaSE | HyenaMR):
        return convolution(tokens, mixer.filter.shape[1]) * mixer.out_proj.in_features
    if isinstance(mixer, H3):
        return _h3(mixer, tokens)
    if isinstance(mixer, FilterLayer):
        return convolution(tokens, mixer.max_len) * mixer.d_model
    if isinstance(mixer, S4Layer):
        ssm = mixer.ssm
        assert isinstance(ssm, DiagonalSSM)
        channels, modes = ssm.frequency.shape
        return _modes(tokens, modes, is_complex=True, both_ways=not mixer.causal) * channels
    if isinstance(mixer, Attention):
        return _products(2 * mixer.heads * mixer.head_dim * mean_keys(tokens, mixer.window, causal=mixer.causal))
    if isinstance(mixer, SLstm):
        return Flops()  # its matrices are weights
    return _products(_state_products(mixer))


def _h3(mixer: H3, tokens: int) -> Flops:
    d, channels = mixer.head_dim, mixer.out_proj.in_features
    modes = mixer.ssm.frequency.shape[1]
    shift = convolution(tokens, mixer.shift.C.shape[1]) * channels
    system = _modes(tokens, modes, is_complex=True) * (d * channels)
    return shift + system + (_products(2 * d * channels) if d > 1 else Flops())


def _state_products(mixer: Mixer) -> int:
    """Numbers of the states of all heads, once for each product with them."""
    if isinstance(mixer, GatedDelta):
        return 3 * _state_size(mixer.inputs.widths, mixer.config.num_heads)
    if isinstance(mixer, Gla):
        heads, shared_by = mixer.config.num_heads, mixer.config.num_heads // mixer.kv_heads
        queries, _, values = mixer.inputs.widths
        return 2 * _state_size([queries, queries, values * shared_by], heads)
    if isinstance(mixer, LinearAttention):
        return 2 * _state_size(mixer.inputs.widths, mixer.config.num_heads)
    if isinstance(mixer, Retention):
        return 2 * _state_size(mixer.inputs.widths, mixer.num_heads)
    if isinstance(mixer, Ssd):
        inner, keys, _ = mixer.inputs.widths
        return 2 * inner * (keys // mixer.groups)
    raise NotImplementedError(f"flops_per_token: no formula for the mixer {type(mixer).__name__}; add one to flops.py.")


def _state_size(widths: list[int], heads: int) -> int:
    """H K V of queries, keys and values as wide as `widths`."""
    queries, _, values = widths
    return queries * values // heads


def mean_keys(tokens: int, window: int | None, *, causal: bool) -> float:
    """Keys that a token of a window of T tokens sees, on average; `window` newest ones, or so many to each side."""
    most = tokens if window is None else min(window, tokens)
    back = most - most * (most - 1) / (2.0 * tokens)
    if causal:
        return back
    return float(tokens) if window is None else 2.0 * back - 1.0


def peak_flops(device: torch.device, params: str, *, tflops: float | None = None) -> float | None:
    """Operations a second of one device at precision.params; None if nobody knows. tflops: what its user says, in 10^12."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), params)


def peak_of(name: str, params: str) -> float | None:
    """The same by the name of a GPU."""
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return None if found is None else found[params] * 1e12


class Utilisation:
    """MFU of a run: the operations that its tokens ask for a second, over what all its devices could do.

    peak: operations a second of one device, or None: then there is no figure.
    """

    def __init__(self, model: ModelConfig, num_ranks: int, peak: float | None) -> None:
        self._model, self._peak = model, None if peak is None else peak * num_ranks

    def figures(self, tokens_per_second: float, seq_len: int) -> dict[str, float]:
        """{"mfu": share}, for a line of metrics; nothing if the peak is not known."""
        if self._peak is None:
            return {}
        return {"mfu": tokens_per_second * flops_per_token(self._model, seq_len) / self._peak}
