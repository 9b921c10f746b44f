"""`seqengine report`: the page is whole by itself, and every number in it is one of the run's."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest

from seqengine.launch.cli import main
from seqengine.launch.report.chart import MOST_POINTS, Chart, Series, draw, thinned
from seqengine.launch.report.ticks import axis_from_zero_to, make_axis
from seqengine.metrics import read_metrics
from tests.seqengine.lines import training, valid

VOID = ("meta", "br", "img", "link", "input", "hr")


class Page(HTMLParser):
    """Elements, tables by id, curves by chart and label; checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.charts: dict[str, dict] = {}
        self._rows: list = []
        self._series: list = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.elements.append((tag, facts))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(facts["id"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", facts.get("data-value")))
        elif tag == "svg":
            self._series = []
            self.charts[facts["data-chart"]] = {"frame": facts, "series": self._series}
        elif tag == "g" and facts.get("class") == "series":
            self._series.append((facts["data-label"], []))
        elif tag == "polyline":
            self._series[-1][1].extend(tuple(map(float, p.split(","))) for p in facts["points"].split())

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, value)

    def rows(self, table: str) -> list[dict[str, tuple[str, str | None]]]:
        head, *rows = self.tables[table]
        return [dict(zip((name for name, _ in head), row)) for row in rows]

    def points(self, chart: str) -> dict[str, list[tuple[float, float]]]:
        """Of the curves of a chart, in the units of its axes."""
        frame = self.charts[chart]["frame"]
        left, top, width, height = map(float, frame["data-plot"].split())
        (x0, x1), (y0, y1) = (map(float, frame[key].split()) for key in ("data-x", "data-y"))

        def value(x: float, y: float) -> tuple[float, float]:
            up = 1 - (y - top) / height
            y = y0 * (y1 / y0) ** up if frame["data-scale"] == "log" else y0 + up * (y1 - y0)
            return x0 + (x - left) / width * (x1 - x0), y

        return {label: [value(*place) for place in places] for label, places in self.charts[chart]["series"]}


def make_run(folder: Path, name: str, lines: list[dict], *settings: str) -> Path:
    folder.mkdir(parents=True)
    text = f'extends = "demo"\n[run]\nname = "{name}"\n[train]\nsteps = 20\n' + "\n".join(settings)
    (folder / "config.toml").write_text(text + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"versions": {"torch": "2.13"}, "platform": "Linux", "mesh": {"replicate": 2, "sequence": 1, "backend": "none"},
              "data_hash": "abc123", "command": ["seqengine", "train"]}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(record))
    return folder


def some_lines(scale: float = 1.0) -> list[dict]:
    lines: list[dict] = []
    for step in range(1, 21):
        loss = scale * (1 + 2 / step)
        lines.append(
            training(step, loss, lr=1e-3 / step, grad_norm=10.0 ** (2 - step / 5), tokens_per_second=100.0 * step)
        )
        if step % 5 == 0:
            lines.append(valid(step, loss + (0.1 if step < 20 else 0.7)))
    return lines


def report(*runs: Path, out: Path) -> Page:
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return Page((out / "report.html").read_text())


def test_every_number_of_the_tables_is_one_of_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "r", "mine", some_lines())
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.html")
    page = Page((run / "report" / "report.html").read_text())
    lines = read_metrics(run)
    train = [line for line in lines if "split" not in line]
    checks = [line for line in lines if "split" in line]
    (row,) = page.rows("results")
    shown = {name: None if value is None else float(value) for name, (_, value) in row.items()}
    assert shown == {
        "run": None,
        "steps": 20,
        "tokens": 20000,
        "training, bits per base": train[-1]["bits_per_token"],
        "validation, bits per base": checks[-1]["bits_per_token"],
        "best, bits per base": checks[2]["bits_per_token"],
        "tokens per second (median)": median(line["tokens_per_second"] for line in train),
        "peak memory, GiB": 3.0,
        "time of training": 40.0,
    }
    assert row["best, bits per base"][0] == f"{checks[2]['bits_per_token']:.5f}"
    assert row["time of training"][0] == "00:00:40"
    last, best = page.rows("evaluations")
    for line, row in ((checks[-1], last), (checks[2], best)):
        for column, key in (("step", "step"), ("tokens", "tokens"), ("loss, nats", "loss"), ("windows", "windows")):
            assert float(row[column][1]) == line[key]
    assert (last["which"][0], best["which"][0]) == ("last", "best")


