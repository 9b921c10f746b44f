"""Saves a run, and takes it up again: weights, moments, averages, random states, and where the run stands."""

import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from seqengine.backends.backend import Backend
from seqengine.checkpoint.reading import TensorReader
from seqengine.checkpoint.restore import find_checkpoint
from seqengine.checkpoint.state import Progress, Record, restore_rng, rng_tensors
from seqengine.checkpoint.store import CheckpointStore, Found
from seqengine.config.run import RunConfig
from seqengine.data.stream import StreamState
from seqengine.ema import Ema
from seqengine.errors import InputError
from seqengine.meaning import check_beginning
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget, RunDirectory, mesh_record, versions
from seqengine.spikes import SpikeDetector

HEAD = "model.head."
PREFIXES = ("model.", "optim.", "ema.")
"""Of tensors that a run must find in its checkpoint, and must not leave there."""


class Keeper:
    """The checkpoints of a run, on the rank's side. Every rank calls every method."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, backend: Backend, ema: Ema | None, spikes: SpikeDetector, data_hash: str
    ) -> None:
        self.config, self.mesh, self.backend = config, mesh, backend
        self.ema, self.spikes, self.data_hash = ema, spikes, data_hash
        section = config.ckpt
        self.store = CheckpointStore(
            RunDirectory(config.run_dir).checkpoints,
            mesh,
            keep=section.keep,
            keep_every=section.keep_every,
            asynchronous=section.is_async,
        )
        self.saved_step = -1
        """The step of the newest checkpoint, on its way to the disk or there."""
        self._last_save = time.monotonic()

    @property
    def mesh_record(self) -> dict[str, int | str]:
        return mesh_record(self.mesh, self.config.parallel.backend)

    def is_due(self, next_step: int) -> bool:
        """After step number `next_step` it is time to save. Ranks' clocks differ: one rank decides for all."""
        every = self.config.ckpt.every
        if isinstance(every, int):
            return next_step % every == 0
        return time.monotonic() - self._last_save >= every

    def save(self, progress: Progress, stream: StreamState) -> None:
        """Write a checkpoint, or copy it and write in the background. Raises CheckpointError on every rank."""
        record = Record(
            progress=replace(progress),
            stream=stream.to_dict(),
            mesh=self.mesh_record,
            data_hash=self.data_hash,
            versions=versions(),
            extra={"spikes": self.spikes.state()},
        )
        self.store.save(self._tensors(with_rng=True), record)
        self.saved_step = progress.step
        self._last_save = time.monotonic()

    def restore(self) -> Found | None:
        """Fill everything from the newest whole checkpoint; None if there is none.

        Raises InputError if it is of other data or of another model, or if none is whole.
        """
        found = self.store.newest()
        if found is None:
            return None
        record = found.record
        if record.data_hash not in ("", self.data_hash):  # "" of imported weights: no data yet
            raise InputError(
                f"data: {found.directory} was trained on other data (content {record.data_hash[:12]}); got "
                f"{self.data_hash[:12]}. Give the same data, or start another run (run.dir=...)."
            )
        is_exact = record.was_on(self.mesh_record)
        tensors = self._tensors(with_rng=is_exact)
        self.store.load(found.directory, tensors, prefixes=PREFIXES, dealt_out=self.backend.deals_out)
        self.backend.loaded(tensors)
        if is_exact:
            restore_rng(tensors, self.mesh.rank, self.mesh.device)
        if "spikes" in record.extra:
            self.spikes.restore(record.extra["spikes"])
        self.saved_step = record.progress.step
        return found

    def begin_from(self, source: Path) -> str:
        """Fill the weights from another run or its checkpoint; moments and averages begin anew. Returns what was done.

        Raises InputError if it is damaged, there is none, or it is not of this model but for its head: of other tensors, or of
        the same ones that meant something else.
        """
        target = CheckpointTarget.find(source)
        directory = find_checkpoint(CheckpointStore(target.run.checkpoints, self.mesh), target).directory
        there = TensorReader(directory).shapes
        tensors = self.backend.tensors()
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        fits = {name: tensor for name, tensor in mine.items() if there.get(name) == tensor.shape}
        theirs = {name for name in there if name.startswith("model.")}
        others = sorted(name for name in (mine.keys() ^ theirs) | (mine.keys() - fits.keys()) if name not in fits)
        if self.backend.deals_out:
            others = [name for name in others if name in mine]
        wrong = [name for name in others if not name.startswith(HEAD)]
        if wrong:
            raise InputError(
                f"train.init_from: {directory} must be of the same [model] but for its head; it differs in "
                f"{', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}."
            )
        check_beginning(target, self.config.model)
        self.store.load(directory, fits, prefixes=())
        self.backend.loaded(tensors)
        if self.ema is not None:
            self.ema.restart(self.backend.model)
        return f"begins with the weights of {directory}" + (f", without {', '.join(others)}" if others else "")

    def _tensors(self, *, with_rng: bool) -> dict[str, Tensor]:
        tensors = self.backend.tensors()
        if self.ema is not None:
            tensors |= self.ema.tensors()
        return tensors | (rng_tensors(self.mesh.rank, self.mesh.device) if with_rng else {})

    def wait(self) -> None:
        """Until the newest checkpoint is safe. Raises CheckpointError on every rank if it could not be written."""
        self.store.wait()

    def close(self) -> None:
        self.store.close()
