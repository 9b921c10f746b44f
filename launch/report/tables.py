"""The tables of a report: results, evaluations, settings, environment, what went wrong."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import gmtime, strftime

from seqengine.config.write import changed
from seqengine.launch.report.curves import token_name
from seqengine.launch.report.records import Record
from seqengine.metrics import Line
from seqengine.sinks import duration

OWN = ("run.name", "run.dir")
"""Settings that differ between any two runs."""
EXPECTED = ("command", "directory")
"""Facts that do."""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number behind it as it was measured."""

    text: str
    value: float | None = None
    is_marked: bool = False


@dataclass(frozen=True)
class Table:
    """With a heading, and a sentence where it needs one."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""


def tables(records: Sequence[Record]) -> list[Table]:
    """All that have rows, in order."""
    found = [_results(records), _evaluations(records), _troubles(records), _settings(records), _environment(records)]
    return [table for table in found if table.rows]


def number(value: float | None, form: str = "{:.5f}") -> Cell:
    """A measured number; a dash for none."""
    return Cell("–") if value is None else Cell(form.format(value), float(value))


def best(lines: Sequence[Line]) -> Line | None:
    """With the least loss, the first of equal ones."""
    finite = [line for line in lines if math.isfinite(line["loss"])]
    return min(finite, key=lambda line: line["loss"]) if finite else None


def _results(records: Sequence[Record]) -> Table:
    unit = token_name(records)
    table = Table(
        "results",
        "Results",
        ("run", "steps", "tokens", f"training, bits per {unit}", f"validation, bits per {unit}", f"best, bits per {unit}",
         "tokens per second (median)", "peak memory, GiB", "time of training"),
        note="Training: the last line. Validation: the last and the best evaluation of the split valid.",
    )  # fmt: skip
    for record in records:
        lines, valid = record.training, record.evaluations.get("valid", ())
        last = lines[-1] if lines else None
        newest = max((*lines, *(line for split in record.evaluations.values() for line in split)), key=_place)
        top = best(valid)
        speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        memory = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
        seconds = None if last is None else last.get("seconds")
        table.rows.append(
            [
                Cell(record.label),
                Cell(f"{newest['step']} of {record.config.total_steps}", newest["step"]),
                number(newest["tokens"], "{:,}"),
                number(None if last is None else last["bits_per_token"]),
                number(valid[-1]["bits_per_token"] if valid else None),
                number(None if top is None else top["bits_per_token"]),
                number(median(speeds) if speeds else None, "{:,.0f}"),
                number(max(memory) / 2**30 if memory else None, "{:.3f}"),
                Cell("–") if seconds is None else Cell(duration(seconds), seconds),
            ]
        )
    return table


def _place(line: Line) -> tuple[int, int]:
    return line["step"], line["tokens"]


def _evaluations(records: Sequence[Record]) -> Table:
    unit = token_name(records)
    columns = ("run", "split", "which", "step", "tokens", "loss, nats", f"bits per {unit}", "accuracy", "windows")
    table = Table("evaluations", "Evaluations", columns)
    for record in records:
        for split, lines in record.evaluations.items():
            for which, line in (("last", lines[-1]), ("best", best(lines))):
                if line is None:
                    continue
                table.rows.append(
                    [
                        Cell(record.label),
                        Cell(split),
                        Cell(which),
                        number(line["step"], "{}"),
                        number(line["tokens"], "{:,}"),
                        number(line["loss"], "{:.6f}"),
                        number(line["bits_per_token"], "{:.6f}"),
                        number(line.get("accuracy"), "{:.2%}"),
                        number(line.get("windows"), "{}"),
                    ]
                )
    return table


def _troubles(records: Sequence[Record]) -> Table:
    """Restarts, steps that were not finite, spikes, and half a line."""
    table = Table("events", "What happened on the way", ("run", "what", "step", "more"))
    for record in records:
        rows = [*_starts(record), *_nonfinite(record)]
        rows.sort(key=lambda row: row[1].value or 0.0)
        table.rows.extend([Cell(record.label), *row] for row in rows)
        if record.is_cut:
            table.rows.append(
                [
                    Cell(record.label),
                    Cell("a line cut short"),
                    Cell("–"),
                    Cell("the last line of metrics.jsonl is left out"),
                ]
            )
    return table


def _starts(record: Record) -> Iterator[list[Cell]]:
    """Every event but the first start."""
    names = {"start": "restart", "rewind": "back to a checkpoint", "spike": "loss spike"}
    has_begun = False
    for event in record.events:
        kind = event["event"]
        if kind != "start" or has_begun:
            when = strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(event["time"]))
            more = f"loss {event['loss']:.5f}, {when}" if "loss" in event else when
            yield [Cell(names.get(kind, str(kind))), number(event["step"], "{}"), Cell(more)]
        has_begun = has_begun or kind == "start"


def _nonfinite(record: Record) -> Iterator[list[Cell]]:
    for step, reports in record.nonfinite.items():
        names = sorted({name for report in reports for name in report["not_finite"].get("gradients", ())})
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        what = f"loss {reports[0]['loss']}; {len(reports)} ranks; gradients of {shown or 'no parameter'} not finite"
        yield [Cell("step not finite"), number(step, "{}"), Cell(what)]


def _settings(records: Sequence[Record]) -> Table:
    """Of several runs what differs; of one what is not as by default, and where it was set."""
    if len(records) == 1:
        rows = [[Cell(part) for part in line] for line in written_settings(records[0].config_text)]
        return Table("settings", "Settings that are not defaults", ("key", "value", "set by"), rows)
    first = records[0].config
    differing: dict[str, list[object]] = {}
    for i, record in enumerate(records[1:], 1):
        for key, (before, now) in changed(first, record.config).items():
            if key not in OWN:
                differing.setdefault(key, [before] * len(records))[i] = now
    rows = [
        [Cell(key), *(Cell(_shown(v), is_marked=v != values[0]) for v in values)] for key, values in differing.items()
    ]
    columns = ("key", *(record.label for record in records))
    return Table("settings", "Settings that differ", columns, rows, "" if rows else "none")


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def written_settings(text: str) -> Iterator[tuple[str, str, str]]:
    """(key, value, origin) of a run's config.toml, defaults left out."""
    section = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[+([^\[\]]+)\]+", line):
            section = header[1]
        elif (entry := re.fullmatch(r"(\w+) = (.*)  # (.*)", line)) and entry[3] != "default":
            yield f"{section}.{entry[1]}", entry[2], entry[3]


