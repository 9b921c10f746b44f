"""Hashes of a checkpoint's files, in the format of the sha256sum command, and what makes a directory durable."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "MANIFEST.sha256"
TENSOR_FILES = "*.distcp"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_text(hashes: Mapping[str, str]) -> str:
    """`sha256sum -c MANIFEST.sha256` in the directory checks it without this program."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def read_manifest(directory: Path, needed: Iterable[str] = ()) -> dict[str, str]:
    """File name -> hash.

    needed: names that must be listed; so must every file of tensors that lies in the directory.
    Raises: ValueError if the manifest is missing or is not, to the byte, one that `manifest_text` makes.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory.name} has no {MANIFEST}")
    content = path.read_bytes()
    hashes = {}
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[:-1], start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or not name or "/" in name:
            raise ValueError(f"line {number} of {MANIFEST} is damaged")
        hashes[name] = digest
    if not hashes:
        raise ValueError(f"{MANIFEST} is empty")
    if manifest_text(hashes).encode() != content:
        raise ValueError(f"{MANIFEST} is damaged")
    present = {p.name for p in directory.glob(TENSOR_FILES)}
    missing = sorted({*needed, *present} - hashes.keys())
    if missing:
        raise ValueError(f"{MANIFEST} does not list {', '.join(missing)}")
    return hashes


def find_damage(directory: Path, names: Iterable[str], hashes: Mapping[str, str]) -> list[str]:
    """What is wrong with some of the files, a phrase each; empty if they are as they were written."""
    problems = []
    for name in names:
        try:
            if sha256(directory / name) != hashes[name]:
                problems.append(f"{name} does not have the contents that were saved")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def sync(path: Path) -> None:
    """Force a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Let the next read of a synced file come from the disk, where the system can be told to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
