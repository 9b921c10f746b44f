"""Labelled sequences in a folder of the user's: a file each, images of CIFAR-10, or pairs of papers.

class_folders   {train, valid | test}/{class}/*: every file is a sequence, of bytes (data.alphabet = "bytes", as the reviews of
                aclImdb) or of letters of DNA ("dna", as the sets of GenomicBenchmarks; white space at both ends is left out).
                Classes are numbered in the order of their names. Validation is `valid`, or `test` where there is no `valid`. A
                sequence that is longer than data.seq_len is cut at its end.
cifar10         the files of the binary version: training is data_batch_1.bin to data_batch_5.bin, of which the last tenth, or
                what data.valid_files names, is validation; test_batch.bin is the test. 1,024 gray levels a picture:
                (299 R + 587 G + 114 B) / 1000, rounded, the luma of ITU-R BT.601, row after row.
aan             new_aan_pairs.{train, eval, test}.tsv of the Long Range Arena: a line is label, two names, two texts. A sequence
                is the bytes of both texts with a separator between them, each cut at its end to half of data.seq_len. The
                published models encode the two texts apart and compare what comes out; one sequence of both is our own form.

What is read is packed once into data.cache.

References: Maas et al. 2011 (IMDB), ACL; Gresova et al. 2023 (GenomicBenchmarks), BMC Genomic Data 24:25; Krizhevsky 2009
(CIFAR-10); Radev et al. 2013 (AAN); Tay et al. 2021, Long Range Arena, arXiv:2011.04006.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from seqengine.config.data import CLASSES, PIXELS, SourceSection
from seqengine.data.cache import digest
from seqengine.data.class_folders import ClassFolders
from seqengine.data.contract import IntArray
from seqengine.data.labelled import BYTES, LabelledWindows, Sequences, Vocabulary
from seqengine.data.packed_sequences import PackedSequences, Row, files_identity, pack_sequences
from seqengine.errors import InputError

RECORD = 1 + 3 * PIXELS
"""Bytes of a picture in the files of CIFAR-10: its class, then its red, green and blue pixels."""
TRAINING_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
SEPARATOR = 256
PAIR_IDS = Vocabulary(259, 257, 258, range(256))
"""Bytes, the separator of two texts, the padding, and the mask."""
PAIR_FILES = {
    split: f"new_aan_pairs.{name}.tsv" for split, name in {"train": "train", "valid": "eval", "test": "test"}.items()
}
COLUMNS = 5
CLASS_NAMES = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_PICTURES = 1000  # read at a time


class Part(Protocol):
    """What a split is made of."""

    @property
    def files(self) -> list[Path]: ...

    def rows(self) -> Iterator[Row]:
        """Its sequences, in order."""
        ...


@dataclass(frozen=True)
class Pictures:
    """Files of CIFAR-10."""

    files: list[Path]

    def rows(self) -> Iterator[Row]:
        """Raises: InputError for a file that is not whole pictures, and for a class above 9."""
        for path in self.files:
            size = path.stat().st_size
            if not size or size % RECORD:
                raise InputError(
                    f"{path}: must hold pictures of {RECORD} bytes each (the binary version of CIFAR-10); got {size} bytes. "
                    "Unpack the archive again."
                )
            with _reading(path) as file:
                at = 0
                while block := file.read(_PICTURES * RECORD):
                    records = np.frombuffer(block, dtype=np.uint8).reshape(-1, RECORD)
                    if records[:, 0].max() > 9:
                        bad = at + int(np.argmax(records[:, 0] > 9))
                        raise InputError(
                            f"{path}: every picture must begin with its class, 0 to 9; got {records[bad - at, 0]} for picture "
                            f"{bad}. Unpack the archive again."
                        )
                    rgb = records[:, 1:].reshape(-1, 3, PIXELS).astype(np.uint32)
                    gray = (299 * rgb[:, 0] + 587 * rgb[:, 1] + 114 * rgb[:, 2] + 500) // 1000
                    yield from (Row(int(label), ids) for label, ids in zip(records[:, 0], gray, strict=True))
                    at += len(records)


@dataclass(frozen=True)
class Papers:
    """A file of pairs of texts."""

    files: list[Path]

    def rows(self) -> Iterator[Row]:
        """Raises: InputError, naming the line, if one has other columns or another label."""
        for path in self.files:
            number = 0
            with _reading(path) as file:
                for number, line in enumerate(file, start=1):
                    columns = line.rstrip(b"\r\n").split(b"\t")
                    if len(columns) != COLUMNS:
                        raise InputError(
                            f"{path}:{number}: a line must have {COLUMNS} columns, with tabs between them: label, two names, "
                            f"two texts; got {len(columns)}. Mend the line."
                        )
                    if columns[0] not in CLASS_NAMES:
                        got = columns[0][:20].decode(errors="replace")
                        raise InputError(f"{path}:{number}: the label must be 0 or 1; got {got!r}. Mend the line.")
                    first, second = (np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in columns[3:])
                    middle = np.array([SEPARATOR], dtype=np.uint16)
                    yield Row(CLASS_NAMES[columns[0]], np.concatenate([first, middle, second]))
            if not number:
                raise InputError(f"{path}: must hold lines of label, two names and two texts; got an empty file.")


@dataclass(frozen=True)
class Pairs:
    """Packed pairs as `seqengine.data.labelled.Sequences`."""

    packed: PackedSequences

    def __len__(self) -> int:
        return len(self.packed)

    def label(self, index: int) -> int:
        """1 if the papers belong together."""
        return self.packed.label(index)

    def ids(self, index: int, most: int) -> IntArray:
        """Both texts, each cut to half of what the separator leaves of `most`."""
        whole = self.packed.ids(index, self.packed.num_tokens)
        middle, half = int(np.argmax(whole == SEPARATOR)), (most - 1) // 2
        cut: IntArray = np.concatenate([whole[: min(middle, half)], whole[middle : middle + 1 + half]])
        return cut


class FolderSource:
    """Labelled sequences of a folder; see `seqengine.data.contract.Source`.

    Raises: InputError for a folder that is not there or does not hold what it must. A failure leaves nothing in the cache.
    """

    def __init__(self, section: SourceSection, cache: Path) -> None:
        self._section, self._cache = section, cache
        self.folder = _folder(section)
        self._classes = ClassFolders(self.folder, section) if section.source == "class_folders" else None
        ids = PAIR_IDS if section.source == "aan" else self._classes.vocabulary if self._classes else BYTES
        self.vocab_size, self.pad_id = ids.vocab_size, ids.pad_id
        self.mask_id: int | None = ids.mask_id
        self.replacements: range | None = ids.replacements
        self.num_classes: int | None = len(self._classes.names) if self._classes else CLASSES[section.source]
        self._splits: dict[str, tuple[PackedSequences, range]] = {}
        parts = [self._split(split) for split in ("train", "valid")]
        identity = [[packed.content_hash, rows.start, rows.stop] for packed, rows in parts]
        self.content_hash = digest({"source": section.source, "parts": identity})

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, LabelledWindows]:
        """The sequences of each split. Raises: InputError for windows that are too short, and a split that is not there."""
        least = {"cifar10": PIXELS, "aan": 3}.get(self._section.source, 1)
        if seq_len < least:
            raise InputError(f"data.seq_len = {seq_len} must be at least {least}, a sequence of the data; set it.")
        found = {}
        for split in splits:
            packed, rows = self._split(split)
            sequences: Sequences = Pairs(packed) if self._section.source == "aan" else packed
            is_dna = self._section.source == "class_folders" and self._section.alphabet == "dna"
            assert self.num_classes is not None
            found[split] = LabelledWindows(
                sequences,
                rows,
                seq_len,
                num_classes=self.num_classes,
                pad_id=self.pad_id,
                rc_prob=self._section.rc_prob if is_dna else 0.0,
            )
        return found

    def _split(self, split: str) -> tuple[PackedSequences, range]:
        """The packed sequences of a split, and which of them are its own."""
        if split not in ("train", "valid", "test"):
            raise InputError(f"data.source: the splits are train, valid and test; got {split!r}. Name one.")
        if split not in self._splits:
            self._splits[split] = self._pack(split)
        return self._splits[split]

    def _pack(self, split: str) -> tuple[PackedSequences, range]:
        section = self._section
        if section.source == "cifar10" and split != "test" and not section.valid_files:
            whole = self._packed("train", Pictures(_existing(self.folder, TRAINING_FILES)))
            cut = len(whole) - max(1, round(len(whole) / 10))
            return whole, range(cut) if split == "train" else range(cut, len(whole))
        packed = self._packed(split, self._part(split))
        return packed, range(len(packed))

    def _part(self, split: str) -> Part:
        section, folder = self._section, self.folder
        if self._classes is not None:
            return self._classes.part(split)
        if section.source == "aan":
            return Papers(_existing(folder, (PAIR_FILES[split],)))
        if split == "test":
            return Pictures(_existing(folder, ("test_batch.bin",)))
        valid = _existing(folder, section.valid_files, "data.valid_files")
        if split == "valid":
            return Pictures(valid)
        train = [path for path in _existing(folder, TRAINING_FILES) if path not in valid]
        if not train:
            raise InputError("data.valid_files: must leave a file to train on; got all of them. Take one out.")
        return Pictures(train)

    def _packed(self, split: str, part: Part) -> PackedSequences:
        section = self._section
        how = {
            "source": section.source,
            "alphabet": section.alphabet or "bytes",
            "soft_mask": section.soft_mask,
            "files": files_identity(part.files),
            "num_files": len(part.files),
            "classes": self._classes.names if self._classes else [],
        }
        dtype = "<u2" if section.source == "aan" else "|u1"
        return pack_sequences(self._cache, f"{self.folder.name or 'folder'}-{split}", how, part.rows, dtype=dtype)


def _folder(section: SourceSection) -> Path:
    if section.folder is None:
        raise InputError(
            f"data.folder: must name the folder to read when data.source is {section.source!r}; got nothing. Set it."
        )
    folder = section.folder.absolute()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"data.folder: must be a folder; got '{section.folder}', which {what}. Correct the path.")
    return folder


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; what goes wrong while they are read is told about the file."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: must be a readable file; got: {error.strerror or error}. Mend it.") from None


def _existing(folder: Path, names: Sequence[str], key: str = "data.folder") -> list[Path]:
    """Files of the folder. Raises: InputError that names every one that is missing."""
    found = [(folder / name).resolve() for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if not path.is_file()]
    if missing:
        raise InputError(f"{key}: {folder} must hold the files {', '.join(names)}; missing: {', '.join(missing)}.")
    return found
