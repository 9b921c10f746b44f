"""Files of a run's directory: whether they can be written, told before anything is made, and how they are.

A file is replaced whole, so that whoever reads it finds the old text or the new one; a log of JSON lines goes on from the lines
that a life of the run keeps.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seqengine.checkpoint.manifest import sync
from seqengine.errors import InputError

FOLDERS = ("ckpt", "heartbeat", "stacks", "samples", "nonfinite", "tensorboard", "wandb", "profile")
FILES = ("config.toml", "environment.json", "metrics.jsonl", "events.jsonl")
REMEDY = "Move it away, or set run.dir to another directory."


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's text. durable: the new text is on the disk before the old one goes, whenever the machine dies."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    if durable:
        sync(aside)
    aside.replace(path)


class LineLog:
    """A file of JSON lines that a run appends to, line by line on the disk's way."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def go_on_from(self, kept: Iterable[Mapping[str, Any]]) -> None:
        """Begin with these lines in place of what the file holds."""
        write_lines(self._path, kept)
        self._file = self._path.open("a", buffering=1)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSON line for each, in place of what the file holds."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[Any]:
    """What the lines of a log say, up to one that is not whole, as a death leaves it; empty if there is no file."""
    lines: list[Any] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def check_place(run: Path) -> None:
    """Raises InputError naming all that is in the way of a run's directory, or of a file or directory in it."""
    found = [run / name for name in FOLDERS if _is_there(run / name) and not os.path.isdir(run / name)]
    problems = [f"{path}: must be a directory of the run; it is a file. {REMEDY}" for path in found]
    found = [run / name for name in FILES if _is_there(run / name) and not os.path.isfile(run / name)]
    problems += [f"{path}: must be a file of the run; it is a directory. {REMEDY}" for path in found]
    reason = _why_unwritable(run)
    if reason:
        problems.append(
            f"run.dir: {run} must be a directory that can be written; {reason}. Set run.dir to another one."
        )
    if problems:
        raise InputError(*problems)


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)  # of os.path, because pathlib raises for a name that is too long


def _why_unwritable(run: Path) -> str:
    """Empty if a directory is there, or can be made, and can be written."""
    place = next(path for path in (run, *run.absolute().parents) if _is_there(path))
    if not os.path.isdir(place):
        return f"{place} is a file"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} is not writable"
    longest = os.pathconf(place, "PC_NAME_MAX")
    long = [part for part in run.parts if len(os.fsencode(part)) > longest]
    return f"a name has {len(os.fsencode(long[0]))} bytes, and the disk takes {longest}" if long else ""
