"""Documents as one memory-mapped file of token ids, made once and shared by every process of a node.

    <cache>/<name>-<key>/tokens.bin        uint16 or uint32, each document's ids and then the id that ends it
    <cache>/<name>-<key>/documents.bin     int64, the first token of each document, and the number of all tokens
    <cache>/<name>-<key>/tokenizer.json    the tokenizer, unless ids are bytes
    <cache>/<name>-<key>/index.json        format, what it was made from, counts, hash

The key is a hash of the files' paths, sizes and modification times, of how they are read, and of the tokenizer. The corpus is
streamed: memory holds some pieces of documents, however large it is.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from seqengine.config.data import SourceSection
from seqengine.data.cache import MappedArray, build, digest, writable, write_json
from seqengine.data.corpus import Corpus
from seqengine.data.documents import Piece
from seqengine.data.text_tokenizer import ByteTokenizer, FileTokenizer, TextTokenizer, dtype_of, train_tokenizer
from seqengine.errors import InputError

FORMAT = 1
TOKENS_FILE, DOCUMENTS_FILE, TOKENIZER_FILE, INDEX_FILE = "tokens.bin", "documents.bin", "tokenizer.json", "index.json"
_PIECES, _BYTES = 256, 1 << 20  # encoded at a time, at most
_OFFSETS = 1 << 16  # written at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedText:
    """Packed documents on disk. Cheap to pickle and safe to fork."""

    directory: Path
    num_tokens: int
    num_documents: int
    dtype: str
    end: str | None
    """The token that ends a document, where data.tokenizer_end names it."""
    content_hash: str
    """sha256, in hex, of the tokens, the documents and the tokenizer: equal for equal data, wherever they lie."""
    _tokens: MappedArray = field(init=False, repr=False, compare=False)
    _documents: MappedArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tokens", MappedArray(self.directory / TOKENS_FILE, self.dtype))
        object.__setattr__(self, "_documents", MappedArray(self.directory / DOCUMENTS_FILE, "<i8"))

    def tokens(self) -> npt.NDArray[Any]:
        """All token ids, uint16 or uint32 [num_tokens], read-only."""
        return self._tokens.array()

    def documents(self) -> npt.NDArray[np.int64]:
        """Boundaries [0, .., num_tokens] of the documents, int64 [num_documents + 1], read-only."""
        return self._documents.array()

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that made it."""
        path = self.directory / TOKENIZER_FILE
        return FileTokenizer(path.read_text(encoding="utf-8"), end=self.end) if path.exists() else ByteTokenizer()


def pack_text(corpus: Corpus, tokenizer: TextTokenizer, cache: Path) -> PackedText:
    """The documents of a corpus by a tokenizer, from the cache or packed now; safe to call in many processes at once.

    Raises: InputError for documents that cannot be read, for none, and for a cache that cannot be written. A failure leaves
        nothing behind.
    """

    def write(directory: Path, identity: dict[str, Any]) -> None:
        _write(directory, corpus, tokenizer, identity)

    return _packed(cache, corpus, {"tokenizer": tokenizer.digest}, write)


def pack_and_train(corpus: Corpus, section: SourceSection, cache: Path, *, apart: bool) -> PackedText:
    """The documents of a corpus by a tokenizer that is trained on its training split first.

    apart: the validation split lies elsewhere, so that all documents are of the training split.
    """
    vocab_size = section.tokenizer_vocab
    if vocab_size is None:
        raise InputError("data.tokenizer_vocab: must be given with data.tokenizer = 'train'; got nothing. Set it.")

    def write(directory: Path, identity: dict[str, Any]) -> None:
        count = sum(piece.ends for piece in corpus.pieces())
        if not count:
            raise _empty(corpus)
        trained_on = count if apart else count - num_valid(count, section.valid_fraction)
        text = train_tokenizer(_texts(corpus, trained_on), vocab_size)
        _write(directory, corpus, FileTokenizer(text), identity)

    share = None if apart else section.valid_fraction
    return _packed(cache, corpus, {"tokenizer": "train", "vocab": vocab_size, "valid_fraction": share}, write)


def num_valid(num_documents: int, fraction: float) -> int:
    """Documents of the validation split, the last ones: a share of all, and at least one."""
    return min(num_documents, max(1, math.floor(num_documents * fraction + 0.5)))


