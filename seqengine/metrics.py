"""Metrics of a run: RUN/metrics.jsonl always, a progress bar or plain lines, TensorBoard where asked for.

A training line has: step, tokens, loss (nats per token over all ranks' tokens), bits_per_token, lr, grad_norm,
tokens_per_second, peak_memory_bytes (of the rank with the most), seconds (of training so far, over all lives of the run).
An evaluation line has "split": "valid", step, tokens, loss, bits_per_token, windows.
"""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from seqengine.errors import InputError

FILE = "metrics.jsonl"
Line = dict[str, Any]


def bits(nats: float) -> float:
    """nats / ln 2."""
    return nats / math.log(2.0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(run_dir: Path) -> list[Line]:
    """Every line of a run, in order; empty if it has none yet. A last line cut short by a crash is left out."""
    path = run_dir / FILE
    lines: list[Line] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Sink(Protocol):
    """Takes lines as they come."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends to metrics.jsonl. Lines that a resumed run repeats are dropped when it is opened.

    Those are the lines after `step`, and the evaluations of a run that is complete.
    """

    def __init__(self, run_dir: Path, *, step: int, total_steps: int) -> None:
        self._run_dir, self._total_steps = run_dir, total_steps
        self._open(step)

    def _open(self, step: int) -> None:
        path = self._run_dir / FILE
        kept = [line for line in read_metrics(self._run_dir) if step > 0 and not self._is_repeated(line, step)]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self._file = path.open("a", buffering=1)

    def _is_repeated(self, line: Line, step: int) -> bool:
        return bool(line["step"] > step or ("split" in line and line["step"] == step >= self._total_steps))

    def write(self, line: Line) -> None:
        self._file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`: the run went back to it."""
        self.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()


class PlainLines:
    """One line of key=value on standard output: for pipes and logs of batch jobs."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, line: Line) -> None:
        print(describe(line, self._total), flush=True)

    def close(self) -> None:
        """Nothing to close."""


class ProgressBar:
    """A bar on a terminal; evaluation lines are printed above it."""

    def __init__(self, total_steps: int, step: int) -> None:
        self._total = total_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self._task: TaskID = self._bar.add_task("training", total=total_steps, completed=step, figures="")
        self._bar.start()

    def write(self, line: Line) -> None:
        if "split" in line:
            self._bar.console.print(describe(line, self._total), highlight=False)
            return
        figures = f"{line['bits_per_token']:.4f} bits  {line['tokens_per_second']:,.0f} tok/s  lr {line['lr']:.1e}"
        self._bar.update(self._task, completed=line["step"], figures=figures)

    def close(self) -> None:
        self._bar.stop()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "log.tensorboard: TensorBoard is not installed; pip install 'seqengine-train[tensorboard]', or leave it false."
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, line: Line) -> None:
        prefix = line.get("split", "train")
        for key, value in line.items():
            if key not in ("step", "split"):
                self._writer.add_scalar(f"{prefix}/{key}", value, line["step"])

    def close(self) -> None:
        self._writer.close()


def describe(line: Line, total_steps: int) -> str:
    """A line of metrics for people."""
    head = f"step {line['step']:>{len(str(total_steps))}}/{total_steps}"
    loss = f"loss {line['loss']:.5f} nats  {line['bits_per_token']:.5f} bits/token"
    if "split" in line:
        return f"{head}  {line['split']} {loss}  ({line['windows']} windows)"
    memory = line["peak_memory_bytes"] / 2**30
    return (
        f"{head}  {loss}  lr {line['lr']:.2e}  grad {line['grad_norm']:.3f}  "
        f"{line['tokens_per_second']:,.0f} tok/s  {memory:.2f} GiB"
    )


class Metrics:
    """All sinks of the rank that writes; none on the others."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    @classmethod
    def open(cls, run_dir: Path, *, total_steps: int, step: int, tensorboard: bool) -> "Metrics":
        console: Sink = ProgressBar(total_steps, step) if sys.stdout.isatty() else PlainLines(total_steps)
        lines = JsonLines(run_dir, step=step, total_steps=total_steps)
        return cls([lines, console, *([TensorBoard(run_dir)] if tensorboard else [])])

    def write(self, line: Line) -> None:
        for sink in self._sinks:
            sink.write(line)

    def rewind(self, step: int) -> None:
        """The run went back to `step`, and will write the lines after it again."""
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.rewind(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
