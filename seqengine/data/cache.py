"""Entries of data.cache: directories that are there whole or not at all, made once for all processes of a node.

An entry is written in a hidden directory and renamed, under a lock that the other processes wait for. Its name ends with a hash
of what it was made from, so that changed sources make another entry.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from seqengine.errors import InputError

Entry = TypeVar("Entry")
_log = logging.getLogger(__name__)


def digest(identity: Mapping[str, Any] | Sequence[Any]) -> str:
    """sha256, in hex, of what makes an entry the same entry."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def build(
    cache: Path, name: str, *, load: Callable[[Path], Entry | None], write: Callable[[Path], None], what: str
) -> Entry:
    """The entry `name` of the cache, made now if it is not there or damaged.

    load: the entry in a directory, or None if it is not whole. write: fills an empty directory. what: for messages.
    Raises what `write` raises; a failure leaves nothing behind.
    """
    target = cache / name
    ready = load(target)
    if ready is not None:
        return ready
    with exclusive(cache, name):
        ready = load(target)  # another process may have made it while this one waited
        if ready is not None:
            return ready
        if target.exists():
            _log.warning("packed data %s is damaged; packing %s again", target, what)
        partial = cache / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            write(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        ready = load(target)
        assert ready is not None, f"build: {target} must be readable once written"
        return ready


@contextmanager
def writable(cache: Path) -> Iterator[None]:
    """What the file system refuses inside is told as a problem of data.cache."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data.cache: the directory {cache} must be writable and have room for the data; got: {error}. "
            "Set data.cache to another directory."
        ) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Written and on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class MappedArray:
    """A file of numbers, mapped at the first call in each process. Cheap to pickle, safe to fork and to share by threads."""

    path: Path
    dtype: str
    _mapped: dict[int, npt.NDArray[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def array(self) -> npt.NDArray[Any]:
        """All of it, read-only."""
        pid = os.getpid()
        mapped = self._mapped.get(pid)
        if mapped is None:
            mapped = np.memmap(self.path, dtype=np.dtype(self.dtype), mode="r")
            self._mapped.clear()
            self._mapped[pid] = mapped
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


@contextmanager
def exclusive(cache: Path, name: str) -> Iterator[None]:
    """Holds the lock on `name` in the cache, made if need be; after a failure removes what it made and left empty."""
    made = _missing(cache)
    path = cache / f".{name}.lock"
    try:
        handle = _lock(cache, path)
        try:
            yield
        finally:
            # Removed while held: a process that waits for it finds another file, or none, at its path and tries again.
            path.unlink(missing_ok=True)
            os.close(handle)
    except BaseException:
        _remove_empty(made)
        raise


def _lock(cache: Path, path: Path) -> int:
    """An open file that holds the exclusive lock at `path`."""
    while True:
        cache.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process failed and removed the cache that it had made
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """The open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _missing(directory: Path) -> list[Path]:
    """`directory` and its parents that do not exist, deepest first."""
    return [d for d in (directory, *directory.parents) if not d.exists()]


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:  # not empty, or gone: another process uses the cache
            return
