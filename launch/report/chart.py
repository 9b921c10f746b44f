"""Curves as SVG, written by hand: nothing to install, nothing to load.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; from the eighth run on the same ones
come back with other dashes. Training is a thin line; each validation split has a thicker dashed one with marks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from seqengine.launch.report.ticks import Axis, axis_from_zero_to, make_axis
from seqengine.sinks import short_number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
WIDTH, PLOT_HEIGHT = 560, 250
LEFT, RIGHT, BOTTOM, TITLE, LEGEND_ROW = 66, 18, 46, 30, 19
FONT = 'font-family="system-ui, sans-serif"'
LETTER = 6.4
"""Width of a letter of the legend, about."""
MOST_POINTS = 1200
"""Of a curve; beyond, only the ends, the least and the largest of so many stretches are drawn."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int
    """Number of the run."""
    split: int = 0
    """0 training, 1 and above validation."""


@dataclass(frozen=True)
class Chart:
    """Curves over tokens."""

    name: str
    title: str
    series: tuple[Series, ...]
    may_be_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Frame:
    """Where a chart's plot lies, and its axes."""

    x: Axis
    y: Axis
    top: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels."""
        across = LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT)
        return across, self.top + (1 - self.y.place(y)) * PLOT_HEIGHT


def draw(chart: Chart, *, alone: bool = False) -> str:
    """The chart as an <svg> element; alone: as a file of its own."""
    shown = [(one, _segments(one.points)) for one in chart.series]
    finite = [point for _, segments in shown for segment in segments for point in segment]
    legend, rows = _legend(chart.series)
    top = TITLE + rows * LEGEND_ROW + 8
    height = top + PLOT_HEIGHT + BOTTOM
    x = axis_from_zero_to(max((x for x, _ in finite), default=0.0) or 1.0)
    y = make_axis([y for _, y in finite] or [0.0, 1.0], may_be_log=chart.may_be_log, from_zero=chart.from_zero)
    frame = Frame(x, y, top)
    name = 'xmlns="http://www.w3.org/2000/svg"' if alone else f'data-chart="{escape(chart.name)}"'
    parts = [
        f"<svg {name} "
        f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{escape(chart.title)}" '
        f'{FONT} data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}" data-scale="{"log" if y.is_log else "linear"}" '
        f'data-plot="{LEFT} {top} {WIDTH - LEFT - RIGHT} {PLOT_HEIGHT}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>' if alone else "",
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="600" fill="#111">{escape(chart.title)}'
        f"{' (log scale)' if y.is_log else ''}</text>",
        legend,
        _grid(frame),
        *(_curve(one, segments, frame) for one, segments in shown),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _segments(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Pieces of finite values: a curve is broken where a value is not a number."""
    found: list[list[tuple[float, float]]] = [[]]
    for point in thinned(points):
        if math.isfinite(point[1]):
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MOST_POINTS of them: of every stretch its first, least and largest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-len(points) * 3 // MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        chosen = {start, *(i for i in stretch if i not in finite)}
        if finite:
            chosen |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += sorted(chosen)
    return [points[i] for i in sorted({*kept, len(points) - 1})]


def _style(one: Series) -> str:
    """Colour by run, width and dashes by split."""
    again = one.colour // len(COLOURS)
    dashes = (f"{5 * one.split} 3" if one.split else "") or ("" if not again else f"{2 * again} 2")
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    width = 'stroke-width="2"' if one.split else 'stroke-width="1.4" stroke-opacity="0.8"'
    return f'fill="none" stroke="{_colour(one)}" {width} stroke-linejoin="round"{dash}'


def _colour(one: Series) -> str:
    return COLOURS[one.colour % len(COLOURS)]


def _curve(one: Series, segments: list[list[tuple[float, float]]], frame: Frame) -> str:
    parts = [f'<g class="series" data-label="{escape(one.label)}">']
    for segment in segments:
        places = [frame.place(*point) for point in segment]
        if len(places) > 1:
            text = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
            parts.append(f'<polyline {_style(one)} points="{text}"/>')
        if one.split or len(places) == 1:
            parts += [_mark(one, place, _told(one, point)) for point, place in zip(segment, places)]
    return "\n".join([*parts, "</g>"])


def _told(one: Series, point: tuple[float, float]) -> str:
    return f"<title>{escape(one.label)}: {point[1]:.6g} at {short_number(point[0])} tokens</title>"


def _mark(one: Series, place: tuple[float, float], title: str = "") -> str:
    x, y = place
    if one.split > 1:
        return f'<rect x="{x - 3:.2f}" y="{y - 3:.2f}" width="6" height="6" fill="{_colour(one)}">{title}</rect>'
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{3.2 if one.split else 1.8}" fill="{_colour(one)}">{title}</circle>'


def _grid(frame: Frame) -> str:
    right, bottom = WIDTH - RIGHT, frame.top + PLOT_HEIGHT
    parts = []
    for tick, label in zip(frame.y.ticks, frame.y.labels()):
        y = frame.place(frame.x.low, tick)[1]
        parts.append(f'<line x1="{LEFT}" y1="{y:.2f}" x2="{right}" y2="{y:.2f}" stroke="#e2e2e2"/>')
        parts.append(_text(LEFT - 8, y + 4, label, "end"))
    for tick, label in zip(frame.x.ticks, frame.x.labels()):
        x = frame.place(tick, frame.y.low)[0]
        parts.append(f'<line x1="{x:.2f}" y1="{bottom}" x2="{x:.2f}" y2="{bottom + 5}" stroke="#444"/>')
        parts.append(_text(x, bottom + 19, label, "middle"))
    parts.append(f'<path d="M{LEFT} {frame.top}V{bottom}H{right}" fill="none" stroke="#444"/>')
    parts.append(_text((LEFT + right) / 2, bottom + 37, "tokens", "middle"))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="11.5" fill="#333" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(series: Sequence[Series]) -> tuple[str, int]:
    """Its elements, in as many rows as they need, and the number of rows; none for a single curve."""
    if len(series) < 2:
        return "", 0
    parts, x, row = [], float(LEFT), 0
    for one in series:
        label = one.label if len(one.label) <= 60 else one.label[:29] + "…" + one.label[-30:]
        width = 32 + LETTER * len(label) + 16
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, row = float(LEFT), row + 1
        y = TITLE + row * LEGEND_ROW + 8
        parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x + 26:.1f}" y2="{y}" {_style(one)}/>')
        if one.split:
            parts.append(_mark(one, (x + 13, y)))
        parts.append(_text(x + 32, y + 4, label, "start"))
        x += width
    return '<g class="legend">' + "\n".join(parts) + "</g>", row + 1
