r"""Documents of text files, JSON lines and other files, streamed in pieces; every mistake is named with its file and place.

text      the parts of a file between separators, or the whole file. A separator with a newline in it, such as "\n\n\n", is cut
          out wherever it stands; one without is a line of its own.
jsonl     one field of each line, which is a JSON object
bytes     a file

A piece is a document, or a part of one that is longer than PIECE_BYTES: its first PIECE_BYTES or less, cut behind their last
newline, or else their last space, or else between two characters. So pieces follow from the document alone. Documents of text
that hold nothing but white space are left out, and so are empty ones.
"""

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from seqengine.data.gzipped import MAGIC, refusing_damage
from seqengine.errors import InputError

PIECE_BYTES = 1 << 16


class Piece(NamedTuple):
    """Bytes of a document, UTF-8 but of raw files, and whether they are its last."""

    data: bytes
    ends: bool


def text_pieces(path: Path, separator: str = "") -> Iterator[Piece]:
    """The documents of a text file, plain or gzip. Raises: InputError if it cannot be read, is damaged or not UTF-8."""
    with _open(path) as file:
        parts = _lines_apart if separator and "\n" not in separator else _parts
        for at, document, ends in parts(file, separator.encode()):
            _decode(document, f"{path}: must be UTF-8 text; got the byte {{}} at offset {{}}", at)
            yield Piece(document, ends)


def has_separator(path: Path, separator: str) -> bool:
    """Whether the separator stands anywhere in a text file."""
    mark = separator.encode()
    with _open(path) as file:
        if "\n" not in separator:
            return any(line.rstrip(b"\r\n") == mark for line in file)
        kept = b""
        while block := file.read(PIECE_BYTES):
            if mark in kept + block:
                return True
            kept = (kept + block)[-len(mark) + 1 :]
    return False


def json_pieces(path: Path, field: str) -> Iterator[Piece]:
    """The documents of a JSON lines file, plain or gzip; empty lines are passed over.

    Raises: InputError, naming the line, if one is no JSON object or has no text in `field`.
    """
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from split_document(_field_of(line, field, f"{path}:{number}"))


def byte_pieces(path: Path) -> Iterator[Piece]:
    """The one document of a file of any bytes, as they lie there. An empty file has none."""
    with _open(path, raw=True) as file:
        block = file.read(PIECE_BYTES)
        while block:
            following = file.read(PIECE_BYTES)
            yield Piece(block, not following)
            block = following


def split_document(document: bytes) -> Iterator[Piece]:
    """A whole document of text as pieces."""
    return (Piece(data, ends) for _, data, ends in _flushed(document, 0, False))


@contextmanager
def _open(path: Path, *, raw: bool = False) -> Iterator[BinaryIO]:
    """The bytes of a file, or the text of a gzip file; what goes wrong while they are read is told about the file."""
    try:
        with closing(path.open("rb")) as file:
            head = b"" if raw else file.peek(len(MAGIC))[: len(MAGIC)]
            if head != MAGIC:
                yield file
                return
            text = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file, mode="rb")), PIECE_BYTES)
            with closing(text), refusing_damage(path, text.tell):
                yield cast(BinaryIO, text)
    except OSError as error:
        raise InputError(
            f"{path}: must be a readable file; got: {error.strerror or error}. Correct the path."
        ) from None


def _parts(file: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """(offset in the file, bytes, whether the document ends) of documents between separators; none: the whole file."""
    overlap = max(len(separator) - 1, 0)
    buffer, at, is_inside = bytearray(), 0, False
    while True:
        block = file.read(PIECE_BYTES)
        searched = max(len(buffer) - overlap, 0)
        buffer += block
        while separator and (found := buffer.find(separator, searched)) >= 0:
            yield from _flushed(bytes(buffer[:found]), at, is_inside)
            del buffer[: found + len(separator)]
            at, is_inside, searched = at + found + len(separator), False, 0
        if not block:
            yield from _flushed(bytes(buffer), at, is_inside)
            return
        # What is left may still end with the start of a separator.
        while len(buffer) - overlap > PIECE_BYTES:
            cut = _cut(bytes(buffer[: PIECE_BYTES + 1]))
            yield at, bytes(buffer[:cut]), False
            del buffer[:cut]
            at, is_inside = at + cut, True


def _lines_apart(file: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """The same for a separator that is a line by itself."""
    buffer, at, is_inside, is_line_start = bytearray(), 0, False, True
    while line := file.readline(PIECE_BYTES):
        if is_line_start and line.rstrip(b"\r\n") == separator:
            yield from _flushed(bytes(buffer), at, is_inside)
            at, is_inside = at + len(buffer) + len(line), False
            buffer.clear()
        else:
            buffer += line
            while len(buffer) > PIECE_BYTES:
                cut = _cut(bytes(buffer[: PIECE_BYTES + 1]))
                yield at, bytes(buffer[:cut]), False
                del buffer[:cut]
                at, is_inside = at + cut, True
        is_line_start = line.endswith(b"\n")
    yield from _flushed(bytes(buffer), at, is_inside)


def _flushed(rest: bytes, at: int, is_inside: bool) -> Iterator[tuple[int, bytes, bool]]:
    """The rest of a document, its earlier pieces given out if `is_inside`."""
    if not is_inside and not rest.strip():
        return
    left = memoryview(rest)  # else each cut would copy what is left
    while len(left) > PIECE_BYTES:
        cut = _cut(bytes(left[: PIECE_BYTES + 1]))
        yield at, bytes(left[:cut]), False
        left, at = left[cut:], at + cut
    yield at, bytes(left), True


def _cut(head: bytes) -> int:
    """Where a document that is longer than PIECE_BYTES is cut, from its first PIECE_BYTES + 1."""
    for mark in (b"\n", b" "):
        found = head.rfind(mark, 0, PIECE_BYTES)
        if found >= 0:
            return found + 1
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 3 and head[cut] & 0xC0 == 0x80:  # in the middle of a character
        cut -= 1
    return cut


def _decode(data: bytes, what: str, at: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            what.format(f"{data[error.start]:#04x}", at + error.start) + ". Convert it, or set data.source = 'bytes'."
        ) from None


def _field_of(line: bytes, field: str, place: str) -> bytes:
    text = _decode(line, f"{place}: must be UTF-8 text; got the byte {{}} at offset {{}} of the line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: every line must be a JSON object; got: {error}. Mend the line.") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: every line must be a JSON object; got {type(value).__name__}. Mend the line.")
    if field not in value:
        known = ", ".join(repr(name) for name in list(value)[:8]) or "none"
        raise InputError(f"{place}: every line must have the field {field!r}; got {known}. Set data.field.")
    return encode_text(value[field], f"{place}: the field {field!r}")


def encode_text(value: object, what: str) -> bytes:
    """UTF-8. Raises: InputError, beginning with `what`, if the value is no text, or holds half of a surrogate pair."""
    if not isinstance(value, str):
        raise InputError(f"{what} must hold text; got {type(value).__name__}. Set data.field, or mend the line.")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} must hold text; got half of a surrogate pair at position {error.start}.") from None
