"""The training loop, from top to bottom: set up, resume, step, log, evaluate, save, stop.

Every rank runs this. A rank is (replica, sequence rank): replicas read different windows, the ranks of one replica each read
their own slice of the same windows. Which sample a rank reads follows from the number of samples consumed, so any mesh
continues any run.
"""

import math
import time
from dataclasses import dataclass, replace

import torch

from seqengine.backends.choose import make_backend
from seqengine.check import check_source
from seqengine.checkpoint.state import Progress
from seqengine.codec import keep_tokenizer
from seqengine.config.load import Loaded
from seqengine.data.source import Source
from seqengine.data.stream import StreamState
from seqengine.ema import Ema
from seqengine.evaluate import Evaluation, Stopped, evaluate
from seqengine.feed import Feed, SampleLog
from seqengine.flops import Utilisation, peak_flops
from seqengine.keeper import Keeper
from seqengine.memory import check_stages
from seqengine.metrics import Metrics, bits, peak_memory_bytes
from seqengine.model import build_model
from seqengine.nonfinite import layer_norms, write_report
from seqengine.optim import learning_rate
from seqengine.parallel.guard import agree, guard_sequence_mixers
from seqengine.parallel.mesh import Mesh
from seqengine.preemption import StopRequest
from seqengine.profiling import Profiler
from seqengine.rundir import RunDirectory, mesh_record
from seqengine.sinks import WandbRun
from seqengine.spikes import SpikeDetector
from seqengine.stages import stage_at, stages_of
from seqengine.watchdog import Watchdog

MOST_REWINDS = 3
"""Times that a run goes back to one checkpoint before it gives up."""


class TrainingError(RuntimeError):
    """Training cannot go on: exit code 1."""


