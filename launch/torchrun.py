"""Start the processes of a run on this machine, with torchrun's variables, and give back their exit code.

A supervisor of its own in place of torchrun's agent, because a run's exit codes have meanings that the agent does not know: bad
input (2) and a preempted run (75) are never started again; signals go to every worker once, with time to save; each life meets
at a port and in a store of its own, so that a restarted one cannot read the addresses of the one before.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from seqengine.errors import BAD_INPUT, FAILED, PREEMPTED
from seqengine.launch.environment import worker_environment

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
SHUTDOWN_SECONDS = 300
"""After a signal, workers have so long to save."""
SETTLE_SECONDS = 10.0
"""After one failed, the others have so long to find out by themselves and say why."""
PERIOD_SECONDS = 0.05
PR_SET_PDEATHSIG = 1


def run_local(
    arguments: Sequence[str],
    num_processes: int,
    *,
    max_restarts: int = 0,
    signals: Sequence[str] = SIGNALS,
    command: Sequence[str] = (sys.executable, "-m", "seqengine"),
    shutdown_seconds: float = SHUTDOWN_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
) -> int:
    """`COMMAND ARGUMENTS` in `num_processes` processes (`python -m seqengine` if not given); returns their exit code.

    0 if all succeed. 75 if they were preempted. 2 if one met bad input. 128 + N if signal N ended them before they could save.
    1 otherwise, once `max_restarts` lives more have failed too: a worker that is killed or fails ends its life for all, and
    all are started again. Nothing is started again after 2, 75 or a signal.
    The first of `signals`, SIGTERM or SIGINT goes on to every worker, which has `shutdown_seconds` to end; the second ends
    all at once. Whatever happens, this process killed included, no worker is left behind. Call from the main thread.
    """
    request = _Request()
    with _handlers(request, {*signals, "SIGTERM", "SIGINT"}):
        for life in range(max_restarts + 1):
            code, what = _Life([*command, *arguments], num_processes, request, shutdown_seconds, settle_seconds).run()
            if what:
                print(f"seqengine: {what}; the first error is above.", file=sys.stderr, flush=True)
            if code != FAILED or request.received or life == max_restarts:
                break
            print(
                f"seqengine: starting all processes again ({life + 1} of {max_restarts}).", file=sys.stderr, flush=True
            )
    return code


@dataclass
class _Request:
    """The signals that this process got, oldest first."""

    received: list[int] = field(default_factory=list)

    @property
    def is_urgent(self) -> bool:
        return len(self.received) > 1


@contextmanager
def _handlers(request: _Request, names: set[str]) -> Iterator[None]:
    """Note signals, for the time of a `with` block."""

    def note(number: int, frame: FrameType | None) -> None:
        request.received.append(number)

    numbers = [signal.Signals[name] for name in sorted(names)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Life:
    """All workers once: from their start to the end of the last."""

    def __init__(
        self, command: list[str], num_processes: int, request: _Request, shutdown_seconds: float, settle_seconds: float
    ) -> None:
        self._command, self._num_processes, self._request = command, num_processes, request
        self._shutdown_seconds, self._settle_seconds = shutdown_seconds, settle_seconds
        self._workers: list[subprocess.Popen[bytes]] = []
        self._ended_here: set[int] = set()
        self._deadline = float("inf")

    def run(self) -> tuple[int, str]:
        """The exit code of the life, and what to tell people if it failed."""
        try:
            with _free_port() as port:
                for rank in range(self._num_processes):
                    self._workers.append(self._start(rank, port))
                self._watch()
        finally:
            self._end_all()
        return self._outcome()

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            env=worker_environment(rank, self._num_processes, port),
            start_new_session=True,  # a terminal's Ctrl-C reaches a worker once, through this process
            preexec_fn=_die_with(os.getpid()),
        )

    def _watch(self) -> None:
        has_passed_on, first_failure = False, True
        while sum(self._is_running(worker) for worker in self._workers):  # all are looked at
            now = time.monotonic()
            if self._request.received and not has_passed_on:
                has_passed_on = True
                self._deadline = min(self._deadline, now + self._shutdown_seconds)
                for worker in self._workers:
                    if worker.returncode is None:
                        os.kill(worker.pid, self._request.received[0])
            failed = [w.returncode for w in self._workers if w.returncode not in (None, 0, PREEMPTED)]
            if failed and first_failure:
                first_failure = False
                is_killed = any(code < 0 for code in failed)  # it left no word, and the others wait for it
                self._deadline = min(self._deadline, now + (0.0 if is_killed else self._settle_seconds))
            if now >= self._deadline or self._request.is_urgent:
                return
            time.sleep(PERIOD_SECONDS)

    @staticmethod
    def _is_running(worker: subprocess.Popen[bytes]) -> bool:
        """If it has ended, what it started and left goes too, while its number cannot be another's."""
        if (
            worker.returncode is None
            and os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        ):
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        return worker.returncode is None

    def _end_all(self) -> None:
        for rank, worker in enumerate(self._workers):
            if self._is_running(worker):
                self._ended_here.add(rank)
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

    def _outcome(self) -> tuple[int, str]:
        codes = {rank: worker.returncode for rank, worker in enumerate(self._workers)}
        own = {code for rank, code in codes.items() if rank not in self._ended_here}
        ended = ", ".join(f"rank {rank}: {self._describe(rank, code)}" for rank, code in codes.items() if code)
        if not self._ended_here and own <= {0, PREEMPTED}:
            return max(own), ""
        if self._request.is_urgent:
            return 128 + self._request.received[1], ""
        what = f"processes failed ({ended})"
        if BAD_INPUT in own:
            return BAD_INPUT, what
        if self._request.received and own <= {0, PREEMPTED, -self._request.received[0]}:
            return 128 + self._request.received[0], f"stopped before the run was saved ({ended})"
        return FAILED, what

    def _describe(self, rank: int, code: int) -> str:
        if rank in self._ended_here:
            return "ended with the others"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextmanager
def _free_port() -> Iterator[int]:
    """A port of this machine that stays ours: bound, but not listened at, it is given to nobody who does not ask for it.

    The store of rank 0 asks for it, and may listen at it because both sides allow the address to be used again.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def _die_with(parent: int) -> Callable[[], None]:
    """For a new process: be killed when `parent` dies, however it dies (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def ask() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)

    return ask
