"""Sharded checkpoints in a run's `ckpt` directory: written aside, hashed, renamed; verified before they are read.

    ckpt/step-00000300/   __R_N.distcp (tensors, written by rank R)  .metadata  engine.json  MANIFEST.sha256
    ckpt/latest           the newest one's name

torch.distributed.checkpoint reads them on any number of ranks, but does not notice damaged files: the manifest does.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from seqengine.checkpoint.manifest import MANIFEST, find_damage, read_manifest, sha256, sync, write_manifest
from seqengine.checkpoint.state import RECORD, Record, model_tensors, optimizer_tensors, restore_rng, rng_tensors
from seqengine.errors import InputError
from seqengine.parallel.comm import gather_objects
from seqengine.parallel.mesh import Mesh


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


@dataclass(frozen=True)
class Loaded:
    """What was read, and the damaged newer checkpoints that were passed over."""

    directory: Path
    record: Record
    same_mesh: bool
    skipped: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run. Every rank calls every method."""

    def __init__(self, directory: Path, mesh: Mesh, *, keep: int = 3) -> None:
        self.directory, self.mesh, self.keep = directory, mesh, keep

    def names(self) -> list[str]:
        """Finished checkpoints, oldest first."""
        return sorted(p.name for p in self.directory.glob("step-????????") if p.is_dir())

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: Record) -> Path:
        """Write, hash, sync, rename, point `latest` to it, and only then prune. A killed save leaves the older ones whole.

        Raises CheckpointError on every rank if it failed on any.
        """
        final = self.directory / f"step-{record.progress.step:08d}"
        aside = self.directory / f"{final.name}.tmp"
        tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
        tensors |= rng_tensors(self.mesh.rank, self.mesh.device)
        with self._together("make a directory for the checkpoint"):
            if self.mesh.rank == 0:
                for stale in self.directory.glob("*.tmp"):
                    shutil.rmtree(stale)
                aside.mkdir(parents=True)
        with self._together("write the checkpoint's tensors"), _quiet():
            writer = FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
            save_tensors(cast("dict[str, object]", tensors), storage_writer=writer, no_dist=self.mesh.world is None)
        hashes: dict[str, str] = {}
        with self._together("hash the checkpoint's files"):
            hashes = {p.name: sha256(p) for p in aside.glob(f"__{self.mesh.rank}_*.distcp")}
        everyone = cast("list[dict[str, str]]", gather_objects(hashes, self.mesh.world))
        with self._together("finish the checkpoint"):
            if self.mesh.rank == 0:
                self._finish(aside, final, record, {k: v for h in everyone for k, v in h.items()})
        return final

    def _finish(self, aside: Path, final: Path, record: Record, hashes: dict[str, str]) -> None:
        record.write(aside)
        for name in (".metadata", RECORD):
            hashes[name] = sha256(aside / name)
        write_manifest(aside, hashes)
        for name in (*hashes, MANIFEST):
            sync(aside / name)
        sync(aside)
        if final.exists():
            shutil.rmtree(final)  # a damaged one of the same step, passed over when this run resumed
        aside.rename(final)
        pointer = self.directory / "latest.tmp-file"
        pointer.write_text(final.name + "\n")
        sync(pointer)
        pointer.replace(self.directory / "latest")
        sync(self.directory)
        for name in self.names()[: -self.keep]:
            shutil.rmtree(self.directory / name)

    def load_latest(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Loaded | None:
        """Read the newest checkpoint whose files are as they were written; None if there is none at all.

        Raises InputError if there are checkpoints but every one is damaged.
        """
        skipped: list[str] = []
        for name in reversed(self.names()):
            damage = self.damage(self.directory / name)
            if not damage:
                return self.load(self.directory / name, model, optimizer, tuple(skipped))
            skipped.append(f"{name}: {'; '.join(damage)}")
        if skipped:
            raise InputError(
                f"{self.directory}: no checkpoint is whole: {' | '.join(skipped)}. Restore one, or start anew."
            )
        return None

    def damage(self, directory: Path) -> list[str]:
        """What is wrong with a checkpoint, the same on every rank; the files are shared out for hashing."""
        found: list[str] = []
        try:
            hashes = read_manifest(directory)
        except (ValueError, OSError) as error:
            found = [str(error)]
        else:
            mine = sorted(hashes)[self.mesh.rank :: self.mesh.size]
            found = find_damage(directory, mine, hashes)
        everyone = cast("list[list[str]]", gather_objects(found, self.mesh.world))
        return sorted({problem for problems in everyone for problem in problems})

    def load(
        self, directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, skipped: tuple[str, ...] = ()
    ) -> Loaded:
        """Fill the model (and the optimiser) in place from a verified checkpoint, whatever mesh wrote it.

        On the mesh that wrote it the ranks' random states are restored too, and the run goes on bit for bit.
        """
        record = Record.read(directory)
        same_mesh = record.mesh == mesh_record(self.mesh)
        tensors = model_tensors(model)
        if optimizer is not None:
            tensors |= optimizer_tensors(model, optimizer)
            if same_mesh:
                tensors |= rng_tensors(self.mesh.rank, self.mesh.device)
        with self._together(f"read {directory}"), _quiet():
            reader = FileSystemReader(directory)
            load_tensors(cast("dict[str, object]", tensors), storage_reader=reader, no_dist=self.mesh.world is None)
        if optimizer is not None and same_mesh:
            restore_rng(tensors, self.mesh.rank, self.mesh.device)
        return Loaded(directory, record, same_mesh, skipped)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Run a part on every rank; if it fails on one, every rank raises, and none waits for the others for ever."""
        failure: BaseException | None = None
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  torch's CheckpointException is no Exception
            failure = error
        words = None if failure is None else f"rank {self.mesh.rank}: {type(failure).__name__}: {failure}"
        problems = [str(w) for w in gather_objects(words, self.mesh.world) if w is not None]
        if problems:
            raise CheckpointError(f"could not {what}: {'; '.join(problems)}") from failure


def mesh_record(mesh: Mesh) -> dict[str, int]:
    """The mesh as saved: ranks by axis."""
    return {"replicate": mesh.num_replicas, "sequence": mesh.sequence_size}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own deprecations, and that a single process needs no group; neither is the user's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
