"""How a run stands, from its files alone: config.toml, metrics.jsonl, events.jsonl and the heartbeats of its ranks."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.metrics import FILE, Line, read_events
from seqengine.rundir import CONFIG, RunDirectory
from seqengine.sinks import describe, duration, figures
from seqengine.watchdog import ENDED, HEARTBEATS, STACKS, Beat, read_beats, stuck_ranks

State = Literal["absent", "starting", "running", "stuck", "stopped", "complete"]


@dataclass(frozen=True)
class Status:
    """A run at one moment."""

    run_dir: Path
    state: State
    config: RunConfig | None = None
    training: Line | None = None
    """The newest training line."""
    evaluations: tuple[Line, ...] = ()
    """The newest one of each split."""
    beats: tuple[Beat, ...] = ()
    stuck: tuple[Beat, ...] = ()
    """The first is the one to look at: ranks that wait for it stop soon after it does."""
    starts: int = 0
    now: float = 0.0

    @property
    def step(self) -> int:
        """Of the newest line or heartbeat."""
        lines = [line["step"] for line in (self.training, *self.evaluations) if line is not None]
        return max([*lines, *(beat.step for beat in self.beats)], default=0)

    @property
    def total_steps(self) -> int | None:
        return None if self.config is None else self.config.total_steps

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the newest line."""
        if self.config is None or self.training is None or not self.training["tokens_per_second"]:
            return None
        steps = max(0, self.config.total_steps - self.step)
        return float(steps * self.config.train.batch_tokens / self.training["tokens_per_second"])

    @property
    def trouble(self) -> str | None:
        """Which rank is stuck, and where to look."""
        if not self.stuck:
            return None
        first, others = self.stuck[0], len(self.stuck) - 1
        stacks = self.run_dir / STACKS / f"rank-{first.rank}.txt"
        text = (
            f"rank {first.rank} (host {first.host}, pid {first.pid}) has not moved for {self.now - first.time:.0f} s: "
            f"step {first.step}, phase {first.phase}"
        )
        text += f"; {others} more ranks after it" if others else ""
        return text + (f"; its stacks: {stacks}" if stacks.is_file() else "")


class MetricsTail:
    """metrics.jsonl as it grows. A run that resumes writes the file anew without the lines that it repeats."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._seen: list[str] = []
        self._inode, self._size = -1, 0
        self.lines: list[Line] = []

    def read(self) -> tuple[list[Line], bool]:
        """Lines that are new since the last call, and whether earlier ones were taken back."""
        try:
            facts = self._path.stat()
            if (facts.st_ino, facts.st_size) == (self._inode, self._size):
                return [], False
            if facts.st_ino == self._inode and facts.st_size > self._size:
                with self._path.open() as file:
                    file.seek(self._size)
                    text = file.read()
                kept = len(self._seen)
            else:
                text, kept = self._path.read_text(), 0
        except FileNotFoundError:
            return [], False
        whole = text[: text.rfind("\n") + 1]  # the last line may be half there
        fresh = whole.splitlines()
        self._inode = facts.st_ino
        self._size = (self._size if kept else 0) + len(whole.encode())
        if not kept:
            kept = next(
                (i for i, (a, b) in enumerate(zip(self._seen, fresh)) if a != b), min(len(self._seen), len(fresh))
            )
            fresh = fresh[kept:]
        went_back = kept < len(self._seen)
        new = [self._parsed(line, kept + i + 1) for i, line in enumerate(fresh)]
        self._seen[kept:], self.lines[kept:] = fresh, new
        return new, went_back

    def _parsed(self, text: str, number: int) -> Line:
        try:
            line: Line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{self._path}:{number}: must be a JSON object; {error.msg}. Delete the line.") from None
        return line


def read_status(run_dir: Path, lines: list[Line], stuck_after: float) -> Status:
    """How a run stands whose metrics so far are `lines`. stuck_after: seconds without a heartbeat.

    Raises InputError if its config or a heartbeat cannot be read.
    """
    if not (run_dir / CONFIG).is_file() and not (run_dir / HEARTBEATS).is_dir():
        return Status(run_dir, "absent")
    config = RunDirectory(run_dir).read_config(need_data=False).config if (run_dir / CONFIG).is_file() else None
    beats, stuck = read_beats(run_dir), stuck_ranks(run_dir, stuck_after)
    training = next((line for line in reversed(lines) if "split" not in line), None)
    newest = {line["split"]: line for line in lines if "split" in line}
    last = max((line["step"] for line in lines), default=0)
    state: State = "running"
    if not beats:
        state = "starting"
    elif stuck:
        state = "stuck"
    elif all(beat.phase == ENDED for beat in beats):
        state = "complete" if config is not None and last >= config.total_steps else "stopped"
    starts = sum(event["event"] == "start" for event in read_events(run_dir))
    found = tuple(beats), tuple(stuck), starts, time.time()
    return Status(run_dir, state, config, training, tuple(newest.values()), *found)


def summary(status: Status) -> list[tuple[str, str]]:
    """(name, text) of all that is known, for people."""
    name = status.run_dir.name if status.config is None else status.config.run.name
    found = [("run", f"{name} ({status.run_dir})"), ("state", status.state)]
    if status.trouble:
        found.append(("stuck", status.trouble))
    if status.state == "absent":
        return [*found, ("", f"no run here yet: there is no {CONFIG}")]
    total = status.total_steps
    found.append(("step", f"{status.step}/{total} ({status.step / total:.0%})" if total else str(status.step)))
    if status.training is not None:
        found += figures(status.training)
        found.append(("trained", duration(status.training["seconds"])))
    left = status.seconds_left
    if left is not None and status.state == "running":
        found.append(("ETA", duration(left)))
    found += [(line["split"], describe(line, total or line["step"])) for line in status.evaluations]
    if status.starts > 1:
        found.append(("starts", str(status.starts)))
    if status.beats:
        alive = [beat for beat in status.beats if beat.phase != ENDED]
        behind = min(alive or status.beats, key=lambda beat: (beat.time, beat.rank))
        found.append(
            ("ranks", f"{len(status.beats)}, {len(alive)} alive; the quietest: {beat_text(behind, status.now)}")
        )
    return found


def beat_text(beat: Beat, now: float) -> str:
    """Where a rank is."""
    return f"rank {beat.rank} on {beat.host}, step {beat.step}, {beat.phase}, {max(0.0, now - beat.time):.0f} s ago"
