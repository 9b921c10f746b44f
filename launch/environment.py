"""What a launcher put into the environment. The only file of this floor that reads it."""

import os
from dataclasses import dataclass

from seqengine.errors import InputError


@dataclass(frozen=True)
class Processes:
    """This process among those of the job; one process that nobody launched is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """A launcher (torchrun, or anything that sets the same variables) started this process."""


def read_processes() -> Processes:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them.

    Raises InputError if some are set and others missing, or one is no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = {name: os.environ.get(name) for name in (*names, "LOCAL_WORLD_SIZE")}
    if all(values[name] is None for name in names):
        return Processes()
    bad = [f"{name}={values[name]!r}" for name in names if not (values[name] or "").isdigit()]
    if bad:
        raise InputError(f"environment: {', '.join(names)} must all be set by the launcher; got {', '.join(bad)}.")
    rank, world, local = (int(values[name] or 0) for name in names)
    return Processes(rank, world, local, int(values["LOCAL_WORLD_SIZE"] or world), launched=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare_deterministic_cuda() -> None:
    """cuBLAS is repeatable only with a fixed workspace, named before CUDA starts; a user's own choice stands."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
