"""The training loop, from top to bottom: set up, resume, step, log, evaluate, save.

Every rank runs this. A rank is (replica, sequence rank): replicas read different windows, the ranks of one replica each read
their own slice of the same windows. Which sample a rank reads follows from the number of samples consumed, so any mesh
continues any run.
"""

import math
import time
from dataclasses import dataclass

import torch

from seqengine.checkpoint.state import Progress, Record
from seqengine.checkpoint.store import CheckpointStore, mesh_record
from seqengine.config.load import Loaded
from seqengine.data.masking import chosen_tokens, mask_tokens
from seqengine.data.packed import PackedGenome
from seqengine.data.stream import Stream, StreamState
from seqengine.data.windows import Windows, mix, split_windows
from seqengine.errors import InputError
from seqengine.evaluate import Evaluation, arithmetic, evaluate, micro_batch_rows
from seqengine.metrics import Metrics, bits, peak_memory_bytes
from seqengine.model import build_model
from seqengine.optim import build_optimizer, clip_gradients, gradient_norm, learning_rate, set_learning_rate
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.guard import agree, guard_sequence_mixers
from seqengine.parallel.mesh import Mesh, reduce_gradients
from seqengine.rundir import RunDirectory, versions


class TrainingError(RuntimeError):
    """Training cannot go on: exit code 1."""


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: nats per token over all ranks, the gradient norm before clipping, and whether it is due to save."""

    loss: float
    grad_norm: float
    save: bool


class Trainer:
    """Everything that a step needs, and the steps."""

    def __init__(self, loaded: Loaded, genome: PackedGenome, mesh: Mesh) -> None:
        config = loaded.config
        agree(config.model_dump(mode="json"), mesh, "the config")
        self.config, self.mesh, self.genome = config, mesh, genome
        self.run = RunDirectory(config.run_dir)
        windows = split_windows(genome, config.data)
        self.valid: Windows = windows["valid"]
        self.stream = Stream(
            windows["train"], seed=config.run.seed, rc_prob=config.data.rc_prob, window_mode=config.data.window
        )
        self.model = build_model(config.model, seed=config.run.seed, params=config.precision.params, device=mesh.device)
        if mesh.sequence_size > 1:
            guard_sequence_mixers(self.model, mesh)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.store = CheckpointStore(self.run.checkpoints, mesh, keep=config.ckpt.keep)
        self.ctx = SequenceContext.even(mesh.sequence, config.data.seq_len)
        self.progress = Progress()
        self._saved_step = -1
        self._last_save = time.monotonic()

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        found = self.store.load_latest(self.model, self.optimizer)
        if found is None:
            return
        for damage in found.skipped:
            self.say(f"passed over a damaged checkpoint: {damage}")
        if found.record.data_hash not in ("", self.genome.content_hash):  # "" of imported weights: no data yet
            raise InputError(
                f"data.fasta: {found.directory} was trained on other data (content {found.record.data_hash[:12]}); got "
                f"{self.genome.content_hash[:12]}. Give the same genome, or start another run (run.dir=...)."
            )
        self.progress = found.record.progress
        self.progress.samples = self.stream.resume(StreamState.from_dict(found.record.stream))
        self._saved_step = self.progress.step
        how = "bit for bit, on the same mesh" if found.same_mesh else "on another mesh, with the same samples"
        self.say(f"resumed at step {self.progress.step} from {found.directory} ({how})")

    def train(self, metrics: Metrics) -> Evaluation:
        """All steps that are left, then the last evaluation and checkpoint."""
        config, total = self.config, self.config.total_steps
        self.model.train()
        evaluation: Evaluation | None = None
        since, logged_tokens = time.monotonic(), self.progress.tokens
        while self.progress.step < total:
            started = time.monotonic()
            result = self.step()
            self.progress.seconds += time.monotonic() - started
            step = self.progress.step
            if step % config.log.every == 0 or step == total:
                speed = (self.progress.tokens - logged_tokens) / (time.monotonic() - since)
                self._log(metrics, result, speed)
                since, logged_tokens = time.monotonic(), self.progress.tokens
            pause = time.monotonic()
            evaluation = None
            if config.eval.every and step % config.eval.every == 0:
                evaluation = self.evaluate(metrics)
            if result.save:
                self.save()
            since += time.monotonic() - pause  # speed is that of training
        last = evaluation or self.evaluate(metrics)
        if self._saved_step < self.progress.step:
            self.save()
        return last

    def step(self) -> StepResult:
        """One optimiser step on train.batch_tokens tokens: accumulate, sum over the mesh, clip, update."""
        config, mesh, progress = self.config, self.mesh, self.progress
        rows = config.windows_per_step // mesh.num_replicas
        first = progress.samples + mesh.replica * rows
        micro = micro_batch_rows(config, rows, mesh)
        tokens = config.windows_per_step * config.data.seq_len  # over all ranks
        labels = self._num_labels(first, rows, tokens)
        rate = learning_rate(progress.tokens, config.total_tokens, config.optim.lr, config.schedule)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        local_nats = 0.0
        for start in range(first, first + rows, micro):
            local_nats += self._accumulate(start, micro, labels)
        reduce_gradients(self.model, mesh)
        nats, due = mesh.sum(local_nats, float(mesh.rank == 0 and self._save_is_due()))
        norm = float(gradient_norm(self.model))
        loss = nats / labels
        if math.isfinite(norm) and math.isfinite(loss):
            clip_gradients(self.model, norm, config.train.clip)
            self.optimizer.step()
        else:  # sums over the mesh: every rank sees the same
            self._nonfinite(loss, norm, first)
        progress.step += 1
        progress.samples += config.windows_per_step
        progress.tokens += tokens
        return StepResult(loss, norm, due > 0)

    def _num_labels(self, first: int, rows: int, tokens: int) -> float:
        """Labels of a step over all ranks: every token's, or those of masked ones."""
        if self.config.model.causal:
            return float(tokens)
        positions = self.ctx.positions()
        chosen = chosen_tokens(self._keys(first, rows), positions, self.config.train.mask_rate)
        return max(1.0, self.mesh.sum(float(chosen.sum()))[0])

    def _keys(self, first: int, rows: int) -> torch.Tensor:
        """A number for each sample, for what is random in it."""
        return torch.tensor([signed(mix(self.config.run.seed, first + row)) for row in range(rows)])

    def _accumulate(self, first: int, rows: int, num_labels: float) -> float:
        """Gradients of this rank's part of some windows, each label weighing 1 / num_labels; returns the sum of nats."""
        begin, end = self.ctx.bounds[self.ctx.rank], self.ctx.bounds[self.ctx.rank + 1]
        ids, labels = self.stream.batch(first, rows, begin=begin, end=end)
        device = self.mesh.device
        keys = self._keys(first, rows)
        if not self.config.model.causal:
            ids, labels = mask_tokens(ids, keys, self.ctx.positions(), self.config.train.mask_rate)
        with arithmetic(self.config, device):
            nats, _ = self.model.loss(ids.to(device), labels.to(device), ctx=self.ctx, dropout_keys=keys.to(device))
        (nats / num_labels).backward()
        return float(nats.detach().double())

    def _nonfinite(self, loss: float, norm: float, first: int) -> None:
        what = (
            f"step {self.progress.step + 1}: loss {loss}, gradient norm {norm}, samples from {self.progress.samples} "
            f"(this replica: {first})"
        )
        if self.config.train.nonfinite == "stop":
            raise TrainingError(
                f"{what}. The weights are those of step {self.progress.step}; lower optim.lr, or set "
                "train.nonfinite='skip' to leave such steps out."
            )
        self.say(f"skipped a step that is not finite: {what}")

    def evaluate(self, metrics: Metrics) -> Evaluation:
        evaluation = evaluate(self.model, self.valid, self.config, self.mesh)
        metrics.write(evaluation.line(self.progress.step, self.progress.tokens))
        return evaluation

    def save(self) -> None:
        record = Record(
            progress=self.progress,
            stream=self.stream.state(self.progress.samples).to_dict(),
            mesh=mesh_record(self.mesh),
            data_hash=self.genome.content_hash,
            versions=versions(),
        )
        self.store.save(self.model, self.optimizer, record)
        self._saved_step = self.progress.step
        self._last_save = time.monotonic()

    def _save_is_due(self) -> bool:
        every = self.config.ckpt.every
        if isinstance(every, int):
            return (self.progress.step + 1) % every == 0
        return time.monotonic() - self._last_save >= every

    def _log(self, metrics: Metrics, result: StepResult, tokens_per_second: float) -> None:
        memory = int(self.mesh.max(peak_memory_bytes(self.mesh.device)))
        rates = {group["lr"] / group["lr_scale"] for group in self.optimizer.param_groups if group["lr_scale"] > 0}
        metrics.write(
            {
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "loss": result.loss,
                "bits_per_token": bits(result.loss),
                "lr": max(rates, default=0.0),
                "grad_norm": result.grad_norm,
                "tokens_per_second": tokens_per_second,
                "peak_memory_bytes": memory,
                "seconds": self.progress.seconds,
            }
        )

    def say(self, text: str) -> None:
        """To people, once."""
        if self.mesh.rank == 0:
            print(text, flush=True)


def signed(word: int) -> int:
    """A 64-bit word as torch's int64 holds it."""
    return word - (1 << 64) if word >= 1 << 63 else word


def train(loaded: Loaded, genome: PackedGenome, mesh: Mesh, *, allow_changes: tuple[str, ...] = ()) -> Evaluation:
    """Train, or go on with, the run of a config; returns the evaluation of its last step.

    Raises InputError for settings that do not fit the data or the run, TrainingError if training cannot go on.
    """
    trainer = Trainer(loaded, genome, mesh)
    trainer.run.check_resumable(loaded, allow_changes)
    trainer.resume()
    if mesh.rank == 0:
        trainer.run.write(loaded, genome.content_hash, mesh_record(mesh))
    mesh.barrier()
    total, step = loaded.config.total_steps, trainer.progress.step
    if step >= total:
        trainer.say(f"the run is complete at step {step}; raise train.steps or train.tokens to go on")
    metrics = Metrics([])
    if mesh.rank == 0:
        metrics = Metrics.open(
            trainer.run.path, total_steps=total, step=step, tensorboard=loaded.config.log.tensorboard
        )
    try:
        return trainer.train(metrics)
    finally:
        metrics.close()
