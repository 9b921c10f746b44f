"""Sharded checkpoints in a run's `ckpt` directory: written aside, hashed, read back, renamed; verified before they are read.

    ckpt/step-00000300/   __R_N.distcp (tensors, written by rank R)  .metadata  engine.json  MANIFEST.sha256
    ckpt/latest           the newest one's name

torch.distributed.checkpoint's format can be read on any number of ranks, but does not notice damaged files: the manifest does.
An asynchronous save copies the tensors to the CPU and writes them in a thread, with messages in a group of its own.
"""

import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from seqengine.checkpoint.manifest import MANIFEST, find_damage, forget_cached, manifest_text, read_manifest, sync
from seqengine.checkpoint.reading import METADATA, TensorReader
from seqengine.checkpoint.state import RECORD, Record
from seqengine.checkpoint.team import CheckpointError, Team
from seqengine.checkpoint.writing import ShardWriter, StagingArea, write_hashed
from seqengine.errors import InputError
from seqengine.parallel.comm import gather_objects
from seqengine.parallel.mesh import Mesh, free_group

__all__ = ["CheckpointError", "CheckpointStore", "Found"]
NAME = re.compile(r"step-(\d{8,})")
ASIDE, LATEST = ".tmp", "latest"
POINTER = LATEST + ASIDE


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified, and the damaged newer ones that were passed over."""

    directory: Path
    record: Record
    skipped: tuple[str, ...] = ()


@dataclass
class _Flight:
    """A save in a thread."""

    thread: threading.Thread | None = None
    directory: Path | None = None
    failure: BaseException | None = None

    def result(self) -> Path | None:
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure
        return self.directory


class CheckpointStore:
    """The checkpoints of one run. Every rank calls every method, in the same order.

    keep:         so many of the newest are kept.
    keep_every:   in tokens: the first checkpoint at or after each multiple of it is kept for ever.
    asynchronous: `save` returns once the tensors are copied to the CPU; one save is under way at a time.
    """

    def __init__(
        self,
        directory: Path,
        mesh: Mesh,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep, keep_every: must be at least 1; got {keep}, {keep_every}")
        self.directory, self.mesh = Path(directory), mesh
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self._side = mesh.side_group() if asynchronous else None
        self._team = Team(self.directory, mesh.rank, mesh.world)
        self._staging = StagingArea()
        self._flight: _Flight | None = None

    def names(self) -> list[str]:
        """Finished checkpoints, oldest first."""
        found = [p.name for p in self.directory.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=_step_of)

    def save(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Write, hash, sync, read back, rename, point `latest` to it, and only then prune. A killed save leaves the older ones.

        tensors: by name, plain ones (the same on all ranks that have the name) or DTensors.
        record:  as it is now; `progress` may change afterwards.
        Raises:  CheckpointError on every rank if it failed on any, naming the directory; nothing half-written is left. If
                 asynchronous, that of the save before; this one's comes from the next `save`, `wait` or `close`.
        """
        self.wait()
        step, text = record.progress.step, record.text()
        writer = ShardWriter.plan(tensors, self._team, _name_of(step))
        if not self.asynchronous:
            self._flight = _Flight(directory=self._write(writer, step, text, self._team))
            return
        self._team.do("copy the tensors to the CPU", lambda: writer.stage(self._staging, self.mesh.device))
        flight, team = _Flight(), replace(self._team, group=self._side)

        def work() -> None:
            try:
                flight.directory = self._write(writer, step, text, team)
            except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
                flight.failure = error

        flight.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._flight = flight
        flight.thread.start()

    def wait(self) -> Path | None:
        """Until the last save is durable: its directory; None if there was none since the last `wait`.

        Raises CheckpointError on every rank if it failed on any.
        """
        flight, self._flight = self._flight, None
        return None if flight is None else flight.result()

    def close(self) -> None:
        """Wait for the save under way, and free the group. Raises as `wait`."""
        try:
            self.wait()
        finally:
            side, self._side = self._side, None
            free_group(side)

    def _write(self, writer: ShardWriter, step: int, text: str, team: Team) -> Path:
        final = self.directory / _name_of(step)
        aside = final.with_name(final.name + ASIDE)
        try:
            team.lead("make a directory for the checkpoint", lambda: self._make(aside))
            parts = team.do("write the checkpoint's tensors", lambda: writer.write(aside))
            team.lead("finish the checkpoint", lambda: _finish(writer.finish(aside, parts), aside, text))
            team.do("read the checkpoint back", lambda: _read_back(aside, team.rank, self.mesh.size))
            team.lead("put the checkpoint in place", lambda: self._publish(aside, final))
        except CheckpointError:
            if team.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                with suppress(OSError):  # the failure is told; the next save clears what is left
                    (self.directory / POINTER).unlink(missing_ok=True)
            raise
        team.lead("remove older checkpoints", lambda: self._prune(step))
        return final

    def _make(self, aside: Path) -> None:
        for stale in self.directory.glob("*" + ASIDE):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        aside.mkdir(parents=True)

    def _publish(self, aside: Path, final: Path) -> None:
        pointer = self.directory / POINTER
        write_hashed(pointer, final.name + "\n")  # before the renames, so that a full disk shows here
        old = final.with_name(f"{final.name}.old{ASIDE}")
        if final.exists():
            final.rename(old)  # of the same step, damaged, passed over when this run resumed
        try:
            aside.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        pointer.replace(self.directory / LATEST)
        sync(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, step: int) -> None:
        """Remove what is not kept, and later steps: they are damaged, or of a history that this run has left."""
        names = [name for name in self.names() if _step_of(name) <= step]
        kept = {*names[-self.keep :], *self._milestones(names)}
        for name in self.names():
            if name not in kept:
                going = self.directory / f"{name}.old{ASIDE}"
                (self.directory / name).rename(going)  # at once: never half a checkpoint under its name
                shutil.rmtree(going)

    def _milestones(self, names: list[str]) -> set[str]:
        """The first checkpoint at or after each multiple of `keep_every` tokens: none of them was ever removed."""
        found: dict[int, str] = {}
        if self.keep_every is not None:
            for name in names:
                try:
                    tokens = Record.read(self.directory / name).progress.tokens
                except InputError:
                    continue  # damaged
                found.setdefault(tokens // self.keep_every, name)
        return {name for multiple, name in found.items() if multiple > 0}

    def damage(self, directory: Path) -> list[str]:
        """What is wrong with a checkpoint, the same on every rank; the files are shared out for hashing."""
        found: list[str] = []
        try:
            hashes = read_manifest(directory, (METADATA, RECORD))
        except (ValueError, OSError) as error:
            found = [str(error)]
        else:
            found = find_damage(directory, sorted(hashes)[self.mesh.rank :: self.mesh.size], hashes)
            if not found and self.mesh.rank == 0:
                found = _contradictions(directory)
        everyone = cast("list[list[str]]", gather_objects(found, self.mesh.world))
        return sorted({problem for problems in everyone for problem in problems})

    def newest(self) -> Found | None:
        """The newest checkpoint whose files are as they were written; None if there is none at all.

        Raises InputError if there are checkpoints but every one is damaged: it names every bad file.
        """
        skipped: list[str] = []
        for name in reversed(self.names()):
            damage = self.damage(self.directory / name)
            if not damage:
                self._repair_latest(name, known=not skipped)
                return self._found(self.directory / name, tuple(skipped))
            skipped.append(f"{name}: {'; '.join(damage)}")
        if skipped:
            raise InputError(
                f"{self.directory}: no checkpoint is whole: {' | '.join(skipped)}. Restore one, or start anew."
            )
        return None

    def _repair_latest(self, name: str, *, known: bool) -> None:
        """A save that was killed between its two renames left `latest` one step behind."""
        pointer = self.directory / LATEST
        if self.mesh.rank == 0 and known and pointer.is_file() and pointer.read_text() != name + "\n":
            try:
                write_hashed(self.directory / POINTER, name + "\n")
                (self.directory / POINTER).replace(pointer)
            except OSError:
                return  # a directory that can only be read; `latest` is for people, nothing here reads it

    def verified(self, directory: Path) -> Found:
        """One checkpoint. Raises InputError naming every bad file if it is damaged."""
        damage = self.damage(directory)
        if damage:
            raise InputError(f"{directory}: must be as it was saved; {'; '.join(damage)}. Use another checkpoint.")
        return self._found(directory, ())

    def _found(self, directory: Path, skipped: tuple[str, ...]) -> Found:
        return Found(directory, Record.read(directory), skipped)

    def load(
        self, directory: Path, tensors: Mapping[str, Tensor], *, prefixes: Sequence[str], dealt_out: bool = False
    ) -> None:
        """Fill tensors in place from a verified checkpoint, whatever mesh wrote it.

        tensors:  plain ones or DTensors; each must be in the checkpoint, with the same shape. Other dtypes are converted.
        prefixes: every tensor of the checkpoint whose name begins so must be asked for (`rng.` of other ranks aside), by
                  every rank or, dealt_out, by some rank.
        Raises:   InputError on every rank if that does not hold on one, before anything is read. CheckpointError if reading
                  fails.
        """
        readers: list[TensorReader] = []
        elsewhere: list[set[str]] = [set()]
        if dealt_out:
            elsewhere = cast("list[set[str]]", gather_objects(set(tensors), self.mesh.world))

        def compare() -> list[str]:
            readers.append(TensorReader(directory))
            others = set[str]().union(*elsewhere)
            return readers[0].mismatches(tensors, prefixes=prefixes, rank=self.mesh.rank, others=others)

        team = replace(self._team, directory=directory)
        problems = sorted(
            {problem for found in team.do("read what the checkpoint holds", compare) for problem in found}
        )
        if problems:
            raise InputError(
                f"{directory}: must hold the tensors that are asked for, and no others; {'; '.join(problems)}. Use the "
                "[model] and [optim] of the run that wrote it (config.toml in its directory)."
            )
        team.do("read the checkpoint's tensors", lambda: readers[0].fill(tensors))


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _finish(hashes: dict[str, str], aside: Path, record: str) -> None:
    hashes[RECORD] = write_hashed(aside / RECORD, record)
    write_hashed(aside / MANIFEST, manifest_text(hashes))
    sync(aside)


def _read_back(aside: Path, rank: int, size: int) -> None:
    """Compare this rank's share of the files with what was to be written. Raises OSError if they differ."""
    hashes = read_manifest(aside, (METADATA, RECORD))
    mine = sorted(hashes)[rank::size]
    for name in mine:
        forget_cached(aside / name)
    damage = find_damage(aside, mine, hashes)
    if damage:
        raise OSError(f"the disk did not keep what was written: {'; '.join(damage)}")


def _contradictions(directory: Path) -> list[str]:
    """What is wrong with a checkpoint whose files have the hashes of its manifest."""
    found = []
    try:
        TensorReader(directory)
    except (ValueError, OSError) as error:
        found.append(str(error))
    named = NAME.fullmatch(directory.name)
    try:
        step = Record.read(directory).progress.step
    except InputError:
        return found  # of another format, which its reader tells
    if named is not None and step != int(named[1]):
        found.append(f"{RECORD} is of step {step}")
    return found
