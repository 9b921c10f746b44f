"""The documents that a source names: files by path or pattern, or a data set of the Hugging Face `datasets` library."""

import glob
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from seqengine.config.data import SourceSection
from seqengine.data.documents import (
    Piece,
    byte_pieces,
    encode_text,
    has_separator,
    json_pieces,
    split_document,
    text_pieces,
)
from seqengine.errors import InputError


class Corpus(Protocol):
    """Documents in a fixed order, read as often as need be."""

    @property
    def name(self) -> str:
        """For the name of a directory, and for messages."""
        ...

    def identity(self) -> dict[str, Any]:
        """What makes two packs of it the same pack."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """The documents, in pieces (see `seqengine.data.documents`)."""
        ...


@dataclass(frozen=True)
class Files:
    """A `Corpus` of files, one after the other."""

    source: str
    paths: tuple[Path, ...]
    separator: str
    field: str
    place: str = "data"
    """The table of their keys, for messages."""
    must_part: bool = True
    """A separator must stand in one of the files."""

    @property
    def name(self) -> str:
        """The first file's, without its endings."""
        return self.paths[0].name.split(".")[0][:80] or "files"

    def identity(self) -> dict[str, Any]:
        """Paths, sizes and times of the files, and how they are read."""
        stats = [(str(path), path.stat()) for path in self.paths]
        return {
            "source": self.source,
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "separator": self.separator,
            "field": self.field if self.source == "jsonl" else "",
        }

    def pieces(self) -> Iterator[Piece]:
        """Of each file. Raises: InputError, at the end, for a separator that parts none of them."""
        documents = 0
        for path in self.paths:
            for piece in self._of_file(path):
                documents += piece.ends
                yield piece
        unparted = self.must_part and self.separator and 0 < documents <= len(self.paths)
        if unparted and not any(has_separator(path, self.separator) for path in self.paths):
            raise InputError(
                f"{self.place}.separator = {self.separator!r}: must stand in the text; got none in {len(self.paths)} files. "
                "Correct it (in TOML, \"\\n\" is a newline and '\\n' is not), or delete it."
            )

    def _of_file(self, path: Path) -> Iterator[Piece]:
        if self.source == "text":
            return text_pieces(path, self.separator)
        return json_pieces(path, self.field) if self.source == "jsonl" else byte_pieces(path)


@dataclass(frozen=True)
class HubData:
    """A `Corpus` from the `datasets` library: one row is one document."""

    name: str
    field: str
    rows: Any

    def identity(self) -> dict[str, Any]:
        """The library's own fingerprint of the rows."""
        return {"source": "hf", "fingerprint": str(self.rows._fingerprint), "field": self.field}

    def pieces(self) -> Iterator[Piece]:
        """Of each row."""
        for number, row in enumerate(self.rows.select_columns(self.field)):
            yield from split_document(
                encode_text(row[self.field], f"{self.name}, row {number}: the field {self.field!r}")
            )


def open_corpora(section: SourceSection, place: str) -> tuple[Corpus, Corpus | None]:
    """The documents of [data], and those of validation where they lie apart.

    Raises: InputError for files that are not there, and for data that are in both.
    """
    if section.source == "hf":
        return _hub(section, place, "files", section.dataset_split), (
            _hub(section, place, "files", section.dataset_valid_split) if section.dataset_valid_split is not None
            else _hub(section, place, "valid_files", section.dataset_split) if section.valid_files else None
        )  # fmt: skip
    train = find_files(section.files, f"{place}.files")
    apart = find_files(section.valid_files, f"{place}.valid_files") if section.valid_files else ()
    twice = sorted(set(train) & set(apart))
    if twice:
        raise InputError(
            f"{place}.valid_files: must be other files than {place}.files; got {twice[0]} in both. Take it out of one."
        )
    found = [
        Files(section.source, paths, section.separator, section.field, place, must_part=paths is train)
        for paths in (train, apart)
        if paths
    ]
    return found[0], found[1] if apart else None


def find_files(patterns: tuple[str, ...], key: str) -> tuple[Path, ...]:
    """The files that paths and patterns name, each once: those of a pattern in the order of their names.

    Raises: InputError for each that leads to no file.
    """
    if not patterns:
        raise InputError(f"{key}: must name the files to read; got none. Set it, for instance to ['texts/*.txt'].")
    found: dict[Path, None] = {}
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists() or not glob.has_magic(pattern):
            matches = [path]
        else:
            matches = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not matches:
            problems.append(f"{key}: every pattern must match a file; got {pattern!r}, which matches none.")
        for match in matches:
            if match.is_file():
                found[match.resolve()] = None
            else:
                what = "is no regular file" if match.exists() else "does not exist"
                problems.append(f"{key}: must be files; got {str(match)!r}, which {what}. Correct the path.")
    if problems:
        raise InputError(*problems)
    return tuple(found)


def _hub(section: SourceSection, place: str, files_key: str, split: str | None) -> HubData:
    if section.dataset is None:
        raise InputError(f"{place}.dataset: must name a data set when {place}.source is 'hf'; got nothing. Set it.")
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"{place}.source = 'hf' needs the datasets library; got none. Run: pip install 'seqengine-train[datasets]'"
        )
    import datasets

    files = getattr(section, files_key)
    named = {"data_files": [str(path) for path in find_files(files, f"{place}.{files_key}")]} if files else {}
    what = f"{place}.dataset = '{section.dataset}', split '{split}'"
    try:
        rows = datasets.load_dataset(section.dataset, section.dataset_config, split=split, **named)
    except Exception as error:  # noqa: BLE001  (the library, and those below it, raise what they like)
        raise InputError(f"{what}: must be a data set that can be read; got: {type(error).__name__}: {error}") from None
    if section.field not in rows.column_names:
        known = ", ".join(repr(name) for name in rows.column_names[:8])
        raise InputError(f"{what}: must have the field {section.field!r}; got {known}. Set {place}.field.")
    return HubData(Path(section.dataset).name[:80], section.field, rows)
