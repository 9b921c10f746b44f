"""Sequences with a class as memory-mapped files, made once and shared by every process of a node.

    <cache>/<name>-<key>/tokens.bin    uint8 or uint16, the sequences end to end
    <cache>/<name>-<key>/bounds.bin    int64, the first token of each sequence, and the number of all tokens
    <cache>/<name>-<key>/classes.bin   uint16, the class of each
    <cache>/<name>-<key>/index.json    format, what it was made from, counts, hash

The key is a hash of the paths, sizes and modification times of the files, and of how they are read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqengine.data.cache import MappedArray, build, digest, writable, write_json
from seqengine.data.contract import IntArray

FORMAT = 1
TOKENS_FILE, BOUNDS_FILE, CLASSES_FILE, INDEX_FILE = "tokens.bin", "bounds.bin", "classes.bin", "index.json"
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A sequence to be packed."""

    label: int
    ids: IntArray


@dataclass(frozen=True)
class PackedSequences:
    """Packed sequences on disk; see `seqengine.data.labelled.Sequences`. Cheap to pickle and safe to fork."""

    directory: Path
    num_sequences: int
    num_tokens: int
    dtype: str
    content_hash: str
    """sha256, in hex, of tokens, bounds and classes: equal for equal data, wherever they lie."""
    _tokens: MappedArray = field(init=False, repr=False, compare=False)
    _bounds: MappedArray = field(init=False, repr=False, compare=False)
    _classes: MappedArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tokens", MappedArray(self.directory / TOKENS_FILE, self.dtype))
        object.__setattr__(self, "_bounds", MappedArray(self.directory / BOUNDS_FILE, "<i8"))
        object.__setattr__(self, "_classes", MappedArray(self.directory / CLASSES_FILE, "<u2"))

    def __len__(self) -> int:
        return self.num_sequences

    def ids(self, index: int, most: int) -> IntArray:
        """The first `most` tokens of a sequence, or all of them. Reads no others."""
        bounds = self._bounds.array()
        begin, end = int(bounds[index]), int(bounds[index + 1])
        found: IntArray = self._tokens.array()[begin : min(end, begin + most)]
        return found

    def label(self, index: int) -> int:
        """The class of a sequence."""
        return int(self._classes.array()[index])


def pack_sequences(
    cache: Path, name: str, how: dict[str, Any], rows: Callable[[], Iterator[Row]], *, dtype: str
) -> PackedSequences:
    """The sequences that `rows` yields, from the cache or packed now; safe to call in many processes at once.

    how: what makes a pack of them the same pack. Memory: one sequence, and the bounds.
    Raises: what `rows` raises, and InputError for a cache that cannot be written. A failure leaves nothing behind.
    """
    identity = {"format": FORMAT, "dtype": dtype, **how}

    def write(directory: Path) -> None:
        _write(directory, rows(), identity)
        _log.info("packed %s", name)

    with writable(cache):
        return build(cache, f"{name[:80]}-{digest(identity)[:12]}", load=_load, write=write, what=name)


def files_identity(paths: list[Path]) -> str:
    """A hash of the files' paths, sizes and modification times, in their order."""
    found = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        found.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _write(directory: Path, rows: Iterator[Row], identity: dict[str, Any]) -> None:
    """Fills `directory` with the files of a pack."""
    bounds, classes = [0], []
    tokens_hash = hashlib.sha256()
    with (directory / TOKENS_FILE).open("wb") as file:
        for row in rows:
            data = row.ids.astype(identity["dtype"], copy=False).tobytes()
            file.write(data)
            tokens_hash.update(data)
            bounds.append(bounds[-1] + len(row.ids))
            classes.append(row.label)
        file.flush()
        os.fsync(file.fileno())
    parts = [tokens_hash.hexdigest()]
    for name, values in (
        (BOUNDS_FILE, np.array(bounds, dtype="<i8")),
        (CLASSES_FILE, np.array(classes, dtype="<u2")),
    ):
        with (directory / name).open("wb") as file:
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        parts.append(hashlib.sha256(values.tobytes()).hexdigest())
    content_hash = digest(parts)
    counts = {"num_sequences": len(classes), "num_tokens": bounds[-1]}
    write_json(directory / INDEX_FILE, {**identity, **counts, "content_hash": content_hash})


def _load(directory: Path) -> PackedSequences | None:
    """The pack in `directory`, or None if there is none or it is damaged."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        count, num_tokens, dtype = int(index["num_sequences"]), int(index["num_tokens"]), str(index["dtype"])
        sizes = [(directory / name).stat().st_size for name in (TOKENS_FILE, BOUNDS_FILE, CLASSES_FILE)]
        packed = PackedSequences(directory, count, num_tokens, dtype, str(index["content_hash"]))
        wanted = [num_tokens * np.dtype(dtype).itemsize, (count + 1) * 8, count * 2]
        return packed if count and sizes == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
