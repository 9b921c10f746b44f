"""Everything that a run's directory says, read and checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.metrics import FILE, Line, read_events
from seqengine.nonfinite import NONFINITE
from seqengine.rundir import CONFIG, ENVIRONMENT, RunDirectory

NUMBERS = ("step", "tokens", "loss", "bits_per_token")
"""What every line has."""


@dataclass(frozen=True)
class Record:
    """One run."""

    path: Path
    label: str
    """Its name, and the path where two runs of a report have the same name."""
    config: RunConfig
    config_text: str
    environment: dict[str, Any]
    training: tuple[Line, ...]
    evaluations: dict[str, tuple[Line, ...]]
    """By split, in order."""
    events: tuple[Line, ...]
    nonfinite: dict[int, tuple[Line, ...]]
    """By step, the reports of all ranks."""
    is_cut: bool
    """The last line of metrics is only half there."""

    @property
    def counts_bases(self) -> bool:
        """A token is a base."""
        return self.config.data.source in ("fasta", "synthetic")


def read_records(run_dirs: Sequence[Path]) -> list[Record]:
    """Raises InputError for what is no run, for a run without metrics, and for lines that cannot be read; all at once."""
    records: list[Record] = []
    problems: list[str] = []
    for run_dir in run_dirs:
        try:
            records.append(_read_record(run_dir))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    names = [record.config.run.name for record in records]
    return [
        record if names.count(record.label) == 1 else replace(record, label=f"{record.label} ({record.path})")
        for record in records
    ]


def _read_record(run_dir: Path) -> Record:
    run = RunDirectory(run_dir)
    config = run.read_config(need_data=False).config
    lines, is_cut = _read_metrics(run_dir / FILE)
    if not lines:
        raise InputError(f"{run_dir}: must have lines in {FILE} to report on; there are none. Train it first.")
    splits = dict.fromkeys(line["split"] for line in lines if "split" in line)
    environment = run_dir / ENVIRONMENT
    return Record(
        path=run_dir,
        label=config.run.name,
        config=config,
        config_text=(run_dir / CONFIG).read_text(),
        environment=_read_json(environment) if environment.is_file() else {},
        training=tuple(line for line in lines if "split" not in line),
        evaluations={split: tuple(line for line in lines if line.get("split") == split) for split in splits},
        events=tuple(read_events(run_dir)),
        nonfinite=_read_nonfinite(run_dir / NONFINITE),
        is_cut=is_cut,
    )


def _read_metrics(path: Path) -> tuple[list[Line], bool]:
    """Every line, and whether the last one was cut by a crash."""
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                return lines, True
            raise InputError(f"{path}:{number}: must be a JSON object; {error.msg}. Delete the line.") from None
        missing = [key for key in NUMBERS if not isinstance(line, dict) or not isinstance(line.get(key), int | float)]
        if missing:
            raise InputError(f"{path}:{number}: must have numbers for {', '.join(missing)}. Delete the line.")
        lines.append(line)
    return lines, False


def _read_nonfinite(folder: Path) -> dict[int, tuple[Line, ...]]:
    found: dict[int, list[Line]] = {}
    for path in sorted(folder.glob("step-*-rank-*.json")):
        report = _read_json(path)
        found.setdefault(int(report["step"]), []).append(report)
    return {step: tuple(reports) for step, reports in sorted(found.items())}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: must be a JSON file; {error}. Delete it.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: must be a JSON object; got {type(found).__name__}. Delete it.")
    return found
