"""RUN/launch.json: what was launched last and under which number; and whether a run is in use, so that no second one starts."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from seqengine.errors import InputError
from seqengine.launch import slurm
from seqengine.watchdog import ENDED, Beat, read_beats, write_aside

FILE, FOLDER, LOCK = "launch.json", "launch", ".lock"
BEAT_SECONDS = 60.0
"""A rank on another machine counts as alive for so long after its last heartbeat."""
CLOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Launch:
    """One launch of a run."""

    scheduler: str
    number: int
    """Its files are in RUN/launch/NUMBER."""
    logs: str
    """RUN/logs/LOGS-RANK.log."""
    nodes: int
    processes: int
    time: float
    """Seconds since 1970."""
    host: str
    """The machine that launched."""
    job: str | None = None
    """Slurm's number; None until it has given one."""
    pid: int | None = None
    """Of a local launch: the process that started the others."""
    started: float | None = None
    """When that process started, which tells it from a later one of the same number."""

    def write(self, run: Path) -> None:
        """Aside and renamed: readers see the record before or this one."""
        write_aside(run / FILE, asdict(self))

    @staticmethod
    def restore(before: "Launch | None", run: Path) -> None:
        """The record as it was before one was written."""
        if before is None:
            (run / FILE).unlink(missing_ok=True)
        else:
            before.write(run)

    @classmethod
    def read(cls, run: Path) -> "Launch | None":
        """None if nothing was launched here. Raises InputError for a file that is no such record."""
        file = run / FILE
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file}: must be the record of a launch; it cannot be read: {error}.") from None

    @classmethod
    def find(cls, run: Path) -> "Launch":
        """Raises InputError if nothing was launched here."""
        found = cls.read(run)
        if found is None:
            raise InputError(f"{run}: must be a run that `seqengine launch` started; it has no {FILE}.")
        return found

    @property
    def is_running_here(self) -> bool:
        """Of a local launch, on the machine that launched."""
        if self.pid is None or self.started is None or self.host != socket.gethostname():
            return False
        started = started_at(self.pid)
        return started is not None and abs(started - self.started) < CLOCK_SECONDS


def started_at(pid: int) -> float | None:
    """When a process of this machine started, in seconds since 1970; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def living(run: Path) -> list[Beat]:
    """The last heartbeats of ranks that are alive: of this machine by their process, of others by the age of the beat."""
    now, here = time.time(), socket.gethostname()
    found = []
    for beat in read_beats(run):
        if beat.phase == ENDED:
            continue
        if beat.host == here:
            started = started_at(beat.pid)
            is_alive = started is not None and started < beat.time + CLOCK_SECONDS
        else:
            is_alive = now - beat.time < BEAT_SECONDS
        if is_alive:
            found.append(beat)
    return found


def check_free(run: Path) -> None:
    """Raises InputError if a job of this run waits or runs, or its ranks are alive."""
    last = Launch.read(run)
    if last is not None and last.scheduler == "slurm":
        if last.job is None:
            raise InputError(
                f"{run} is in use: a launch on {last.host} was cut short before Slurm's number was known. Look for the job "
                f"with squeue, cancel it, and delete {run / FILE}."
            )
        try:
            job = slurm.show(last.job)
        except InputError as error:
            raise InputError(
                f"{run} may be in use: Slurm job {last.job}, submitted on {last.host}, cannot be asked for: {error}. "
                f"If it is over, delete {run / FILE}."
            ) from None
        if not slurm.is_over(job):
            state = (job or {}).get("JobState", "")
            raise InputError(
                f"{run} is in use: Slurm job {last.job} is {state}. Wait for it, or say `seqengine launch cancel {run}`."
            )
    if last is not None and last.is_running_here:
        raise InputError(
            f"{run} is in use: process {last.pid} on {last.host} trains it. Wait, or say `seqengine launch cancel {run}`."
        )
    alive = living(run)
    if alive:
        b = alive[0]
        raise InputError(
            f"{run} is in use: rank {b.rank} (process {b.pid} on {b.host}) was at step {b.step} "
            f"{time.time() - b.time:.0f} s ago. Stop it, or name another directory with run.dir=..."
        )


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Of launches of one run at the same time, one goes on. Raises InputError in the others. RUN/launch must exist."""
    with (run / FOLDER / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run} is in use: another launch is under way.") from None
        yield
