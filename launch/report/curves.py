"""Which curves a report shows, made of the lines of metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seqengine.launch.report.chart import Chart, Series
from seqengine.launch.report.records import Record
from seqengine.metrics import Line


@dataclass(frozen=True)
class Curve:
    """A key of the lines, and how it is drawn."""

    key: str
    title: str
    scale: float = 1.0
    may_be_log: bool = False
    from_zero: bool = False


CURVES = (
    Curve("loss", "loss, nats per token"),
    Curve("bits_per_token", "bits per token"),
    Curve("lr", "learning rate", from_zero=True),
    Curve("grad_norm", "gradient norm before clipping", may_be_log=True, from_zero=True),
    Curve("tokens_per_second", "tokens per second", from_zero=True),
    Curve("mfu", "model FLOPs utilisation, %", scale=100.0, from_zero=True),
    Curve("peak_memory_bytes", "peak memory of the fullest rank, GiB", scale=2.0**-30, from_zero=True),
)


def charts(records: Sequence[Record]) -> list[Chart]:
    """Every curve of which there are values, the runs over one another."""
    drawn = [_chart(curve, records) for curve in CURVES]
    return [chart for chart in drawn if chart.series]


def token_name(records: Sequence[Record]) -> str:
    """What tokens are: "base" if they are so in every run."""
    return "base" if all(record.counts_bases for record in records) else "token"


def _chart(curve: Curve, records: Sequence[Record]) -> Chart:
    title = curve.title.replace("per token", f"per {token_name(records)}")
    series: list[Series] = []
    has_splits = any(curve.key in line for record in records for lines in record.evaluations.values() for line in lines)
    for number, record in enumerate(records):
        kinds = [("training", record.training), *record.evaluations.items()]
        for split, (name, lines) in enumerate(kinds):
            points = _points(lines, curve)
            if points:
                names = [record.label] if len(records) > 1 else []
                names += [name.replace("valid", "validation", 1).replace("_", " ")] if has_splits else []
                series.append(Series(", ".join(names) or name, points, number, split))
    return Chart(curve.key, title, tuple(series), curve.may_be_log, curve.from_zero)


def _points(lines: Sequence[Line], curve: Curve) -> tuple[tuple[float, float], ...]:
    values = [(float(line["tokens"]), line[curve.key]) for line in lines if curve.key in line]
    return tuple((x, y * curve.scale if isinstance(y, int | float) else math.nan) for x, y in values)
