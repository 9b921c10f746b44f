"""Where lines of metrics go besides RUN/metrics.jsonl: a terminal, plain lines, TensorBoard, Weights & Biases."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from seqengine.config.run import RunConfig
from seqengine.config.sections import LogSection
from seqengine.errors import InputError
from seqengine.runfiles import LineLog, read_lines

Line = dict[str, Any]
TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb-id"
INSTALL = "{key}: {name} {fault}; pip install 'seqengine-train[{extra}]', or leave it false."


class Sink(Protocol):
    """Takes lines as they come."""

    def write(self, line: Line) -> None: ...

    def rewind(self, step: int) -> None:
        """The run went back to `step`, and will write the lines after it again."""

    def close(self) -> None: ...


def check_sinks(log: LogSection) -> None:
    """Raises InputError if what [log] asks for is not installed; imports nothing."""
    wanted = ((log.tensorboard, "TensorBoard", TENSORBOARD), (log.wandb, "Weights & Biases", WANDB))
    problems = [
        INSTALL.format(key=f"log.{extra}", name=name, extra=extra, fault="is not installed")
        for is_on, name, extra in wanted
        if is_on and not is_installed(extra)
    ]
    if problems:
        raise InputError(*problems)


def _cannot_import(name: str, extra: str, error: ImportError) -> InputError:
    return InputError(INSTALL.format(key=f"log.{extra}", name=name, extra=extra, fault=f"cannot be imported ({error})"))


def is_installed(package: str) -> bool:
    """Whether a package could be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is imported, and says nothing of where it came from
        return True


def short_number(value: float) -> str:
    """12,345 as 12.3k, to three digits: 950, 1.05M, 13.1B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """90061 as 1 d 01:01:01."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def figures(line: Line) -> list[tuple[str, str]]:
    """(name, text) of what a training line tells; MFU where it is known."""
    found = [
        ("tokens", short_number(line["tokens"])),
        ("loss", f"{line['loss']:.5f} nats"),
        ("bits/token", f"{line['bits_per_token']:.5f}"),
        ("lr", f"{line['lr']:.2e}"),
        ("grad", f"{line['grad_norm']:.3f}"),
        ("speed", f"{line['tokens_per_second']:,.0f} tok/s"),
    ]
    if "mfu" in line:
        found.append(("MFU", f"{line['mfu']:.1%}"))
    return [*found, ("memory", f"{line['peak_memory_bytes'] / 2**30:.2f} GiB")]


def describe(line: Line, total_steps: int) -> str:
    """A line of metrics for people."""
    head = f"step {line['step']:>{len(str(total_steps))}}/{total_steps}"
    loss = f"loss {line['loss']:.5f} nats  {line['bits_per_token']:.5f} bits/token"
    if "split" in line:
        share = f"  accuracy {line['accuracy']:.2%}" if "accuracy" in line else ""
        return f"{head}  {line['split']} {loss}{share}  ({line['windows']} windows)"
    told = dict(figures(line))
    mfu = f"  MFU {told['MFU']}" if "MFU" in told else ""
    return f"{head}  {loss}  lr {told['lr']}  grad {told['grad']}  {told['speed']}{mfu}  {told['memory']}"


class PlainLines:
    """One line of key=value on standard output: for pipes and logs of batch jobs."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, line: Line) -> None:
        print(describe(line, self._total), flush=True)

    def rewind(self, step: int) -> None:
        """What was printed stays."""

    def close(self) -> None:
        """Nothing to close."""


class ProgressBar:
    """A bar and the newest figures on a terminal; evaluation lines are printed above it."""

    def __init__(self, total_steps: int, step: int, *, console: Console | None = None) -> None:
        self._total = total_steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=False),
            TextColumn("\n{task.fields[figures]}"),
            console=console or Console(),
            speed_estimate_period=600.0,
        )
        self._task: TaskID = self._bar.add_task("training", total=total_steps, completed=step, figures="")
        self._bar.start()

    def write(self, line: Line) -> None:
        if "split" in line:
            self._bar.console.print(describe(line, self._total), highlight=False)
            return
        told = "  ".join(f"{name} {text}" for name, text in figures(line))
        self._bar.update(self._task, completed=line["step"], figures=told)

    def rewind(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def close(self) -> None:
        self._bar.stop()


class TensorBoard:
    """Event files in RUN/tensorboard; what a resumed run writes again replaces what was there after `step`."""

    def __init__(self, run_dir: Path, *, step: int = 0) -> None:
        self._folder = run_dir / TENSORBOARD
        self._open(step)

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _cannot_import("TensorBoard", TENSORBOARD, error) from error
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, line: Line) -> None:
        for key, value in _scalars(line).items():
            self._writer.add_scalar(key, value, line["step"])

    def rewind(self, step: int) -> None:
        self.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class WandbRun(NamedTuple):
    """What Weights & Biases is told of a run."""

    project: str
    name: str
    offline: bool
    """Write RUN/wandb and send nothing; `wandb sync` sends it later. False: as WANDB_MODE says, else online."""
    config: Mapping[str, Any]

    @classmethod
    def of(cls, config: RunConfig) -> "WandbRun | None":
        """By [log]; None if it does not ask for one."""
        log = config.log
        if not log.wandb:
            return None
        return cls(log.wandb_project, config.run.name, log.wandb_offline, config.model_dump(mode="json"))


class Wandb:
    """A run at Weights & Biases. RUN/wandb-id keeps its name there, so that a resumed run goes on in it.

    Steps are a metric of their own (`step`): what a run writes again after going back is shown beside what was there.
    """

    def __init__(self, run_dir: Path, settings: WandbRun, *, step: int = 0) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _cannot_import("Weights & Biases", WANDB, error) from error
        file = run_dir / WANDB_ID
        if step == 0 or not file.is_file():
            file.write_text(uuid.uuid4().hex[:16] + "\n")
        self._run = wandb.init(
            project=settings.project,
            name=settings.name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(settings.config),
            **({"mode": "offline"} if settings.offline else {}),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Line) -> None:
        self._run.log({**_scalars(line), "step": line["step"]})

    def rewind(self, step: int) -> None:
        """What was sent stays."""

    def close(self) -> None:
        self._run.finish()


class Events(LineLog):
    """RUN/events.jsonl: what happened to a run, which metrics do not tell: starts, rewinds, spikes. All of them are kept."""

    FILE = "events.jsonl"

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / self.FILE)
        self.go_on_from(read_lines(self._path))


def _scalars(line: Line) -> Line:
    """train/loss, valid/loss and so on: what can be drawn."""
    prefix = line.get("split", "train")
    return {f"{prefix}/{key}": value for key, value in line.items() if key not in ("step", "split")}
