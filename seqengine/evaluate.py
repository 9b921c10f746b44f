"""Loss on validation windows, the same for every mesh."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from seqengine.backends.backend import arithmetic
from seqengine.checkpoint.restore import restore_model
from seqengine.config.run import RunConfig
from seqengine.data.source import Source, Windows
from seqengine.data.stream import read_windows, validation_indices
from seqengine.feed import hide_tokens, most_windows, sample_keys
from seqengine.metrics import bits
from seqengine.model import LanguageModel
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

Loss = Callable[..., tuple[Tensor, Tensor]]
"""(ids, labels, ctx=...) -> sum of nats and the number of labels, as LanguageModel.loss."""


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, over `tokens` tokens of `windows` windows."""

    loss: float
    tokens: int
    windows: int

    @property
    def bits_per_token(self) -> float:
        return bits(self.loss)

    def line(self, step: int, tokens: int) -> dict[str, object]:
        """As a line of metrics, at a step and after so many tokens of training."""
        figures = {**asdict(self), "evaluated_tokens": self.tokens, "tokens": tokens}
        return {"split": "valid", "step": step, "bits_per_token": self.bits_per_token, **figures}


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The evaluation of one checkpoint."""

    checkpoint: str
    step: int
    evaluation: Evaluation

    def as_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "bits_per_token": self.evaluation.bits_per_token,
            **asdict(self.evaluation),
        }

    def describe(self) -> str:
        e = self.evaluation
        return (
            f"{self.checkpoint} (verified): loss {e.loss:.6f} nats, {e.bits_per_token:.6f} bits per token, "
            f"{e.windows} validation windows, {e.tokens} tokens"
        )


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
    loss: Loss | None = None,
    stop: Callable[[], bool] = _go_on,
) -> Evaluation:
    """Mean loss over `eval.windows` windows, shared out over replicas and split over sequence ranks.

    Every rank must call. The sums are in float64, so two meshes agree to the rounding of the forward pass.
    loss: in place of model.loss.   stop: asked before every micro-batch, on every rank equally often.
    Raises Stopped on every rank once `stop` is true on one.
    """
    was_training = model.training
    model.eval()
    try:
        total, count, chosen = _sums(loss or model.loss, windows, config, mesh, source, stop)
    finally:
        model.train(was_training)
    all_nats, all_tokens = mesh.sum(total, count)
    return Evaluation(all_nats / max(1.0, all_tokens), int(all_tokens), chosen)


def _sums(
    loss: Loss, windows: Windows, config: RunConfig, mesh: Mesh, source: Source, stop: Callable[[], bool]
) -> tuple[float, int, int]:
    """This rank's nats and labels, and the number of windows over all ranks."""
    ctx = SequenceContext.even(mesh.sequence, windows.seq_len)
    begin, end = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
    chosen = validation_indices(len(windows), config.eval.windows)
    sizes = split_sizes(len(chosen), mesh.num_replicas)
    bounds = offsets(sizes)
    mine = chosen[bounds[mesh.replica] : bounds[mesh.replica + 1]]
    most = 1 if config.data.has_documents else most_windows(windows.seq_len, mesh)
    total, count = 0.0, 0
    for start in range(0, max(sizes), most):
        if stop():
            raise Stopped
        some = mine[start : start + most]
        if not some and config.parallel.backend in ("none", "ddp"):
            continue
        # A rank without windows of its own goes through the forward with the others, where they gather weights together.
        batch = read_windows(windows, some or chosen[:1], begin=begin, end=end)
        part = ctx if batch.documents is None else ctx.with_documents(batch.documents)
        ids, labels = batch.ids, batch.labels
        if not config.model.causal:
            ids, labels = hide_tokens(ids, sample_keys(config.run.seed, some or chosen[:1]), part, config, source)
        with arithmetic(config, mesh.device):
            nats, tokens = loss(ids.to(mesh.device), labels.to(mesh.device), ctx=part)
        total += float(nats.double()) if some else 0.0
        count += int(tokens) if some else 0
    return total, count, len(chosen)


def evaluate_checkpoint(
    target: CheckpointTarget, config: RunConfig, source: Source, mesh: Mesh, *, averaged: bool = False
) -> CheckpointEvaluation:
    """Verify and load a checkpoint on this mesh, whatever mesh wrote it, and evaluate it. Every rank must call.

    Raises InputError if the checkpoint is damaged, or there is none.
    """
    model, loaded = restore_model(target, config, mesh, averaged=averaged)
    valid = source.windows(config.data.seq_len, ("valid",))["valid"]
    evaluation = evaluate(model, valid, config, mesh, source)
    return CheckpointEvaluation(str(loaded.directory), loaded.record.progress.step, evaluation)
