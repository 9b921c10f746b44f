"""Loss on validation windows, the same for every mesh."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from seqengine.backends.backend import arithmetic
from seqengine.checkpoint.restore import restore_model
from seqengine.config.data import TASKS
from seqengine.config.run import RunConfig
from seqengine.context_use import Part, by_context, by_position
from seqengine.data.source import Source, Windows
from seqengine.data.stream import read_windows
from seqengine.feed import examples, most_windows, sample_keys, validation_share
from seqengine.metrics import bits
from seqengine.model import LanguageModel, Objective
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

Forward = Callable[..., Objective]
"""LanguageModel.objective, or what does the same."""


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, over `tokens` tokens of `windows` windows."""

    loss: float
    tokens: int
    windows: int
    accuracy: float | None = None
    """The share of answers that are told, where windows have some: a class (tokens are then windows), or those of a task."""

    @property
    def bits_per_token(self) -> float:
        return bits(self.loss)

    def line(self, step: int, tokens: int) -> dict[str, object]:
        """As a line of metrics, at a step and after so many tokens of training."""
        figures = {**asdict(self), "evaluated_tokens": self.tokens, "tokens": tokens}
        if self.accuracy is None:
            del figures["accuracy"]
        return {"split": "valid", "step": step, "bits_per_token": self.bits_per_token, **figures}


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The evaluation of one checkpoint."""

    checkpoint: str
    step: int
    evaluation: Evaluation
    parts: dict[str, list[Part]] = field(default_factory=dict)
    """By position and by context length, where asked for."""

    def as_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "bits_per_token": self.evaluation.bits_per_token,
            **asdict(self.evaluation),
            **{name.replace(" ", "_"): [part.as_dict() for part in parts] for name, parts in self.parts.items()},
        }

    def describe(self) -> str:
        e = self.evaluation
        share = "" if e.accuracy is None else f", accuracy {e.accuracy:.2%}"
        lines = [
            f"{self.checkpoint} (verified): loss {e.loss:.6f} nats, {e.bits_per_token:.6f} bits per token, "
            f"{e.windows} validation windows, {e.tokens} tokens{share}"
        ] + [
            f"{name:>12} {p.begin:>9,} to {p.end:>9,}  {p.bits_per_token:.5f} bits per token  ({p.tokens:,} tokens)"
            for name, parts in self.parts.items()
            for p in parts
        ]
        return "\n".join(lines)


def has_answers(config: RunConfig) -> bool:
    """Windows ask questions, few enough that their answers can be compared one by one."""
    return config.data.source in TASKS and not config.model.num_classes


class Stopped(Exception):  # noqa: N818  not an error
    """The run was asked to stop in the middle of an evaluation."""


def _go_on() -> bool:
    return False


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: Windows,
    config: RunConfig,
    mesh: Mesh,
    source: Source,
    *,
    objective: Forward | None = None,
    stop: Callable[[], bool] = _go_on,
) -> Evaluation:
    """Mean loss over `eval.windows` windows, shared out over replicas and split over sequence ranks.

    Every rank must call. The sums are in float64, so two meshes agree to the rounding of the forward pass.
    objective: in place of model.objective.   stop: asked before every micro-batch, on every rank equally often.
    Raises Stopped on every rank once `stop` is true on one.
    """
    was_training = model.training
    model.eval()
    try:
        sums, chosen = _sums(objective or model.objective, windows, config, mesh, source, stop)
    finally:
        model.train(was_training)
    nats, tokens, correct = mesh.sum(*sums)
    accuracy = correct / max(1.0, tokens) if config.model.num_classes or has_answers(config) else None
    return Evaluation(nats / max(1.0, tokens), int(tokens), chosen, accuracy)


def _sums(
    objective: Forward, windows: Windows, config: RunConfig, mesh: Mesh, source: Source, stop: Callable[[], bool]
) -> tuple[list[float], int]:
    """This rank's nats, labels and labels told, and the number of windows over all ranks."""
    ctx = SequenceContext.even(mesh.sequence, windows.seq_len)
    begin, end = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
    chosen, mine, most_of_any = validation_share(windows, config, mesh)
    most = 1 if config.data.has_documents else most_windows(windows.seq_len, mesh)
    sums = [0.0, 0.0, 0.0]
    for start in range(0, most_of_any, most):
        if stop():
            raise Stopped
        some = mine[start : start + most]
        if not some and config.parallel.backend in ("none", "ddp"):
            continue
        # A rank without windows of its own goes through the forward with the others, where they gather weights together.
        batch = read_windows(windows, some or chosen[:1], begin=begin, end=end)
        keys = sample_keys(config.run.seed, some or chosen[:1])
        ids, labels, options = examples(batch, keys, ctx, config, source, mesh.device)
        with arithmetic(config, mesh.device):
            found = objective(ids, labels, count_correct=has_answers(config), **options)
        if some:
            told = 0.0 if found.correct is None else float(found.correct)
            sums = [a + b for a, b in zip(sums, (float(found.nats.double()), float(found.tokens), told), strict=True)]
    return sums, len(chosen)


def evaluate_checkpoint(
    target: CheckpointTarget,
    config: RunConfig,
    source: Source,
    mesh: Mesh,
    *,
    averaged: bool = False,
    positions: bool = False,
    contexts: bool = False,
) -> CheckpointEvaluation:
    """Verify and load a checkpoint on this mesh, whatever mesh wrote it, and evaluate it. Every rank must call.

    Raises InputError if the checkpoint is damaged, or there is none.
    """
    model, loaded = restore_model(target, config, mesh, averaged=averaged)
    valid = source.windows(config.data.seq_len, ("valid",))["valid"]
    evaluation = evaluate(model, valid, config, mesh, source)
    model.eval()
    parts = {}
    if positions:
        parts["by position"] = by_position(model, valid, config, mesh)
    if contexts:
        parts["by context"] = by_context(model, valid, config, mesh)
    return CheckpointEvaluation(str(loaded.directory), loaded.record.progress.step, evaluation, parts)