def _packed(
    cache: Path, corpus: Corpus, how: dict[str, Any], write: Callable[[Path, dict[str, Any]], None]
) -> PackedText:
    with writable(cache):
        identity = {"format": FORMAT, **corpus.identity(), **how}
        name = f"{corpus.name}-{digest(identity)[:12]}"
        return build(
            cache, name, load=_load, write=lambda directory: write(directory, identity), what=f"{corpus.name} ({name})"
        )


def _texts(corpus: Corpus, count: int) -> Iterator[str]:
    """The pieces of the first `count` documents."""
    if not count:
        return
    for piece in corpus.pieces():
        yield piece.data.decode()
        count -= piece.ends
        if not count:
            return


def _write(directory: Path, corpus: Corpus, tokenizer: TextTokenizer, identity: dict[str, Any]) -> None:
    """Fills `directory` with the files of a pack."""
    dtype = dtype_of(tokenizer.vocab_size)
    with (directory / TOKENS_FILE).open("wb") as tokens, (directory / DOCUMENTS_FILE).open("wb") as documents:
        writer = _Writer(tokens, documents)
        stop = np.array([tokenizer.end_id], dtype=dtype)
        for pieces in _together(corpus.pieces()):
            for piece, ids in zip(pieces, tokenizer.encode([p.data for p in pieces]), strict=True):
                writer.add(ids.astype(dtype, copy=False))
                if piece.ends:
                    writer.add(stop)
                    writer.end_document()
        writer.finish()
    if not writer.num_documents:
        raise _empty(corpus)
    if tokenizer.json is not None:
        (directory / TOKENIZER_FILE).write_text(tokenizer.json, encoding="utf-8")
    parts = [writer.tokens_hash.hexdigest(), writer.documents_hash.hexdigest(), tokenizer.digest]
    counts = {
        "num_tokens": writer.num_tokens,
        "num_documents": writer.num_documents,
        "dtype": dtype,
        "end": tokenizer.end,
    }
    content_hash = digest(parts)
    write_json(directory / INDEX_FILE, {**identity, **counts, "content_hash": content_hash})
    _log.info("packed %s: %d tokens in %d documents", corpus.name, writer.num_tokens, writer.num_documents)


class _Writer:
    """Appends tokens and boundaries to two files, and hashes them."""

    def __init__(self, tokens: BinaryIO, documents: BinaryIO) -> None:
        self._tokens, self._documents = tokens, documents
        self.tokens_hash, self.documents_hash = hashlib.sha256(), hashlib.sha256()
        self.num_tokens, self.num_documents = 0, 0
        self._offsets = [0]

    def add(self, ids: npt.NDArray[Any]) -> None:
        """Ids of the document at hand."""
        data = ids.tobytes()
        self._tokens.write(data)
        self.tokens_hash.update(data)
        self.num_tokens += len(ids)

    def end_document(self) -> None:
        """The next ids are of another document."""
        self._offsets.append(self.num_tokens)
        self.num_documents += 1
        if len(self._offsets) >= _OFFSETS:
            self._write_offsets()

    def finish(self) -> None:
        """All is on the disk."""
        self._write_offsets()
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())

    def _write_offsets(self) -> None:
        data = np.array(self._offsets, dtype="<i8").tobytes()
        self._documents.write(data)
        self.documents_hash.update(data)
        self._offsets = []


def _together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists for the tokenizer: what makes one is the pieces alone."""
    found: list[Piece] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        size += len(piece.data)
        if len(found) == _PIECES or size >= _BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found


def _load(directory: Path) -> PackedText | None:
    """The pack in `directory`, or None if there is none or it is damaged."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        sizes = [(directory / name).stat().st_size for name in (TOKENS_FILE, DOCUMENTS_FILE)]
        num_tokens, num_documents = int(index["num_tokens"]), int(index["num_documents"])
        packed = PackedText(
            directory, num_tokens, num_documents, str(index["dtype"]), index["end"], str(index["content_hash"])
        )
        width = np.dtype(packed.dtype).itemsize
        if not num_documents or sizes != [num_tokens * width, (num_documents + 1) * 8]:
            return None
        bounds = packed.documents()
        has_tokenizer = index["tokenizer"] == "bytes" or (directory / TOKENIZER_FILE).exists()
        return packed if has_tokenizer and bounds[0] == 0 and bounds[-1] == num_tokens else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _empty(corpus: Corpus) -> InputError:
    return InputError(f"{corpus.name}: must hold at least one document that is not empty; got none. Correct the paths.")
