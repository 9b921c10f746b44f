"""Reading FASTA: plain, gzip or bgzip, streamed in pieces of some megabases, every mistake named.

pyfaidx reads the bases. Its index is written in a directory that the caller gives, never beside the user's file. Its
handle lives inside one generator: all who hold it share one file offset, which is how a loader that opens it before forking
its workers returns wrong bases.
"""

import gzip
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import pyfaidx

from seqengine.data.gzipped import MAGIC, refusing_damage
from seqengine.errors import InputError

CHUNK_BASES = 8 << 20
_COPY_BYTES = 4 << 20
# Every BGZF file ends with this empty block (SAM specification, section 4.1.2). Blocks are whole gzip members, so
# without this check a file cut between two of them would read as a shorter genome.
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")

_COMPRESSED_NAMES = (".gz", ".bgz", ".bz2", ".zip")  # pyfaidx judges by the name
_REWRAP = "Rewrap the file, for instance with: seqkit seq -w 70"

_GAP, _BASE, _AMBIGUOUS, _FOREIGN = range(4)


def _classes() -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    table = np.full(256, _FOREIGN, dtype=np.uint8)
    for letters, kind in (("ACGTUN", _BASE), ("RYSWKMBDHV", _AMBIGUOUS), ("-.", _GAP)):
        for letter in letters + letters.lower():
            table[ord(letter)] = kind
    table.setflags(write=False)
    return table


_CLASS = _classes()


@dataclass(frozen=True)
class Record:
    """One sequence of a FASTA file. `chunks` yields its `length` letters in order and checks them on the way."""

    name: str
    length: int
    chunks: Iterator[bytes]


def read_records(path: Path, workdir: Path, *, chunk_bases: int = CHUNK_BASES) -> Iterator[Record]:
    """The records of a FASTA file in file order, empty ones included (length 0).

    A record's chunks must be read before the next record is asked for. `workdir` is an existing directory for the index
    and, for compressed input, the text; the caller removes it.

    Memory: one chunk (`chunk_bases` letters) and the table of records.
    Raises: InputError, naming the file and the record, line or position: missing, empty, not FASTA, corrupt or
        truncated gzip, repeated names, uneven lines, no bases, protein.
    """
    with closing(_open_index(path, _plain_text(path, workdir), workdir)) as reader:
        lengths = {name: len(reader[name]) for name in reader.keys()}  # noqa: SIM118  (it iterates over records)
        if not any(lengths.values()):
            raise InputError(f"{path}: a FASTA file must hold bases; got {len(lengths)} record(s), all of length 0")
        for name, length in lengths.items():
            yield Record(name, length, _chunks(path, reader, name, length, chunk_bases))


def _chunks(path: Path, reader: pyfaidx.Fasta, name: str, length: int, chunk_bases: int) -> Iterator[bytes]:
    counts = np.zeros(4, dtype=np.int64)
    first_odd = ("", 0)  # the first letter that is no plain base, and its position from 1
    for start in range(0, length, chunk_bases):
        end = min(start + chunk_bases, length)
        try:
            chunk = reader.faidx.fetch(name, start + 1, end).encode("ascii")
        except UnicodeError:
            raise InputError(f"{path}: record {name!r} must be ASCII; got another byte behind base {start}") from None
        if len(chunk) != end - start:
            raise InputError(f"{path}: record {name!r} changed while it was read; leave the file alone and try again")
        classes = _CLASS[np.frombuffer(chunk, dtype=np.uint8)]
        counts += np.bincount(classes, minlength=4)
        if counts[_FOREIGN]:
            at = int(np.argmax(classes == _FOREIGN))
            _refuse_letter(path, name, chr(chunk[at]), start + at + 1)
        if counts[_AMBIGUOUS] and not first_odd[1]:
            at = int(np.argmax(classes == _AMBIGUOUS))
            first_odd = chr(chunk[at]), start + at + 1
        yield chunk
    if counts[_BASE] < counts[_AMBIGUOUS]:
        share = counts[_BASE] / (counts[_BASE] + counts[_AMBIGUOUS])
        raise InputError(
            f"{path}: record {name!r} looks like protein: at least half of its letters must be one of ACGTUN, got "
            f"{share:.0%}; the first other letter is {first_odd[0]!r} at position {first_odd[1]}. "
            "Give a nucleotide FASTA."
        )


def _refuse_letter(path: Path, name: str, letter: str, position: int) -> NoReturn:
    if letter.isalpha() or letter == "*":
        raise InputError(
            f"{path}: record {name!r} looks like protein: {letter!r} at position {position} is no nucleotide code "
            "(IUPAC: ACGTUNRYSWKMBDHV, '-' and '.'). Give a nucleotide FASTA."
        )
    raise InputError(
        f"{path}: record {name!r}: every character must be a nucleotide code (IUPAC: ACGTUNRYSWKMBDHV, '-' and '.'); "
        f"got {letter!r} at position {position}. Remove it."
    )


