"""A genome as one memory-mapped file of token ids, made once and shared by every process of a node.

    <cache>/<stem>-<key>/tokens.bin     uint8, one byte per base, records end to end in file order
    <cache>/<stem>-<key>/index.json     format, source, records (name, offset, length), content hash

The key is a hash of the source's path, size and modification time, the treatment of lower case and the format, so a
changed file is packed anew. A pack is written in a hidden directory and renamed: it is there whole or not at all.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from seqengine.config.data import DataSection, SourceSection, SyntheticSection
from seqengine.data.cache import MappedArray, build, digest, exclusive, writable, write_json
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
    _file: MappedArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_file", MappedArray(self.directory / TOKENS_FILE, "uint8"))

    def tokens(self) -> Ids:
        """All token ids, uint8 [num_tokens], read-only; mapped at the first call in each process."""
        return self._file.array()


def pack(section: DataSection) -> PackedGenome:
    """The packed genome that [data] asks for, from the cache or packed now; safe to call in many processes at once.

    A synthetic genome is written once as FASTA in the cache and then packed like any other.

    Raises: InputError for a missing or bad FASTA (see `read_records`) and for a cache that cannot be written. A failure
        leaves nothing behind.
    """
    return pack_genome(section, Path(section.cache).absolute())


def pack_genome(section: SourceSection, cache: Path, place: str = "data") -> PackedGenome:
    """`pack` of one source, whose keys stand in the table `place`."""
    with writable(cache):
        if section.source == "synthetic":
            return _pack_file(cache, _synthetic(cache, section.synthetic), section.soft_mask, place)
        if section.fasta is None:
            raise InputError(
                f"{place}.fasta: must name a FASTA file when {place}.source is 'fasta'; got nothing. Set it."
            )
        return _pack_file(cache, section.fasta, section.soft_mask, place)


def _pack_file(cache: Path, fasta: Path, soft_mask: SoftMask, place: str) -> PackedGenome:
    source, identity = _identify(fasta, soft_mask, place)

    def write(partial: Path) -> None:
        _write(partial, source, identity, soft_mask)
        _log.info("packed %s", source)

    return build(cache, f"{_stem(source)}-{digest(identity)[:12]}", load=_load, write=write, what=str(source))


def _identify(fasta: Path, soft_mask: SoftMask, place: str) -> tuple[Path, dict[str, str | int]]:
    """The file that `fasta` leads to, and what makes a pack of it the same pack."""
    try:
        source = fasta.resolve()
        state = source.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{place}.fasta: must be a readable file; got {fasta} ({reason}). Correct the path.") from None
    if not source.is_file():  # a directory, or a pipe, which cannot be read twice
        raise InputError(f"{place}.fasta: must be a regular file; got {fasta}, which is none. Correct the path.")
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
    content = hashlib.sha256()
    records: list[PackedRecord] = []
    offset = 0
    with (directory / TOKENS_FILE).open("wb") as file:
        for record in read_records(source, workdir):
            for chunk in record.chunks:
                tokens = encode(chunk, soft_mask).data
                content.update(tokens)
                file.write(tokens)
            records.append(PackedRecord(record.name, offset, record.length))
            offset += record.length
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(workdir)
    content.update(json.dumps(records).encode())
    index = {**identity, "num_tokens": offset, "content_hash": content.hexdigest(), "records": records}
    write_json(directory / INDEX_FILE, index)


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
    key = digest({"format": FORMAT, **section.model_dump()})[:12]
    path = cache / f"synthetic-{key}.fa"
    if not path.exists():
        with exclusive(cache, path.name):
            if not path.exists():
                write_fasta(path, section)
    return path


def _stem(path: Path) -> str:
    """'lambda' of 'lambda.fa.gz', short enough for a file name."""
    return re.sub(r"(\.(fa|fasta|fna|ffn|txt))?(\.(gz|bgz|bgzf))?$", "", path.name, flags=re.IGNORECASE)[:80]