class Preempted(Exception):  # noqa: N818  not an error
    """The run was asked to stop, and has saved: exit code 75."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"stopped by {reason} at step {step}, which is saved; the same command goes on from there")


@dataclass(frozen=True)
class StepResult:
    """One optimiser step, the same on every rank: nats per token, the gradient norm before clipping, what is due."""

    loss: float
    grad_norm: float
    save: bool
    stop: bool


class Trainer:
    """Everything that a step needs, and the steps."""

    def __init__(self, loaded: Loaded, source: Source, mesh: Mesh, stop: StopRequest) -> None:
        config = loaded.config
        agree(config.model_dump(mode="json"), mesh, "the config")
        self.config, self.mesh, self.source, self.request = config, mesh, source, stop
        check_source(source, config)
        self.run = RunDirectory(config.run_dir)
        self.stages = stages_of(config)
        self.meshes = {
            stage.sequence: mesh.reshaped(stage.sequence, keep_copies=config.parallel.is_sharded)
            for stage in self.stages
        }
        self.valid = source.windows(config.data.seq_len, ("valid",))["valid"]
        self.train_windows = {s.seq_len: source.windows(s.seq_len, ("train",))["train"] for s in self.stages}
        model = build_model(config.model, seed=config.run.seed, params=config.precision.params, device=mesh.device)
        for reshaped in self.meshes.values():
            if len(self.meshes) == 1 and reshaped.sequence_size > 1:
                guard_sequence_mixers(model, reshaped)
        self.model = model
        self.backend = make_backend(model, config, mesh)
        self.ema = Ema(model, config.optim.ema) if config.optim.ema else None
        self.spikes = SpikeDetector(window=config.train.spike_window, factor=config.train.spike_factor)
        self.keeper = Keeper(config, mesh, self.backend, self.ema, self.spikes, source.content_hash)
        self.watchdog = Watchdog(
            self.run.path, mesh.rank, timeout_seconds=config.comm.step_timeout or None, num_ranks=mesh.size
        )
        self.profiler = Profiler(config.log, self.run.path, mesh.rank, mesh.device)
        peak = peak_flops(mesh.device, config.precision.params, tflops=config.log.peak_tflops)
        self._mfu = Utilisation(config.model, mesh.size, peak)
        self.progress = Progress()
        self.feed: Feed | None = None
        self._rewinds = 0

    def save(self) -> None:
        self._rewinds = 0
        self.watchdog.beat(self.progress.step, "save")
        self.keeper.save(self.progress, self._feed().stream.state(self.progress.samples))

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False if there is none."""
        found = self.keeper.restore()
        if found is None:
            return False
        for damage in found.skipped:
            self.say(f"passed over a damaged checkpoint: {damage}")
        self.progress = replace(found.record.progress)
        self.progress.samples = self._feed().stream.resume(StreamState.from_dict(found.record.stream))
        is_exact = found.record.was_on(self.keeper.mesh_record)
        how = "bit for bit, on the same mesh" if is_exact else "on another mesh, with the same samples"
        self.say(f"resumed at step {self.progress.step} from {found.directory} ({how})")
        return True

    def begin(self) -> None:
        """A new run: its own initial weights, or those of another run."""
        if self.config.train.init_from is not None:
            self.say(self.keeper.begin_from(self.config.train.init_from))

    def train(self, metrics: Metrics) -> Evaluation:
        """All steps that are left, then the last evaluation and checkpoint. Raises Preempted after a good save."""
        config, total = self.config, self.config.total_steps
        self.model.train()
        evaluation: Evaluation | None = None
        since, logged_tokens = time.monotonic(), self.progress.tokens
        stop = self._agreed_stop()
        try:
            while self.progress.step < total and not stop:
                started = time.monotonic()
                result = self.step()
                self.progress.seconds += time.monotonic() - started
                step = self.progress.step
                if step % config.log.every == 0 or step == total:
                    speed = (self.progress.tokens - logged_tokens) / (time.monotonic() - since)
                    self._log(metrics, result, speed)
                    since, logged_tokens = time.monotonic(), self.progress.tokens
                pause = time.monotonic()
                if self._is_bad(result, metrics):
                    logged_tokens = self.progress.tokens
                    continue
                stop = result.stop
                evaluation = None
                if config.eval.every and step % config.eval.every == 0 and not stop:
                    evaluation = self.evaluate(metrics)
                if result.save and not stop:
                    self.save()
                since += time.monotonic() - pause  # speed is that of training
            if not stop:
                last = evaluation or self.evaluate(metrics)
        except Stopped:
            stop = True
        if self.keeper.saved_step < self.progress.step:
            self.save()
        self.keeper.wait()
        if stop:
            if self.mesh.rank == 0:
                self.request.clear_stop_file()
            raise Preempted(self.request.reason or "another rank", self.progress.step)
        return last

    def step(self) -> StepResult:
        """One optimiser step on train.batch_tokens tokens: accumulate, sum over the mesh, clip, update."""
        config, progress = self.config, self.progress
        feed = self._feed()
        stage = feed.stage
        self.watchdog.beat(progress.step, "train")
        self.profiler.step(progress.step + 1)
        batches = feed.step(progress.samples)
        labels = feed.num_labels(batches)
        self.backend.set_rate(learning_rate(progress.tokens, config.total_tokens, config.optim.lr, config.schedule))
        self.backend.begin()
        parts = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            parts.append(self.backend.accumulate(batch.ids, batch.labels, labels, last=last, **batch.options))
        self.backend.finish()
        nats, due, stop = self.mesh.sum(
            float(torch.stack(parts).double().sum()),
            float(self.mesh.rank == 0 and self.keeper.is_due(self.progress.step + 1)),
            float(self.request.reason is not None),
        )
        norm = self.backend.update()
        loss = nats / labels
        if not math.isfinite(norm):  # a sum over the mesh: every rank sees the same
            self._nonfinite(loss, norm, feed)
        elif self.ema is not None:
            self.ema.update(self.model, tokens_step=config.train.batch_tokens)
        if self.samples_log is not None:
            numbers = feed.sample_numbers(progress.samples)
            places = [feed.stream.window(n) for n in numbers]
            self.samples_log.add(progress.step + 1, stage.index, numbers, places)
        progress.step += 1
        progress.samples += stage.windows_per_step
        progress.tokens += config.train.batch_tokens
        if stage_at(self.stages, progress.step) != stage:
            progress.stage, progress.samples = progress.stage + 1, 0
            self.say(str(self.stages[progress.stage]))
        return StepResult(loss, norm, due > 0, stop > 0)

    samples_log: SampleLog | None = None

    def _feed(self) -> Feed:
        """What this rank reads in the stage of the next step; the reader of an earlier one is closed."""
        stage = self.stages[self.progress.stage]
        if self.feed is None or self.feed.stage != stage:
            if self.feed is not None:
                self.feed.close()
            self.feed = Feed(
                self.train_windows[stage.seq_len], stage, self.config, self.meshes[stage.sequence], self.source
            )
        return self.feed

    def _agreed_stop(self) -> bool:
        """Some rank was asked to stop. Every rank must call."""
        return self.mesh.max(float(self.request.reason is not None)) > 0

    def _nonfinite(self, loss: float, norm: float, feed: Feed) -> None:
        samples, step = feed.sample_numbers(self.progress.samples), self.progress.step + 1
        report = write_report(
            self.run.path, rank=self.mesh.rank, step=step, samples=samples, loss=loss, norms=layer_norms(self.model)
        )
        what = (
            f"step {step}: loss {loss}, gradient norm {norm}, samples {self.progress.samples} to "
            f"{self.progress.samples + feed.stage.windows_per_step - 1}; norms by layer in {report.parent}"
        )
        if self.config.train.nonfinite == "stop":
            raise TrainingError(
                f"{what}. The weights are those of step {step - 1}; lower optim.lr, or set train.nonfinite='skip' to leave "
                "such steps out."
            )
        self.say(f"skipped a step that is not finite: {what}")

    def _is_bad(self, result: StepResult, metrics: Metrics) -> bool:
        """A loss spike: said, and undone if train.spike = 'rewind'."""
        mode = self.config.train.spike
        if mode == "off" or not self.spikes.is_spike(result.loss):
            return False
        step = self.progress.step
        self.say(f"loss spike at step {step}: {result.loss:.5f} nats per token")
        metrics.event("spike", step, loss=result.loss)
        if mode == "log":
            return False
        self._rewinds += 1
        if self._rewinds > MOST_REWINDS:
            raise TrainingError(
                f"step {step}: the loss spiked {self._rewinds} times since the last checkpoint; lower optim.lr."
            )
        consumed, stage = self.progress.samples, self.progress.stage
        self.keeper.wait()
        if not self.resume():
            raise TrainingError(f"step {step}: the loss spiked before the first checkpoint; lower optim.lr.")
        if self.progress.stage == stage:
            self.progress.samples = consumed  # what was read since the checkpoint is left out
        metrics.rewind(self.progress.step)
        if self.samples_log is not None:
            self.samples_log.rewind(self.progress.step)
        return True

    def evaluate(self, metrics: Metrics) -> Evaluation:
        """On windows of data.seq_len, in the layout of the last stage; with averaged weights too, if there are any."""
        stage = self.stages[-1]

        def stop() -> bool:
            self.watchdog.beat(self.progress.step, "eval")
            return self._agreed_stop()

        def run(split: str) -> Evaluation:
            found = evaluate(
                self.model, self.valid, self.config, self.meshes[stage.sequence], self.source,
                objective=self.backend.objective, stop=stop,
            )  # fmt: skip
            metrics.write(found.line(self.progress.step, self.progress.tokens) | {"split": split})
            return found

        evaluation = run("valid")
        if self.ema is not None:
            with self.ema.applied(self.model):
                run("valid_ema")
        return evaluation

    def _log(self, metrics: Metrics, result: StepResult, tokens_per_second: float) -> None:
        memory = int(self.mesh.max(peak_memory_bytes(self.mesh.device)))
        metrics.write(
            {
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "loss": result.loss,
                "bits_per_token": bits(result.loss),
                "lr": self.backend.rate,
                "grad_norm": result.grad_norm,
                "tokens_per_second": tokens_per_second,
                "peak_memory_bytes": memory,
                "seconds": self.progress.seconds,
                **self._mfu.figures(tokens_per_second, self._feed().stage.seq_len),
            }
        )

    def say(self, text: str) -> None:
        """To people, once."""
        if self.mesh.rank == 0:
            print(text, flush=True)

    def close(self) -> None:
        """Threads, files and what must not outlive the process group."""
        if self.feed is not None:
            self.feed.close()
        if self.samples_log is not None:
            self.samples_log.close()
        self.profiler.close()
        self.watchdog.close()
        self.keeper.close()
        self.backend.close()


