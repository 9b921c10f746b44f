"""Parts of a save or load that all ranks do together: if one fails, every rank raises, and none waits for ever."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

import torch.distributed as dist

from seqengine.parallel.comm import gather_objects

Result = TypeVar("Result")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    value: Result | None = None
    problem: str | None = None
    errno: int | None = None


@dataclass(frozen=True)
class Team:
    """The ranks of a store. group: None in a single process."""

    directory: Path
    rank: int
    group: dist.ProcessGroup | None

    def do(self, what: str, part: Callable[[], Result]) -> list[Result]:
        """Run a part on every rank; returns what it gave on each, in the order of ranks, on all of them.

        Raises CheckpointError on every rank if the part failed on any, or if a rank is gone. KeyboardInterrupt and SystemExit
        of this rank pass.
        """
        cause: BaseException | None = None
        try:
            mine = _Outcome(value=part())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  torch's CheckpointException is no Exception
            cause = error
            number = error.errno if isinstance(error, OSError) else None
            mine = _Outcome(problem=f"rank {self.rank}: {_words(error)}", errno=number)
        try:
            everyone = cast("list[_Outcome[Result]]", gather_objects(mine, self.group))
        except RuntimeError as error:
            raise CheckpointError(f"{self.directory}: could not {what} with all ranks: {error}") from (cause or error)
        problems = [outcome.problem for outcome in everyone if outcome.problem is not None]
        if problems:
            advice = _advice({outcome.errno for outcome in everyone})
            raise CheckpointError(f"{self.directory}: could not {what}: {'; '.join(problems)}. {advice}") from cause
        return [cast("Result", outcome.value) for outcome in everyone]

    def lead(self, what: str, part: Callable[[], None]) -> None:
        """Run a part on rank 0, while the others wait for it."""
        self.do(what, part if self.rank == 0 else _nothing)


def _nothing() -> None:
    return None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


def _advice(numbers: set[int | None]) -> str:
    if numbers.intersection(FULL):
        return "Free space there, or keep fewer checkpoints (ckpt.keep); whole checkpoints are as they were."
    if numbers.intersection(CLOSED):
        return "Make the directory writable, or use another (run.dir); whole checkpoints are as they were."
    return "Whole checkpoints are as they were."
