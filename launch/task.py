"""One process of a launched run: `python -m seqengine.launch.task LOGS PREEMPTED train CONFIG`; `-` for what is not wanted.

LOGS: what the process prints goes to the end of LOGS-RANK.log. PREEMPTED: a file to make if the run is preempted. Both are bare
words because torchrun takes options of its script for its own.

Launchers other than our own take every exit code but 0 for a failure and end the other processes at once, perhaps before
they have said why or have ended well. So here a preempted run leaves PREEMPTED behind and ends with 0, and of several processes
that found the same bad input those that say nothing wait for the one that speaks.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from seqengine.errors import BAD_INPUT, PREEMPTED
from seqengine.launch.cli import main as seqengine
from seqengine.launch.environment import Processes, read_processes
from seqengine.launch.scripts import NONE

SPEAK_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of seqengine as one process of several; returns the exit code."""
    logs, preempted, *command = sys.argv[1:] if argv is None else argv
    processes = read_processes()
    if logs != NONE:
        _redirect(f"{logs}-{processes.rank}.log")
    return _told(seqengine(command), None if preempted == NONE else Path(preempted), processes)


def _told(code: int, preempted: Path | None, processes: Processes) -> int:
    """What to tell a launcher for which every code but 0 is a failure."""
    if preempted is None:
        return code
    if code == PREEMPTED:
        if processes.local_rank == 0:  # on every node, so that its launcher finds the file at once
            preempted.touch()
        return 0
    if code == BAD_INPUT and processes.local_rank:
        time.sleep(SPEAK_SECONDS)
    return code


def _redirect(file: str) -> None:
    """Standard output and standard error of this process, and of all that it starts."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


if __name__ == "__main__":
    sys.exit(main())
