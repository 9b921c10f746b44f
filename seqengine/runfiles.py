"""Whether a run can write where its directory is to be: told before anything is made."""

import os
from pathlib import Path

from seqengine.errors import InputError

FOLDERS = ("ckpt", "heartbeat", "stacks", "samples", "nonfinite", "tensorboard")
FILES = ("config.toml", "environment.json", "metrics.jsonl")
REMEDY = "Move it away, or set run.dir to another directory."


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
