"""Memory of a rank, by kind: weights and what belongs to them by size, activations by traces of one block of each kind.

A step's most memory is found along its time line: each block's forward and backward on top of what the blocks before it keep.
Of more than TRACED_RANKS ranks of a window nothing is traced: a block's bytes are taken as a + b / P, from traces on 2 and on
4 ranks (what every rank makes whole, and what is cut). Of more than two windows a micro-batch, as a + b rows, where asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seqengine.blocks import Block, make_norm
from seqengine.config.run import RunConfig
from seqengine.kernels import api as kernels
from seqengine.kernels.conv.plan import channels_at_once, plan
from seqengine.launch.planning.flops import transformed_channels
from seqengine.launch.planning.trace import Trace, trace, trace_block
from seqengine.launch.planning.traffic import Layout, Weights
from seqengine.memory import TRACED_RANKS, arithmetic_dtype, cut_over, shares, split_context
from seqengine.model import LanguageModel
from seqengine.optim import muon_names
from seqengine.parallel.context import SequenceContext
from seqengine.unfilled import Unfilling

WORKSPACE = 8
"""Blocks of padded values that the backward of a long convolution holds at once (measured on a CPU, 7 to 10)."""
LOOKED_INTO, WIDEST = 1 << 18, 128
"""Values of a rank's residual stream, and channels, of which operators' insides are traced: tracing more takes long. Of longer
windows they work chunk by chunk and need no more for a while; beside wider streams it is little."""
GATHERED_BLOCKS = 2
"""Of FSDP2 and ZeRO 3: the block at work, and the next one."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    moments: int
    ema: int
    activations: int
    """Kept by the forward of one micro-batch for its backward."""
    states: int
    """What other ranks sent, kept where blocks are run again: states, halos, parts of transposes."""
    exchange: int
    """Of data parallelism: gathered blocks, gradients on their way."""
    working: int
    """What a block needs besides, at the step's busiest moment."""

    @property
    def total(self) -> int:
        return sum(int(getattr(self, f.name)) for f in fields(self))

    def largest(self) -> str:
        """The kind that takes the most."""
        return max((f.name for f in fields(self)), key=lambda name: int(getattr(self, name)))


@dataclass(frozen=True)
class Sizes:
    """Of a model: numbers of parameters, and bytes."""

    by_kind: dict[str, int]
    moments: int
    """Numbers that the optimiser keeps."""
    weights: Weights

    @property
    def numbers(self) -> int:
        return sum(self.by_kind.values())