def _environment(records: Sequence[Record]) -> Table:
    """Versions, machine, mesh and hash of the data; what is not as in the first run is marked."""
    columns = [_facts(record) for record in records]
    keys = dict.fromkeys(key for facts in columns for key in facts)
    rows = [
        [
            Cell(key),
            *(Cell(facts.get(key, "–"), is_marked=_is_other(key, facts, columns[0])) for facts in columns),
        ]
        for key in keys
    ]
    hashes = {facts.get("data hash") for facts in columns}
    note = "The runs read different data: their losses cannot be compared." if len(hashes) > 1 else ""
    return Table("environment", "Environment", ("", *(record.label for record in records)), rows, note)


def _is_other(key: str, facts: dict[str, str], first: dict[str, str]) -> bool:
    return key not in EXPECTED and facts.get(key) != first.get(key)


def _facts(record: Record) -> dict[str, str]:
    environment = record.environment
    mesh = environment.get("mesh", {})
    axes = " x ".join(f"{key} {size}" for key, size in mesh.items() if key != "backend")
    facts = {
        "data hash": environment.get("data_hash", ""),
        "mesh": f"{axes}; backend {mesh.get('backend')}" if mesh else "",
        **{name: str(version) for name, version in environment.get("versions", {}).items()},
        "platform": environment.get("platform", ""),
        "command": " ".join(environment.get("command", ())),
        "directory": str(record.path),
    }
    return {key: text for key, text in facts.items() if text}