def train(loaded: Loaded, source: Source, mesh: Mesh, *, allow_changes: tuple[str, ...] = ()) -> Evaluation:
    """Train, or go on with, the run of a config; returns the evaluation of its last step.

    Raises InputError for settings that do not fit the data or the run, TrainingError if training cannot go on, Preempted if
    the run was asked to stop and has saved.
    """
    config = loaded.config
    run = RunDirectory(config.run_dir)
    with StopRequest(config.ckpt.on_signal, run.path / "stop") as stop:
        trainer = Trainer(loaded, source, mesh, stop)
        metrics = Metrics([])
        try:
            run.check_resumable(loaded, allow_changes)
            if not trainer.resume():
                trainer.begin()
            check_stages(config, trainer.meshes, mesh)
            if mesh.rank == 0:
                run.write(loaded, source.content_hash, mesh_record(mesh, config.parallel.backend))
                keep_tokenizer(source, run.path)
            mesh.barrier()
            total, step = config.total_steps, trainer.progress.step
            if step >= total:
                trainer.say(f"the run is complete at step {step}; raise train.steps or train.tokens to go on")
            if mesh.rank == 0:
                metrics = Metrics.open(
                    run.path,
                    total_steps=total,
                    step=step,
                    tensorboard=config.log.tensorboard,
                    wandb=WandbRun.of(config),
                )
            if config.log.samples:
                trainer.samples_log = SampleLog(run.path, mesh.rank, step=step, num_ranks=mesh.size)
            trainer.watchdog.start()
            return trainer.train(metrics)
        finally:
            metrics.close()
            trainer.close()
