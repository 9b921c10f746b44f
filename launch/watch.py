"""`seqengine watch`: follow a run from another terminal, on any machine that sees its directory."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seqengine.errors import FAILED, InputError
from seqengine.launch.run_status import MetricsTail, Status, read_status, summary
from seqengine.metrics import Line
from seqengine.sinks import describe

FIRST_LINES = 10
"""Lines of the past that a plain watch begins with."""
MOST_RANKS = 16
"""Ranks shown, the quietest ones first."""
BAR_WIDTH = 50
COLOURS = {"running": "green", "complete": "green", "stuck": "bold red", "stopped": "yellow"}


class Watch:
    """The plain form: what there is to say about a run since it was last asked."""

    def __init__(self, run_dir: Path, stuck_after: float) -> None:
        self.run_dir, self._stuck_after = run_dir, stuck_after
        self._tail = MetricsTail(run_dir)
        self._said = ""
        self._begun = False
        self.status = Status(run_dir, "absent")

    def poll(self) -> tuple[list[Line], list[str]]:
        """(new lines of metrics, what else has changed), and `status` brought up to date."""
        new, went_back = self._tail.read()
        self.status = read_status(self.run_dir, self._tail.lines, self._stuck_after)
        changes: list[str] = []
        if went_back:
            last = self._tail.lines[-1 - len(new)]["step"] if len(self._tail.lines) > len(new) else 0
            changes.append(f"the run went back to step {last}")
        state = self.status.state
        stuck = f"{self.status.stuck[0].rank}" if self.status.stuck else ""
        if (state + stuck) != self._said:
            self._said = state + stuck
            what = {"absent": f"waiting for {self.run_dir} to begin"}.get(state, f"{self.run_dir} is {state}")
            changes.append(f"{what}: {self.status.trouble}" if self.status.trouble else what)
        return new, changes

    def text(self) -> list[str]:
        """`poll` as lines to print, the last few of the past at first."""
        new, changes = self.poll()
        shown = new if self._begun else new[-FIRST_LINES:]
        self._begun = self._begun or bool(new)
        total = self.status.total_steps
        return changes + [describe(line, total or line["step"]) for line in shown]


def watch(run_dir: Path, *, once: bool, stuck_after: float, interval: float) -> int:
    """Follow a run until it is complete, or look once. Returns the exit code.

    Once: 1 if a rank is stuck, else 0. Raises InputError if there is no run to look at, or it cannot be read.
    """
    watched = Watch(run_dir, stuck_after)
    if once:
        watched.poll()
        if watched.status.state == "absent":
            raise InputError(
                f"{run_dir}: must be a run's directory; there is no config.toml. Leave out --once to wait for it."
            )
        _print_once(watched.status)
        return FAILED if watched.status.stuck else 0
    try:
        if sys.stdout.isatty():
            _follow_live(watched, interval)
        else:
            follow(watched, interval, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        return 0
    return 0


def follow(
    watched: Watch, interval: float, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Say what is new until the run is complete. A run that stopped may be started again: it is waited for."""
    while True:
        for line in watched.text():
            say(line)
        if watched.status.state == "complete":
            return
        sleep(interval)


def _print_once(status: Status) -> None:
    if sys.stdout.isatty():
        Console().print(panel(status))
        return
    for name, text in summary(status):
        print(f"{name:<11}{text}")


def _follow_live(watched: Watch, interval: float) -> None:
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            _, changes = watched.poll()
            for change in changes:
                console.print(change, highlight=False, markup=False)
            live.update(panel(watched.status), refresh=True)
            if watched.status.state == "complete":
                return
            time.sleep(interval)


def panel(status: Status) -> RenderableType:
    """A run on a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in summary(status):
        is_state = name in ("state", "stuck")
        table.add_row(name, Text(text, style=COLOURS.get(status.state, "") if is_state else ""))
    if status.total_steps:
        table.add_row("", ProgressBar(total=status.total_steps, completed=status.step, width=BAR_WIDTH))
    parts: list[RenderableType] = [table]
    if len(status.beats) > 1:
        parts.append(_ranks(status))
    return Panel(Group(*parts), title=str(status.run_dir), border_style=COLOURS.get(status.state, ""))


def _ranks(status: Status) -> Table:
    table = Table(title="ranks, the quietest first", title_justify="left")
    for name, side in (("rank", "right"), ("host", "left"), ("pid", "right"), ("step", "right"), ("phase", "left")):
        table.add_column(name, justify="right" if side == "right" else "left")
    table.add_column("seconds ago", justify="right")
    late = {beat.rank for beat in status.stuck}
    beats = sorted(status.beats, key=lambda beat: (beat.rank not in late, beat.time, beat.rank))
    for beat in beats[:MOST_RANKS]:
        age = f"{max(0.0, status.now - beat.time):.0f}"
        cells = str(beat.rank), beat.host, str(beat.pid), str(beat.step), beat.phase, age
        table.add_row(*cells, style="red" if beat.rank in late else "")
    if len(beats) > MOST_RANKS:
        table.caption = f"and {len(beats) - MOST_RANKS} more"
    return table
