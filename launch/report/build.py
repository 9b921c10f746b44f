"""Write a report: DIR/report.html, DIR/report.md and DIR/curves/*.svg."""

from collections.abc import Sequence
from pathlib import Path

from seqengine.errors import InputError
from seqengine.launch.report.chart import draw
from seqengine.launch.report.curves import charts
from seqengine.launch.report.pages import CURVES, markdown, page
from seqengine.launch.report.records import read_records
from seqengine.launch.report.tables import tables
from seqengine.runfiles import write_whole


def build_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Report on runs, drawn over one another; returns the path of the page.

    Raises InputError, with nothing written, for what is no run, for a run without metrics, for lines that cannot be read, and
    if the folder cannot be written.
    """
    records = read_records(run_dirs)
    drawn, tabled = charts(records), tables(records)
    files = {f"{CURVES}/{chart.name}.svg": draw(chart, alone=True) + "\n" for chart in drawn}
    files["report.md"] = markdown(records, drawn, tabled)
    files["report.html"] = page(records, drawn, tabled)
    try:
        (out / CURVES).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(out / name, text)
    except OSError as error:
        raise InputError(
            f"--out: {out} must be a folder that can be written; {error.strerror}. Give another one."
        ) from error
    return out / "report.html"
