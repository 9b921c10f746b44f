"""Does long context help? Loss by position in a window, and loss of the same tokens with more and more context before them.

By position, early tokens have little context and late ones much; but they are other tokens. By context length the same tokens
are told, the last ones of each window, from the C tokens that end there: what is gained is gained by context alone.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from seqengine.backends.backend import arithmetic
from seqengine.config.run import RunConfig
from seqengine.data.source import Windows
from seqengine.errors import InputError
from seqengine.feed import validation_share
from seqengine.kernels import api as kernels
from seqengine.metrics import bits
from seqengine.model import LanguageModel
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.mesh import Mesh

LAST_TOKENS = 64
"""Tokens at the end of a window whose loss is told for each context length, or all of a shorter context."""


@dataclass(frozen=True)
class Part:
    """Loss in nats per token over tokens [begin, end) of windows, or with `end` tokens of context."""

    begin: int
    end: int
    loss: float
    tokens: int

    @property
    def bits_per_token(self) -> float:
        return bits(self.loss)

    def as_dict(self) -> dict[str, float | int]:
        return {**asdict(self), "bits_per_token": self.bits_per_token}


def by_position(model: LanguageModel, windows: Windows, config: RunConfig, mesh: Mesh) -> list[Part]:
    """The loss of tokens [0, 1), [1, 2), [2, 4), [4, 8), .. of validation windows. Every rank must call.

    Memory: that of evaluating one window at a time; logits are never whole.
    Raises: InputError for a model that is not causal, or has classes.
    """
    _must_tell_next_tokens(config)
    cuts = [0, 1]
    while cuts[-1] < windows.seq_len:
        cuts.append(min(2 * cuts[-1], windows.seq_len))
    ctx = SequenceContext.even(mesh.sequence, windows.seq_len)
    sums = torch.zeros(len(cuts) - 1, 2, dtype=torch.float64)
    for index in validation_share(windows, config, mesh).mine:
        sums += _of_window(model, windows, index, 0, ctx, cuts, config, mesh)
    return [Part(a, b, *_mean(mesh, row)) for (a, b), row in zip(pairwise(cuts), sums, strict=True)]


def by_context(model: LanguageModel, windows: Windows, config: RunConfig, mesh: Mesh) -> list[Part]:
    """The loss of each window's last tokens, given C = 64, 128, .. tokens that end with them. Every rank must call.

    Raises: InputError for a model that is not causal, or has classes.
    """
    _must_tell_next_tokens(config)
    told = min(LAST_TOKENS, windows.seq_len)
    contexts = [told]
    while contexts[-1] < windows.seq_len:
        contexts.append(min(2 * contexts[-1], windows.seq_len))
    found = []
    mine = validation_share(windows, config, mesh).mine
    for context in contexts:
        ctx = SequenceContext.even(mesh.sequence, context)
        sums = torch.zeros(1, 2, dtype=torch.float64)
        for index in mine:
            start = windows.seq_len - context
            sums += _of_window(model, windows, index, start, ctx, [context - told, context], config, mesh)
        found.append(Part(context - told, context, *_mean(mesh, sums[0])))
    return found


@torch.no_grad()
def _of_window(
    model: LanguageModel,
    windows: Windows,
    index: int,
    start: int,
    ctx: SequenceContext,
    cuts: list[int],
    config: RunConfig,
    mesh: Mesh,
) -> Tensor:
    """[cuts - 1, 2]: this rank's nats and labels between cuts of the tokens from `start` on; float64."""
    begin, end = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
    ids, labels, documents = windows.read(index, start + begin, start + end, seed=0, epoch=0, training=False)
    part = ctx
    if documents is not None:
        inside = [d - start for d in documents if start < d < start + ctx.total_tokens]
        part = ctx.with_documents([0, *inside, ctx.total_tokens])
    row = torch.tensor(ids.astype("int64"), device=mesh.device)[None]
    answers = torch.tensor(labels.astype("int64"), device=mesh.device)[None]
    sums = torch.zeros(len(cuts) - 1, 2, dtype=torch.float64)
    with arithmetic(config, mesh.device):
        hidden = model.hidden(row, ctx=part)
        for i, (first, last) in enumerate(pairwise(cuts)):
            here = slice(max(first - begin, 0), max(min(last, end) - begin, 0))
            nats, count = kernels.linear_cross_entropy(hidden[:, here], model.head_weight, answers[:, here])
            sums[i] = torch.tensor([float(nats), float(count)], dtype=torch.float64)
    return sums


def _mean(mesh: Mesh, sums: Tensor) -> tuple[float, int]:
    nats, count = mesh.sum(float(sums[0]), float(sums[1]))
    return nats / max(1.0, count), int(count)


def _must_tell_next_tokens(config: RunConfig) -> None:
    if config.model.num_classes or not config.model.causal:
        raise InputError(
            "eval: loss by position or context needs a model that tells the next token; this one has "
            f"{'classes' if config.model.num_classes else 'model.causal = false'}."
        )


def plot(parts: dict[str, list[Part]], path: Path) -> None:
    """Bits per token over position, or over context length, as PNG, SVG or PDF by the file's ending.

    Raises InputError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot: matplotlib is not installed; pip install 'seqengine-train[plot]'.") from error
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, points in parts.items():
        places = [p.end for p in points]
        axes.plot(places, [p.bits_per_token for p in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before and with the one that is told")
    axes.set_ylabel("bits per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
