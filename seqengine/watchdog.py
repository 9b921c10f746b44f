"""Heartbeats of every rank, and the end of a run that has stopped making progress.

RUN/heartbeat/rank-R.json says where a rank was last. A rank without a beat for too long appends the Python stacks of all its
threads to RUN/stacks/rank-R.txt, as do the others once they see that one has, and ends with exit code 1.

A thread does this while the main thread waits in a collective, which lets other threads run. If the main thread does not let
them (it holds the interpreter's lock), the C thread of `faulthandler` writes the stacks and ends the process a little later.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from seqengine.errors import FAILED, InputError
from seqengine.runfiles import write_whole

HEARTBEATS, STACKS, CALL = "heartbeat", "stacks", "call.json"
"""RUN/stacks/call.json: the last rank that was stuck, for the others to write their stacks too."""
ENDED = "ended"
"""The phase of a rank that closed its watchdog."""
PERIOD_SECONDS = 0.5
GRACE_SECONDS = 3.0
"""A stuck rank waits so long before it ends, so that the others write their stacks while their peers live."""


@dataclass(frozen=True)
class Beat:
    """Where a rank was, and when."""

    rank: int
    step: int
    phase: str
    time: float
    """Seconds since 1970, by the clock of its host."""
    host: str = ""
    pid: int = 0


class Watchdog:
    """The watch over one rank: `start`, a `beat` after every step, `close`.

    timeout_seconds: without a beat for so long, the process ends; None only writes heartbeats.
    num_ranks:       rank 0 removes the heartbeats of ranks that the run had before and has no longer.
    Costs:           a beat costs microseconds; the heartbeat is written at most twice a second, aside and renamed.
    Exit code 1:     after one line on standard error that names the file of stacks. A process that holds the interpreter's lock
                     writes its stacks, but no line.
    """

    def __init__(
        self, run_dir: Path, rank: int, *, timeout_seconds: float | None, num_ranks: int | None = None
    ) -> None:
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise ValueError(f"comm.step_timeout: must be above 0, or None; got {timeout_seconds}.")
        self._run_dir, self._rank, self._num_ranks = run_dir, rank, num_ranks
        self._timeout_seconds = timeout_seconds
        self._period = PERIOD_SECONDS if timeout_seconds is None else min(PERIOD_SECONDS, timeout_seconds / 4)
        self._beat = Beat(rank, 0, "start", time.time(), socket.gethostname(), os.getpid())
        self._written: Beat | None = None
        self._last = self._armed = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: TextIO | None = None
        self._call = 0
        self._warned = False

    @property
    def heartbeat_file(self) -> Path:
        return self._run_dir / HEARTBEATS / f"rank-{self._rank}.json"

    @property
    def stacks_file(self) -> Path:
        return self._run_dir / STACKS / f"rank-{self._rank}.txt"

    def start(self) -> None:
        """Begin the watch; the time until the first beat counts too."""
        for file in (self.heartbeat_file, self.stacks_file):
            file.parent.mkdir(parents=True, exist_ok=True)
        if self._rank == 0 and self._num_ranks is not None:
            for path in self.heartbeat_file.parent.glob("rank-*.json"):
                if int(path.stem.removeprefix("rank-")) >= self._num_ranks:
                    path.unlink(missing_ok=True)
        self._call = self._last_call()
        self._beat = Beat(self._rank, 0, "start", time.time(), self._beat.host, os.getpid())
        self._last = time.monotonic()
        self._write_heartbeat()
        if self._timeout_seconds is not None:
            self._stacks = self.stacks_file.open("a")
            self._arm()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str = "train") -> None:
        """This rank makes progress: it has done `step` steps and begins what `phase` names."""
        self._beat = Beat(self._rank, step, phase, time.time(), self._beat.host, self._beat.pid)
        self._last = time.monotonic()
        if self._stacks is not None and self._last - self._armed > self._period:
            self._arm()

    def close(self) -> None:
        """End the watch, and say in the heartbeat that this rank has ended. May be called twice, and before `start`."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._stacks = None
            if self.stacks_file.exists() and not self.stacks_file.stat().st_size:
                self.stacks_file.unlink()
        self._beat = Beat(self._rank, self._beat.step, ENDED, time.time(), self._beat.host, self._beat.pid)
        self._write_heartbeat()

    def _arm(self) -> None:
        """The last resort, which needs no lock of the interpreter: later than `_watch` would act."""
        assert self._stacks is not None
        assert self._timeout_seconds is not None
        self._armed = self._last
        faulthandler.dump_traceback_later(self._timeout_seconds + GRACE_SECONDS, exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(self._period):
            self._write_heartbeat()
            if self._stacks is None or self._timeout_seconds is None:
                continue
            quiet = time.monotonic() - self._last
            if quiet > self._timeout_seconds:
                self._end(self._stacks, quiet)
            elif (call := self._last_call()) != self._call:
                self._call = call
                self._dump(self._stacks, "another rank is stuck")

    def _end(self, stacks: TextIO, quiet: float) -> None:
        try:
            faulthandler.cancel_dump_traceback_later()
            self._dump(stacks, f"no progress for {quiet:.1f} s")
            print(
                f"seqengine: rank {self._rank}: no progress for {quiet:.0f} s after step {self._beat.step} "
                f"(phase {self._beat.phase}); the stacks of its threads are in {self.stacks_file}. Ending.",
                file=sys.stderr,
                flush=True,
            )
            write_aside(self.stacks_file.with_name(CALL), {"rank": self._rank, "time": time.time()})
            time.sleep(GRACE_SECONDS)
        finally:
            os._exit(FAILED)

    def _dump(self, stacks: TextIO, why: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        stacks.write(f"rank {self._rank}, {when}, step {self._beat.step}, phase {self._beat.phase}: {why}\n")
        stacks.flush()
        faulthandler.dump_traceback(stacks, all_threads=True)

    def _last_call(self) -> int:
        try:
            return self.stacks_file.with_name(CALL).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _write_heartbeat(self) -> None:
        """A disk that takes no heartbeats stops neither the run nor the watch."""
        beat = self._beat
        if beat == self._written:
            return
        try:
            write_aside(self.heartbeat_file, vars(beat))
            self._written = beat
        except OSError as error:
            if not self._warned:
                print(f"seqengine: rank {self._rank}: no heartbeat: {error}.", file=sys.stderr, flush=True)
            self._warned = True


def write_aside(path: Path, content: dict[str, Any]) -> None:
    """JSON that readers see whole or not at all."""
    write_whole(path, json.dumps(content) + "\n")


def read_beats(run_dir: Path) -> list[Beat]:
    """The last beat of every rank, by rank; empty if the run has none.

    A run that restarts on fewer ranks takes files away while they are read: those are left out. Raises InputError for a
    damaged one.
    """
    beats = []
    for path in (run_dir / HEARTBEATS).glob("rank-*.json"):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            what = f"{path.parent}: a heartbeat cannot be read: {path.name}: {error}"
            raise InputError(f"{what}. Delete the folder.") from error
    return sorted(beats, key=lambda beat: beat.rank)


def stuck_ranks(run_dir: Path, older_than_seconds: float) -> list[Beat]:
    """The ranks whose last beat is older, the oldest first; not those that ended by themselves.

    Ranks that wait for a stuck one stop beating soon after it does: the first of the list is the one to look at.
    """
    now = time.time()
    late = [b for b in read_beats(run_dir) if b.phase != ENDED and now - b.time > older_than_seconds]
    return sorted(late, key=lambda beat: (beat.time, beat.rank))
