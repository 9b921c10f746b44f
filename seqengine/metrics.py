"""Metrics of a run: RUN/metrics.jsonl always, a progress bar or plain lines, TensorBoard and W&B where asked for.

A training line has: step, tokens, loss (nats per token over all ranks' tokens), bits_per_token, lr, grad_norm,
tokens_per_second, peak_memory_bytes (of the rank with the most), seconds (of training so far, over all lives of the run); and
mfu where the peak of the devices is known. An evaluation line has "split": "valid", step, tokens, loss, bits_per_token,
windows.
RUN/events.jsonl has a line for every start of the run, and for what goes wrong: event, step, time.
"""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from seqengine.errors import InputError
from seqengine.runfiles import LineLog, read_lines
from seqengine.sinks import Events, Line, PlainLines, ProgressBar, Sink, TensorBoard, Wandb, WandbRun, describe

__all__ = [
    "FILE", "JsonLines", "Line", "Metrics", "bits", "describe", "peak_memory_bytes", "read_events", "read_metrics",
]  # fmt: skip

FILE = "metrics.jsonl"


def bits(nats: float) -> float:
    """nats / ln 2."""
    return nats / math.log(2.0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(run_dir: Path) -> list[Line]:
    """Every line of a run, in order; empty if it has none yet. A last line cut short by a crash is left out.

    Raises InputError for a line that no run wrote.
    """
    lines = read_lines(run_dir / FILE)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise InputError(
                f"{run_dir / FILE}:{number}: must be a line of metrics, with its step; got {line}. Delete it."
            )
    return lines


def read_events(run_dir: Path) -> list[Line]:
    """Every start, rewind and spike of a run, in order, but what a death cut short; empty if nothing was written."""
    return read_lines(run_dir / Events.FILE)


class JsonLines(LineLog):
    """Appends to metrics.jsonl. Lines that a resumed run repeats are dropped when it is opened.

    Those are the lines after `step`, and the evaluations of a run that is complete.
    """

    def __init__(self, run_dir: Path, *, step: int, total_steps: int) -> None:
        super().__init__(run_dir / FILE)
        self._run_dir, self._total_steps = run_dir, total_steps
        self._open(step)

    def _open(self, step: int) -> None:
        lines = read_metrics(self._run_dir)
        self.go_on_from([line for line in lines if step > 0 and not self._is_repeated(line, step)])

    def _is_repeated(self, line: Line, step: int) -> bool:
        return bool(line["step"] > step or ("split" in line and line["step"] == step >= self._total_steps))

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`: the run went back to it."""
        self.close()
        self._open(step)


class Metrics:
    """All sinks of the rank that writes; none on the others."""

    def __init__(self, sinks: list[Sink], events: Events | None = None) -> None:
        self._sinks, self._events = sinks, events

    @classmethod
    def open(
        cls, run_dir: Path, *, total_steps: int, step: int, tensorboard: bool = False, wandb: WandbRun | None = None
    ) -> "Metrics":
        """Of a run that goes on from `step`. Raises InputError if TensorBoard or W&B is asked for and not installed."""
        others: list[Sink] = [TensorBoard(run_dir, step=step)] if tensorboard else []
        if wandb is not None:
            others.append(Wandb(run_dir, wandb, step=step))
        console: Sink = ProgressBar(total_steps, step) if sys.stdout.isatty() else PlainLines(total_steps)
        lines = JsonLines(run_dir, step=step, total_steps=total_steps)
        metrics = cls([lines, console, *others], Events(run_dir))
        metrics.event("start", step, total_steps=total_steps)
        return metrics

    def write(self, line: Line) -> None:
        for sink in self._sinks:
            sink.write(line)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Of this kind, at a step, now: "start", "rewind", "spike"."""
        if self._events is not None:
            self._events.write({"event": kind, "step": step, "time": time.time(), **details})

    def rewind(self, step: int) -> None:
        """The run went back to `step`, and will write the lines after it again."""
        self.event("rewind", step)
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        if self._events is not None:
            self._events.close()
