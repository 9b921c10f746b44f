"""A rank's part of a checkpoint: planned with the other ranks, staged on the CPU if asked for, written and hashed.

The planners and the file format are those of torch.distributed.checkpoint; the messages between ranks are ours, so that a
save can use any group from any thread.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from seqengine.checkpoint.team import CheckpointError, Team

COPY_AHEAD_BYTES = 10_000_000
"""Of tensors on a GPU that go to the CPU while earlier ones are written."""


class HashingStream(io.BufferedWriter):
    """A file that hashes what it is given to write, and is on the disk once it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hash = hashlib.sha256()
        self.failure: OSError | None = None
        """Why the disk would not take it: torch's own writer tells something else then."""

    def write(self, data: Any, /) -> int:
        """All of `data`. What the disk makes of it is for a reader to find out."""
        try:
            size = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        self._hash.update(data)
        return size

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                os.fsync(self.fileno())
            finally:
                super().close()

    @property
    def digest(self) -> str:
        """sha256 of everything written, in hexadecimal."""
        return self._hash.hexdigest()


class HashingFileSystem(FileSystem):
    """Where torch writes its files: a hash is kept of each, by name."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"mode: must be 'wb'; got {mode!r}")
        with HashingStream(Path(path)) as stream:
            try:
                yield stream
            except RuntimeError:
                if stream.failure is not None:
                    raise stream.failure from None
                raise
        self.hashes[Path(path).name] = stream.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.hashes[Path(new_path).name] = self.hashes.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """torch's writer over a hashing file system. The metadata do not name the machine's paths."""

    def __init__(self, directory: Path, copy_ahead: int) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=False, per_thread_copy_ahead=copy_ahead)
        self.fs = self.hashing = HashingFileSystem()
        self.set_up_storage_writer(True)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Planner(DefaultSavePlanner):
    """Flat names; data from the staged copies where there are some."""

    def __init__(self, tensors: Mapping[str, Tensor], is_coordinator: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: dict[MetadataIndex, Tensor] = {}
        self.set_up_planner(cast("dict[str, Any]", dict(tensors)), is_coordinator=is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Any:
        staged = self.staged.get(index)
        return super().lookup_object(index) if staged is None else staged

    def keep_staged_only(self) -> None:
        """Let go of the tensors themselves."""
        self.state_dict = {}


@dataclass
class Part:
    """What a rank wrote: for rank 0, which writes down where every tensor is."""

    hashes: dict[str, str]
    results: list[WriteResult]


@dataclass
class StagingArea:
    """Memory for copies on the CPU, kept from one save to the next; page-locked if the tensors are on a GPU."""

    buffers: dict[MetadataIndex, Tensor] = field(default_factory=dict)

    def copy(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        """Under way if `tensor` is on a GPU: `finish` waits for it."""
        buffer = self.buffers.get(index)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[index] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def finish(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


class ShardWriter:
    """One checkpoint on one rank."""

    def __init__(self, planner: _Planner, plan: SavePlan, metadata: Metadata) -> None:
        self._planner, self._plan, self._metadata = planner, plan, metadata
        self._is_staged = False

    @classmethod
    def plan(cls, tensors: Mapping[str, Tensor], team: Team, name: str) -> "ShardWriter":
        """Share out what all ranks hold alike, and give each its own shards. Every rank calls, with the same name.

        Raises CheckpointError on every rank if the names differ, or the tensors do not fit together.
        """
        planner = _Planner(tensors, team.rank == 0)
        offers = team.do("plan the checkpoint", lambda: (name, planner.create_local_plan()))
        names, plans = {name for name, _ in offers}, [plan for _, plan in offers]
        if len(names) > 1:
            raise CheckpointError(
                f"{team.directory}: all ranks must save the same step; got {', '.join(sorted(names))}."
            )

        try:  # the same on every rank: a function of the plans
            everyone, metadata = planner.create_global_plan(plans)
        except (ValueError, AssertionError) as error:
            raise CheckpointError(f"{team.directory}: the ranks' tensors make no checkpoint: {error}") from None
        everyone = _Writer(team.directory, 0).prepare_global_plan(everyone)
        return cls(planner, planner.finish_plan(everyone[team.rank]), metadata)

    @torch.no_grad()
    def stage(self, area: StagingArea, device: torch.device) -> None:
        """Copy what this rank will write to the CPU: from now on the tensors may change."""
        for item in self._plan.items:
            tensor = self._planner.lookup_object(item.index)
            self._planner.staged[item.index] = area.copy(item.index, tensor.detach())
        area.finish(device)
        self._planner.keep_staged_only()
        self._is_staged = True

    def write(self, directory: Path) -> Part:
        """This rank's file, hashed while it is written, and on the disk."""
        directory.mkdir(exist_ok=True)  # a shared file system may not show it yet
        writer = _Writer(directory, 0 if self._is_staged else COPY_AHEAD_BYTES)
        with quiet():
            results = writer.write_data(self._plan, self._planner).wait()
        return Part(writer.hashing.hashes, results)

    def finish(self, directory: Path, parts: list[Part]) -> dict[str, str]:
        """Rank 0, after all have written: write where every tensor is; returns the hash of every file so far."""
        writer = _Writer(directory, 0)
        writer.finish(self._metadata, [part.results for part in parts])
        return {
            name: digest for part in (*parts, Part(writer.hashing.hashes, [])) for name, digest in part.hashes.items()
        }


def write_hashed(path: Path, text: str) -> str:
    """Write a text file to the disk; returns its hash."""
    with HashingStream(path) as stream:
        stream.write(text.encode())
    return stream.digest


@contextmanager
def quiet() -> Generator[None, None, None]:
    """torch warns of its own deprecations, which is not the user's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
