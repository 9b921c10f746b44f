"""Folders {split}/{class}/* whose files are sequences."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqengine.config.data import SourceSection
from seqengine.data.contract import IntArray
from seqengine.data.labelled import BYTES, Vocabulary
from seqengine.data.packed_sequences import Row
from seqengine.data.tokenizer import MASK, PAD, VOCABULARY, A, SoftMask, encode
from seqengine.errors import InputError

DNA_IDS = Vocabulary(VOCABULARY, PAD, MASK, range(A, A + 4))
LETTERS = b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv"
"""Nucleotide codes of IUPAC; those that are no base become [UNK], as in FASTA."""


@dataclass(frozen=True)
class ClassFiles:
    """The files of one split, and their classes."""

    files: list[Path]
    labels: list[int]
    alphabet: str
    soft_mask: SoftMask

    def rows(self) -> Iterator[Row]:
        """Raises: InputError for an empty file, one that cannot be read, and a letter that is no nucleotide code."""
        for path, label in zip(self.files, self.labels, strict=True):
            try:
                data = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: must be readable; got: {error.strerror}. Mend it.") from None
            yield Row(label, self._dna(path, data) if self.alphabet == "dna" else _bytes(path, data))

    def _dna(self, path: Path, data: bytes) -> IntArray:
        letters = data.strip()
        if not letters:
            raise InputError(f"{path}: must hold a sequence; got an empty file. Remove it.")
        foreign = letters.translate(None, LETTERS)
        if foreign:
            at = letters.index(foreign[:1])
            raise InputError(
                f"{path}: every letter must be a nucleotide code (ACGTUNRYSWKMBDHV); got {chr(letters[at])!r} at position "
                f"{at + 1}. Mend the file, which must be one line of letters and no FASTA, or set data.alphabet = 'bytes'."
            )
        return encode(letters, self.soft_mask)


class ClassFolders:
    """The classes of a folder, the same in all splits; `names` are in their order.

    Raises: InputError if there are fewer than two, or a split has others.
    """

    def __init__(self, folder: Path, section: SourceSection) -> None:
        self.folder = folder
        self._section = section
        self.vocabulary = DNA_IDS if section.alphabet == "dna" else BYTES
        self.directories = {"train": folder / "train", "test": folder / "test"}
        self.directories["valid"] = folder / ("valid" if (folder / "valid").is_dir() else "test")
        for split in ("train", "valid"):
            if not self.directories[split].is_dir():
                wanted = "train" if split == "train" else "valid or test"
                there = ", ".join(_names(folder)) or "none"
                raise InputError(
                    f"data.folder: {folder} must hold a folder {wanted}, with a folder for each class; its folders "
                    f"are: {there}."
                )
        found = {split: self._names_of(split) for split in ("train", "valid")}
        if found["train"] != found["valid"]:
            told = "; ".join(f"{self.directories[s].name} has {', '.join(names)}" for s, names in found.items())
            raise InputError(
                f"data.folder: {folder}: both splits must have the same classes; {told}. Name the wanted ones in data.classes."
            )
        self.names = found["train"]
        if len(self.names) < 2:
            raise InputError(
                f"data.folder: {folder / 'train'} must hold at least two folders of classes; got "
                f"{', '.join(self.names) or 'none'}."
            )

    def part(self, split: str) -> ClassFiles:
        """The files of a split in the order of their classes and names. Raises: InputError for a class without files."""
        directory = self.directories[split]
        if not directory.is_dir():
            raise InputError(f"data.folder: {self.folder} must hold a folder {split} for this split; there is none.")
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.names):
            own = _files(directory / name)
            files += own
            labels += [label] * len(own)
        return ClassFiles(files, labels, self._section.alphabet or "bytes", self._section.soft_mask)

    def _names_of(self, split: str) -> list[str]:
        there, wanted = _names(self.directories[split]), sorted(set(self._section.classes))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise InputError(
                f"data.classes: {self.directories[split]} must hold a folder for each class; it has "
                f"{', '.join(there) or 'none'}, and not {', '.join(missing)}. Correct the names."
            )
        return wanted or there


def _bytes(path: Path, data: bytes) -> IntArray:
    if not data:
        raise InputError(f"{path}: must hold a sequence; got an empty file. Remove it.")
    return np.frombuffer(data, dtype=np.uint8)


def _names(directory: Path) -> list[str]:
    """Folders inside, in order; those that begin with a dot are left out."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(directory: Path) -> list[Path]:
    """Files inside, in the order of their names; those that begin with a dot are left out."""
    if not directory.is_dir():
        raise InputError(f"data.folder: must hold the folder of a class {directory}; there is none.")
    with os.scandir(directory) as entries:
        found = sorted((entry.name, entry.is_file()) for entry in entries if not entry.name.startswith("."))
    others = [name for name, is_file in found if not is_file]
    if others:
        raise InputError(
            f"{directory}: the folder of a class must hold files only, a sequence each; got {others[0]!r}."
        )
    if not found:
        raise InputError(
            f"{directory}: the folder of a class must hold its sequences, a file each; got none. Remove it, or name the wanted "
            "classes in data.classes."
        )
    return [directory / name for name, _ in found]
