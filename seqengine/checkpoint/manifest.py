"""Hashes of a checkpoint's files, in the format of the sha256sum command, and what makes a directory durable."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "MANIFEST.sha256"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, hashes: Mapping[str, str]) -> None:
    """`sha256sum -c MANIFEST.sha256` in the directory checks it without this program."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    (directory / MANIFEST).write_text("".join(lines))


def read_manifest(directory: Path) -> dict[str, str]:
    """File name -> hash. Raises ValueError if it is missing or a line is not one."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory.name} has no {MANIFEST}")
    hashes = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or not name or "/" in name:
            raise ValueError(f"line {number} of {MANIFEST} is damaged")
        hashes[name] = digest
    if not hashes:
        raise ValueError(f"{MANIFEST} is empty")
    return hashes


def find_damage(directory: Path, names: Iterable[str], hashes: Mapping[str, str]) -> list[str]:
    """What is wrong with some of the files, a phrase each; empty if they are as they were written."""
    problems = []
    for name in names:
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != hashes[name]:
            problems.append(f"{name} does not have the contents that were saved")
    return problems


def sync(path: Path) -> None:
    """Force a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
