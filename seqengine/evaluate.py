"""Loss on validation windows, the same for every mesh."""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch

from seqengine.checkpoint.restore import restore_model
from seqengine.config.run import RunConfig
from seqengine.data.masking import mask_tokens
from seqengine.data.packed import PackedGenome
from seqengine.data.stream import read_windows, validation_indices
from seqengine.data.windows import Windows, mix, split_windows
from seqengine.metrics import bits
from seqengine.model import LanguageModel
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

MICRO_BATCH_TOKENS = 1 << 16
"""Tokens of a forward pass on one rank when train.micro_batch is 'auto'."""


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


def arithmetic(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where precision.params asks for it; filters, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision.params == "bf16")


def _most_windows(config: RunConfig, mesh: Mesh) -> int:
    """Windows of which a rank's parts hold MICRO_BATCH_TOKENS, at least one."""
    return max(1, MICRO_BATCH_TOKENS * mesh.sequence_size // config.data.seq_len)


def micro_batch_rows(config: RunConfig, rows: int, mesh: Mesh) -> int:
    """Windows per forward pass: a divisor of `rows`, as large as MICRO_BATCH_TOKENS on a rank allow."""
    if config.train.micro_batch != "auto":
        return min(config.train.micro_batch, rows)
    most = _most_windows(config, mesh)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Windows, config: RunConfig, mesh: Mesh) -> Evaluation:
    """Mean loss over `eval.windows` windows, shared out over replicas and split over sequence ranks.

    Every rank must call. The sums are in float64, so two meshes agree to the rounding of the forward pass.
    """
    was_training = model.training
    model.eval()
    ctx = SequenceContext.even(mesh.sequence, config.data.seq_len)
    begin, end = ctx.bounds[ctx.rank], ctx.bounds[ctx.rank + 1]
    chosen = validation_indices(len(windows), config.eval.windows)
    bounds = offsets(split_sizes(len(chosen), mesh.num_replicas))
    mine = chosen[bounds[mesh.replica] : bounds[mesh.replica + 1]]
    most = _most_windows(config, mesh)
    total, count = 0.0, 0
    for start in range(0, len(mine), most):
        some = mine[start : start + most]
        ids, labels = read_windows(windows, some, begin=begin, end=end)
        if not config.model.causal:
            keys = torch.tensor([mix(config.run.seed, index) >> 1 for index in some])
            ids, labels = mask_tokens(ids, keys, ctx.positions(), config.train.mask_rate)
        with arithmetic(config, mesh.device):
            nats, tokens = model.loss(ids.to(mesh.device), labels.to(mesh.device), ctx=ctx)
        total += float(nats.double())
        count += int(tokens)
    model.train(was_training)
    all_nats, all_tokens = mesh.sum(total, count)
    return Evaluation(all_nats / max(1.0, all_tokens), int(all_tokens), len(chosen))


def evaluate_checkpoint(
    target: CheckpointTarget, config: RunConfig, genome: PackedGenome, mesh: Mesh
) -> CheckpointEvaluation:
    """Verify and load a checkpoint on this mesh, whatever mesh wrote it, and evaluate it. Every rank must call.

    Raises InputError if the checkpoint is damaged, or there is none.
    """
    model, loaded = restore_model(target, config, mesh)
    valid = split_windows(genome, config.data, ("valid",))["valid"]
    evaluation = evaluate(model, valid, config, mesh)
    return CheckpointEvaluation(str(loaded.directory), loaded.record.progress.step, evaluation)