def _plain_text(path: Path, workdir: Path) -> Path:
    """The file itself, or its decompressed text in `workdir`, once its first byte is known to be '>'."""
    text = workdir / "text.fa"
    with _open(path) as file:
        head = file.read(64)
        if not head:
            raise InputError(f"{path}: a FASTA file must not be empty; got 0 bytes")
        if not head.startswith(MAGIC):
            _check_start(path, head)
            if path.suffix.lower() not in _COMPRESSED_NAMES:
                return path
            text.symlink_to(path.resolve())
            return text
        file.seek(0)
        copied = 0
        with text.open("wb") as target:
            for block in _gunzip(path, file):
                if not copied:
                    _check_start(path, block)
                copied += target.write(block)
        if not copied:
            raise InputError(f"{path}: a FASTA file must not be empty; got a gzip file of 0 bytes")
        if head[3] & 4 and b"BC\x02\x00" in head:
            file.seek(-min(len(_BGZF_END), path.stat().st_size), 2)
            if file.read() != _BGZF_END:
                raise InputError(
                    f"{path}: truncated bgzip file: its end-of-file block is missing after {copied} bytes of text. "
                    "Copy or compress it again."
                )
        return text


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: the FASTA file must be readable; got: {error.strerror}. Set data.fasta.") from None


def _gunzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Blocks of text of a gzip file of one or many members (bgzip is many)."""
    done = 0
    with gzip.GzipFile(fileobj=file, mode="rb") as stream, refusing_damage(path, lambda: done):
        while block := stream.read(_COPY_BYTES):
            done += len(block)
            yield block


def _check_start(path: Path, head: bytes) -> None:
    if not head.startswith(b">"):
        raise InputError(
            f"{path}: not a FASTA file: it must begin with '>' (plain, gzip or bgzip); got {head[:12]!r} at line 1"
        )


def _open_index(path: Path, text: Path, workdir: Path) -> pyfaidx.Fasta:
    """A pyfaidx reader over `text`; what it refuses is raised about `path`, which the user knows."""
    try:
        return _index(path, text, workdir / "text.fai")
    except pyfaidx.FastaIndexingError:
        # pyfaidx allows one empty line behind a record; people leave more.
        tidy = workdir / "tidy.fa"
        dropped = _drop_blank_lines(text, tidy)
    try:
        return _index(path, tidy, workdir / "tidy.fai")
    except pyfaidx.FastaIndexingError as error:
        _refuse_index(path, str(error), dropped)


def _index(path: Path, text: Path, index: Path) -> pyfaidx.Fasta:
    try:
        reader = pyfaidx.Fasta(str(text), indexname=str(index), as_raw=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a FASTA file must be text; got the byte {error.object[error.start]:#04x}") from None
    except RuntimeError as error:  # its last resort for lines that it cannot make sense of
        raise pyfaidx.FastaIndexingError(str(error)) from None
    except ValueError as error:
        duplicate = re.search(r'Duplicate key "(.*)"', str(error))
        if duplicate is None:
            raise
        name = duplicate.group(1)
        lines = ", ".join(str(n) for n in _header_lines(text, name)[:20])
        raise InputError(
            f"{path}: record names must differ; got {name!r} at lines {lines}. Rename or remove all but one."
        ) from None
    _check_last_lines(path, reader)
    return reader


def _check_last_lines(path: Path, reader: pyfaidx.Fasta) -> None:
    """pyfaidx lets a record's last line differ; a longer one would shift every offset that it computes behind it."""
    for name, entry in reader.faidx.index.items():
        full = (entry.rlen - 1) // entry.lenc if entry.rlen else 0  # lines before the last, if none is longer
        if full == 0:
            continue
        reader.faidx.file.seek(entry.offset + full * entry.lenb - 1)
        tail = reader.faidx.file.read(1 + entry.rlen - full * entry.lenc)
        if len(tail) != 1 + entry.rlen - full * entry.lenc or tail[:1] != b"\n" or re.search(rb"[\r\n>]", tail[1:]):
            reader.close()
            raise InputError(
                f"{path}: the lines of a record must be equally long but for its last, which may be shorter; got a "
                f"longer last line in record {name!r}. {_REWRAP}"
            )


def _refuse_index(path: Path, message: str, dropped: list[int]) -> NoReturn:
    uneven = re.search(r"Inconsistent line found in >(.*) at line ([0-9.,]+)\.", message)
    if uneven is not None:
        name, line = uneven.group(1), _original_line(int(re.sub("[.,]", "", uneven.group(2))), dropped)
        raise InputError(
            f"{path}: the lines of a record (line ends included) must be equally long but for its last, which may be "
            f"shorter; got another length in record {name!r} at line {line}. {_REWRAP}"
        )
    unnamed = re.search(r"Bad sequence name .* at line ([0-9]+)\.", message)
    if unnamed is not None:
        line = _original_line(int(unnamed.group(1)) + 1, dropped)
        raise InputError(f"{path}: every record needs a name behind its '>'; got none at line {line}. Name it.")
    raise InputError(f"{path}: not a readable FASTA file: {message}")


def _drop_blank_lines(source: Path, target: Path) -> list[int]:
    """Copies `source` without the empty lines that stand before a header or the end; returns their numbers, from 1."""
    dropped: list[int] = []
    blank: list[tuple[int, bytes]] = []
    with source.open("rb") as lines, target.open("wb") as out:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                blank.append((number, line))
                continue
            if line.startswith(b">"):
                dropped += [n for n, _ in blank]
            else:
                out.writelines(text for _, text in blank)
            blank.clear()
            out.write(line)
    return dropped + [n for n, _ in blank]


def _original_line(line: int, dropped: list[int]) -> int:
    """The number, before `dropped` lines were taken out, of what is now line `line`."""
    original = line
    while (moved := line + bisect_left(dropped, original + 1)) != original:
        original = moved
    return original


def _header_lines(text: Path, name: str) -> list[int]:
    wanted = name.encode()
    with text.open("rb") as lines:
        return [n for n, s in enumerate(lines, start=1) if s.startswith(b">") and s[1:].split(None, 1)[:1] == [wanted]]