def count_sizes(config: RunConfig, model: LanguageModel) -> Sizes:
    """Of a model on any device, meta included."""
    width = arithmetic_dtype(config).itemsize
    kinds: dict[str, int] = {}
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.each_block()]
    for name, block in zip(config.model.mixer_names, model.each_block(), strict=True):
        parts = {
            name: block.mixer,
            "mlp": block.mlp,
            "norms": nn.ModuleList(m for m in (block.norm1, block.norm2) if m),
        }
        for kind, part in parts.items():
            if part is not None:
                kinds[kind] = kinds.get(kind, 0) + sum(p.numel() for p in part.parameters())
    kinds["norms"] += sum(p.numel() for p in model.norm.parameters())
    kinds["embedding"] = model.embedding.weight.numel()
    if model.head is not None:
        kinds["head"] = sum(p.numel() for p in model.head.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    once = 0
    if config.optim.name == "muon":
        names = set(muon_names(model))
        once = sum(p.numel() for name, p in model.named_parameters() if name in names)
    rest = numbers - sum(blocks)
    weights = Weights(sum(blocks) * width, rest * width, max(blocks) * width, len(blocks))
    return Sizes(kinds, 2 * numbers - once, weights)


class _Stem(nn.Module):
    """Token ids to the residual stream."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.model.padded_vocab, config.model.d_model)


class _Keeps(torch.autograd.Function):
    """A copy that keeps other tensors for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.clone(), *(None for _ in ctx.saved_tensors)


class _Head(nn.Module):
    """The residual stream to the loss."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.model)
        self.weight = nn.Parameter(torch.empty(config.model.padded_vocab, config.model.d_model))


@dataclass(frozen=True)
class Timeline:
    """Bytes that one micro-batch needs besides weights."""

    kept: int
    kept_without: int
    """What it would keep with activation.checkpoint = 'none': each byte is written and read a few times."""
    received: int
    peak: int


@dataclass
class Activations:
    """Traces of a run's blocks, made when they are asked for."""

    config: RunConfig
    device: str
    exact: bool = True
    """Trace any number of windows; else take those of more than two from those of one and two."""
    _traces: dict[tuple[str, int, int, int], Trace] = field(default_factory=dict)
    _channels: dict[int, int] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[tuple[str, int]]:
        """(kind, a layer of that kind) of each layer."""
        first: dict[str, int] = {}
        found = []
        for i, name in enumerate(self.config.model.mixer_names):
            kind = f"{name}, first" if self.config.model.mlp == "evo2" and i == 0 else name
            found.append((kind, first.setdefault(kind, i)))
        return found

    def timeline(self, rows: int, tokens: int, layout: Layout) -> Timeline:
        """Of `rows` windows of `tokens`, on a rank in the middle of its sequence."""
        ranks, what = layout.sequence, layout.checkpoint
        stream = rows * -(-tokens // ranks) * self.config.model.d_model * arithmetic_dtype(self.config).itemsize
        stem = self._found("stem", 0, rows, tokens, ranks)
        head = self._found("head", 0, rows, tokens, ranks)
        kept, without, received, peak = stem["kept"], stem["kept"], 0, stem["forward_peak"]
        for kind, layer in self.layers:
            block = self._found(kind, layer, rows, tokens, ranks)
            work = block["kept_selective"] + stream + self.workspace(layer, rows, tokens, ranks)
            again = stream + block["received"] if what == "block" else 0
            peak = max(peak, kept + stream + block["forward_peak"], kept + again + max(block["backward_peak"], work))
            received += block["received"] if what == "block" else 0
            kept += {"none": block["kept"], "selective": block["kept_selective"], "block": stream}[what]
            without += block["kept"]
        kept, without = kept + head["kept"], without + head["kept"]
        peak = max(peak, kept + received + stream + head["forward_peak"] - head["kept"])
        peak = max(peak, kept + received + head["backward_peak"] - head["kept"])
        return Timeline(kept, without, received, max(peak, kept + received))

    def workspace(self, layer: int, rows: int, tokens: int, ranks: int) -> int:
        """Of the transforms of a layer's long convolutions, which grow with a window; of short ones the trace knows."""
        channels = -(-self._transformed(layer) // ranks)
        if not channels or tokens <= self._looked_into(rows):
            return 0
        points = plan(tokens, tokens, self.device).points
        values = min(channels_at_once(rows, points, self.device), channels) * rows * points
        return WORKSPACE * values * arithmetic_dtype(self.config).itemsize

    def _transformed(self, layer: int) -> int:
        """Channels of a layer that go through long convolutions."""
        if layer not in self._channels:
            with Unfilling():
                self._channels[layer] = transformed_channels(Block(self.config.model, layer).mixer)
        return self._channels[layer]

    def _found(self, kind: str, layer: int, rows: int, tokens: int, ranks: int) -> dict[str, int]:
        """The numbers of a trace, or of traces of fewer rows and ranks."""
        if rows > 2 and not self.exact:
            one, two = (self._found(kind, layer, n, tokens, ranks) for n in (1, 2))
            return {k: max(0, one[k] + (rows - 1) * (two[k] - one[k])) for k in one}
        if ranks > TRACED_RANKS:
            half, quarter = (self._found(kind, layer, rows, tokens, n) for n in (2, 4))
            return {k: cut_over(half[k], quarter[k], ranks) for k in half}
        found = self._trace(kind, layer, rows, tokens, ranks)
        names = ("kept", "kept_selective", "received", "forward_peak", "backward_peak")
        return {name: getattr(found, name) for name in names}

    def _trace(self, kind: str, layer: int, rows: int, tokens: int, ranks: int) -> Trace:
        key = (kind, rows, tokens, ranks)
        if key not in self._traces:
            self._traces[key] = self._make_trace(kind, layer, rows, tokens, ranks)
        return self._traces[key]

    def _looked_into(self, rows: int) -> int:
        """Tokens of a window, 0 for none."""
        width = self.config.model.d_model
        return max(1, LOOKED_INTO // (rows * width)) if width <= WIDEST else 0

    def _make_trace(self, kind: str, layer: int, rows: int, tokens: int, ranks: int) -> Trace:
        ctx, few = split_context(tokens, ranks, ranks // 2), self._looked_into(rows)
        workspace: dict[str, int] | None = None if few else {}
        if few and (ranks > 1 or tokens > few):
            workspace = self._trace(kind, layer, rows, min(ctx.local_tokens, few), 1).workspace
        if kind not in ("stem", "head"):
            return trace_block(self.config, layer, rows, ctx, workspace)
        make: Callable[[], nn.Module] = (lambda: _Stem(self.config)) if kind == "stem" else (lambda: _Head(self.config))
        run = self._embed if kind == "stem" else self._loss
        return trace(self.config, make, run, rows, ctx, workspace)

    def _embed(self, stem: nn.Module, x: Tensor, ctx: SequenceContext) -> Tensor:
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        assert isinstance(stem, _Stem)
        hidden: Tensor = stem.embedding(ids)
        if self.config.model.embed_dropout or self.config.model.resid_dropout:
            # Not token_dropout itself, which hashes block by block: it keeps the keys and the positions.
            return _Keeps.apply(hidden, torch.zeros(len(ids), dtype=torch.int64), ctx.positions())  # type: ignore[no-any-return, no-untyped-call]
        return hidden

    def _loss(self, head: nn.Module, x: Tensor, ctx: SequenceContext) -> Tensor:
        assert isinstance(head, _Head)
        labels = torch.zeros(x.shape[:2], dtype=torch.int64)
        hidden = head.norm(x)
        if self.config.optim.z_loss:
            nats, _, squares = kernels.linear_cross_entropy(hidden, head.weight, labels, output_squares=True)
            return nats + self.config.optim.z_loss * squares
        return kernels.linear_cross_entropy(hidden, head.weight, labels)[0]


def rank_memory(config: RunConfig, sizes: Sizes, layout: Layout, needs: Timeline, micro_batches: int) -> RankMemory:
    """Of the busiest moment of a step."""
    parts = shares(layout.backend, layout.zero, layout.part, micro_batches)
    weights, width = sizes.weights, arithmetic_dtype(config).itemsize
    exchange = 0
    if parts.weights > 1:
        exchange = GATHERED_BLOCKS * weights.largest_block + weights.rest
        exchange += weights.largest_block if parts.gradients > 1 else 0
    elif layout.ranks > 1 and layout.backend == "none":
        exchange = weights.total
    working = needs.peak - needs.kept - needs.received
    after = exchange if layout.backend == "none" else 0  # the message is made when activations are gone
    if after:
        exchange = max(0, after - needs.peak)
    return RankMemory(
        weights=weights.total // parts.weights,
        gradients=weights.total // parts.gradients,
        moments=sizes.moments * width // parts.moments,
        ema=weights.total // parts.weights if config.optim.ema else 0,
        activations=needs.kept,
        states=needs.received,
        exchange=exchange,
        working=working,
    )
