"""A genome as one memory-mapped file of token ids, made once and shared by every process of a node.

    <cache>/<stem>-<key>/tokens.bin     uint8, one byte per base, records end to end in file order
    <cache>/<stem>-<key>/index.json     format, source, records (name, offset, length), content hash

The key is a hash of the source's path, size and modification time, the treatment of lower case and the format, so a
changed file is packed anew. A pack is written in a hidden directory and renamed: it is there whole or not at all.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqengine.config.data import DataSection, SyntheticSection
from seqengine.data.fasta import read_records
from seqengine.data.synthetic import write_fasta
from seqengine.data.tokenizer import Ids, SoftMask, encode
from seqengine.errors import InputError

FORMAT = 1
TOKENS_FILE = "tokens.bin"
INDEX_FILE = "index.json"
_log = logging.getLogger(__name__)


class PackedRecord(NamedTuple):
    """A record's place in the token file: bases [offset, offset + length)."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class PackedGenome:
    """A packed genome on disk. Cheap to pickle and safe to fork: it holds a path, and no file that is read by offset."""

    directory: Path
    records: tuple[PackedRecord, ...]
    num_tokens: int
    content_hash: str
    """sha256, in hex, of the tokens and the record table: equal for equal genomes, wherever they lie."""
    _mapped: dict[int, Ids] = field(default_factory=dict, init=False, repr=False, compare=False)

    def tokens(self) -> Ids:
        """All token ids, uint8 [num_tokens], read-only; mapped at the first call in each process."""
        pid = os.getpid()
        if pid not in self._mapped:
            self._mapped.clear()
            self._mapped[pid] = np.memmap(self.directory / TOKENS_FILE, dtype=np.uint8, mode="r")
        return self._mapped[pid]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


def pack(section: DataSection) -> PackedGenome:
    """The packed genome that [data] asks for, from the cache or packed now; safe to call in many processes at once.

    A synthetic genome is written once as FASTA in the cache and then packed like any other.

    Raises: InputError for a missing or bad FASTA (see `read_records`) and for a cache that cannot be written. A failure
        leaves nothing behind.
    """
    cache = Path(section.cache).absolute()
    try:
        if section.source == "synthetic":
            return _pack_file(cache, _synthetic(cache, section.synthetic), section.soft_mask)
        if section.fasta is None:
            raise InputError("data.fasta: must name a FASTA file when data.source is 'fasta'; got nothing. Set it.")
        return _pack_file(cache, section.fasta, section.soft_mask)
    except OSError as error:
        raise InputError(
            f"data.cache: the directory {cache} must be writable and have room for the genome; got: {error}. "
            "Set data.cache to another directory."
        ) from error


def _pack_file(cache: Path, fasta: Path, soft_mask: SoftMask) -> PackedGenome:
    source, identity = _identify(fasta, soft_mask)
    target = cache / f"{_stem(source)}-{_digest(identity)[:12]}"
    ready = _load(target)
    if ready is not None:
        return ready
    with _exclusive(cache, target.name):
        ready = _load(target)  # another process may have packed it while this one waited
        if ready is not None:
            return ready
        if target.exists():
            _log.warning("packed genome %s is damaged; packing %s again", target, source)
        partial = cache / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            _write(partial, source, identity, soft_mask)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        ready = _load(target)
        assert ready is not None, f"pack: {target} must be readable once written"
        _log.info("packed %s: %d bases in %d records", source, ready.num_tokens, len(ready.records))
        return ready


def _identify(fasta: Path, soft_mask: SoftMask) -> tuple[Path, dict[str, str | int]]:
    """The file that `fasta` leads to, and what makes a pack of it the same pack."""
    try:
        source = fasta.resolve()
        state = source.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"data.fasta: must be a readable file; got {fasta} ({reason}). Correct the path.") from None
    if not source.is_file():  # a directory, or a pipe, which cannot be read twice
        raise InputError(f"data.fasta: must be a regular file; got {fasta}, which is none. Correct the path.")
    return source, {
        "format": FORMAT,
        "source": str(source),
        "source_bytes": state.st_size,
        "source_mtime_ns": state.st_mtime_ns,
        "soft_mask": soft_mask,
    }


def _write(directory: Path, source: Path, identity: Mapping[str, str | int], soft_mask: SoftMask) -> None:
    """Fills `directory` with the two files of a pack."""
    workdir = directory / "work"
    workdir.mkdir()
    digest = hashlib.sha256()
    records: list[PackedRecord] = []
    offset = 0
    with (directory / TOKENS_FILE).open("wb") as file:
        for record in read_records(source, workdir):
            for chunk in record.chunks:
                tokens = encode(chunk, soft_mask).data
                digest.update(tokens)
                file.write(tokens)
            records.append(PackedRecord(record.name, offset, record.length))
            offset += record.length
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(workdir)
    digest.update(json.dumps(records).encode())
    index = {**identity, "num_tokens": offset, "content_hash": digest.hexdigest(), "records": records}
    with (directory / INDEX_FILE).open("w", encoding="utf-8") as file_text:
        json.dump(index, file_text)
        file_text.flush()
        os.fsync(file_text.fileno())


def _load(directory: Path) -> PackedGenome | None:
    """The pack in `directory`, or None if there is none or it is damaged."""
    try:
        size = (directory / TOKENS_FILE).stat().st_size
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        records = tuple(PackedRecord(str(name), int(offset), int(length)) for name, offset, length in index["records"])
        genome = PackedGenome(directory, records, int(index["num_tokens"]), str(index["content_hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    end = 0
    for record in records:
        if record.offset != end or record.length < 0:
            return None
        end += record.length
    return genome if size == genome.num_tokens == end else None


def _synthetic(cache: Path, section: SyntheticSection) -> Path:
    """The synthetic genome's FASTA in the cache, written if it is not there."""
    key = _digest({"format": FORMAT, **section.model_dump()})[:12]
    path = cache / f"synthetic-{key}.fa"
    if not path.exists():
        with _exclusive(cache, path.name):
            if not path.exists():
                write_fasta(path, section)
    return path


def _stem(path: Path) -> str:
    """'lambda' of 'lambda.fa.gz', short enough for a file name."""
    return re.sub(r"(\.(fa|fasta|fna|ffn|txt))?(\.(gz|bgz|bgzf))?$", "", path.name, flags=re.IGNORECASE)[:80]


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@contextmanager
def _exclusive(cache: Path, name: str) -> Iterator[None]:
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