def test_points_of_the_curves_are_the_data(tmp_path):
    run = make_run(tmp_path / "r", "mine", some_lines())
    page = report(run, out=tmp_path / "out")
    lines = read_metrics(run)
    assert page.charts["grad_norm"]["frame"]["data-scale"] == "log"
    for key, scale in (("loss", 1), ("bits_per_token", 1), ("lr", 1), ("grad_norm", 1), ("tokens_per_second", 1),
                       ("peak_memory_bytes", 2.0**-30)):  # fmt: skip
        curves = page.points(key)
        wanted = [[line for line in lines if "split" not in line]]
        if key in ("loss", "bits_per_token"):
            assert list(curves) == ["training", "validation"]
            wanted.append([line for line in lines if "split" in line])
        low, high = map(float, page.charts[key]["frame"]["data-y"].split())
        for points, data in zip(curves.values(), wanted, strict=True):
            assert len(points) == len(data)
            for (x, y), line in zip(points, data):
                assert x == pytest.approx(line["tokens"], abs=20000 / 400)
                a_pixel = y * 0.01 if key == "grad_norm" else (high - low) / 250
                assert y == pytest.approx(line[key] * scale, abs=a_pixel)


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = report(make_run(tmp_path / "r", "mine", some_lines()), out=tmp_path / "out")
    for tag, facts in page.elements:
        assert tag not in ("link", "script", "img", "iframe", "object"), tag
        assert not {"src", "href", "xlink:href", "srcset", "xmlns"} & facts.keys(), (tag, facts)
    style = (tmp_path / "out" / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)


def test_several_runs_are_drawn_over_one_another_with_a_legend(tmp_path):
    a = make_run(tmp_path / "a", "same", some_lines(), "[optim]\nlr = 0.001")
    b = make_run(tmp_path / "b", "same", some_lines(2.0), "[optim]\nlr = 0.002")
    c = make_run(tmp_path / "c", "<b>& other", some_lines(0.5), "[optim]\nlr = 0.001")
    record = json.loads((c / "environment.json").read_text()) | {"data_hash": "else"}
    (c / "environment.json").write_text(json.dumps(record))
    page = report(a, b, c, out=tmp_path / "out")
    labels = [f"same ({a})", f"same ({b})", "<b>& other"]
    assert list(page.points("lr")) == labels
    assert list(page.points("loss")) == [f"{label}, {kind}" for label in labels for kind in ("training", "validation")]
    text = (tmp_path / "out" / "report.html").read_text()
    legend = text.split('data-chart="lr"')[1].split('class="legend">')[1].split("</g>")[0]
    colours = re.findall(r'stroke="(#\w+)"', legend)
    assert len(colours) == len(set(colours)) == 3
    assert "&lt;b&gt;&amp; other" in legend
    settings = {row["key"][0]: [cell[0] for cell in list(row.values())[1:]] for row in page.rows("settings")}
    assert settings == {"optim.lr": ["0.001", "0.002", "0.001"]}
    assert "The runs read different data" in text
    assert [row["run"][0] for row in page.rows("results")] == labels


def test_restarts_spikes_and_steps_that_are_not_finite_are_told(tmp_path):
    lines = some_lines()
    lines[6] = training(6, math.nan, grad_norm=math.nan)
    run = make_run(tmp_path / "r", "mine", lines)
    events = [("start", 0, {}), ("start", 5, {}), ("spike", 9, {"loss": 7.5}), ("rewind", 5, {})]
    text = "".join(json.dumps({"event": kind, "step": step, "time": 0.0, **more}) + "\n" for kind, step, more in events)
    (run / "events.jsonl").write_text(text)
    (run / "nonfinite").mkdir()
    for rank in range(2):
        about = {"step": 6, "rank": rank, "loss": "nan", "not_finite": {"gradients": ["head.weight"]}}
        (run / "nonfinite" / f"step-6-rank-{rank}.json").write_text(json.dumps(about))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "tok')
    page = report(run, out=tmp_path / "out")
    told = [(row["what"][0], row["step"][0]) for row in page.rows("events")]
    assert told == [
        ("restart", "5"),
        ("back to a checkpoint", "5"),
        ("step not finite", "6"),
        ("loss spike", "9"),
        ("a line cut short", "–"),
    ]
    assert "2 ranks; gradients of head.weight not finite" in (tmp_path / "out" / "report.html").read_text()
    assert len(page.points("loss")["training"]) == 19, "the curve is broken where there is no number"


def test_markdown_has_the_same_numbers_and_its_curves_lie_beside_it(tmp_path):
    page = report(make_run(tmp_path / "r", "a|b", some_lines()), out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for table in page.tables.values():
        for row in table[1:]:
            for cell, value in row:
                assert value is None or f"| {cell} |" in text
    assert "a\\|b" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == len(page.charts) == 6
    for picture in pictures:
        svg = (tmp_path / "out" / picture).read_text()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_settings_of_one_run_are_those_that_are_not_defaults(tmp_path):
    run = make_run(tmp_path / "r", "mine", some_lines())
    (run / "config.toml").write_text(
        '[run]\nname = "mine"  # command line\nseed = 2222  # default\n[train]\nsteps = 20  # a.toml:3\n'
    )
    page = report(run, out=tmp_path / "out")
    rows = [tuple(cell[0] for cell in row.values()) for row in page.rows("settings")]
    assert rows == [("run.name", '"mine"', "command line"), ("train.steps", "20", "a.toml:3")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "must have lines in metrics.jsonl to report on; there are none"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "there are none. Train it first"),
        (lambda run: (run / "config.toml").unlink(), "must be a run's directory with a config.toml"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{}'),
            "metrics.jsonl:1: must have numbers for tokens",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('{"st\n{}\n'), "metrics.jsonl:1: must be a JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text("[]\n"), "metrics.jsonl:1: must have numbers for step"),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json: must be a JSON file"),
        (lambda run: (run.parent / "out").write_text("a file"), "--out: "),
    ],
)
def test_what_cannot_be_reported_is_told_and_nothing_is_written(tmp_path, capsys, spoil, message):
    run = make_run(tmp_path / "r", "mine", some_lines())
    spoil(run)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").is_dir()


def test_a_run_with_one_line_or_evaluations_alone_is_drawn(tmp_path):
    page = report(
        make_run(tmp_path / "a", "one", [training(1)]),
        make_run(tmp_path / "b", "two", [valid(3)]),
        out=tmp_path / "out",
    )
    assert [row["run"][0] for row in page.rows("results")] == ["one", "two"]
    assert [tag for tag, _ in page.elements].count("circle") >= 3


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[77_777] = (77_777.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert points[54_321] in kept
    assert points[77_777] in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)


def test_curves_without_a_number_make_an_empty_chart():
    svg = draw(Chart("loss", "loss", (Series("a", ((1.0, math.nan),), 0),)))
    assert "<polyline" not in svg


def test_ticks_are_round_lie_inside_and_are_told_apart():
    for low, high in (
        (0, 1.1e6),
        (1.2, 4.3),
        (0, 6e-4),
        (2.45, 2.55),
        (1, 1),
        (0, 0),
        (1e-9, 2e-9),
        (999, 1001),
        (-3, -1),
    ):
        axis = make_axis([float(low), float(high)])
        labels = axis.labels()
        assert 2 <= len(labels) <= 9
        assert len(set(labels)) == len(labels)
        assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)
        assert axis.low <= low <= high <= axis.high
    assert make_axis([1e-3, 5e3], may_be_log=True).is_log
    assert axis_from_zero_to(15360.0).labels() == ["0", "5k", "10k", "15k"]
