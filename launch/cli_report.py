"""The words of `seqengine report`."""

import argparse
from pathlib import Path


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `report`. What the command needs is imported when it runs."""
    report = commands.add_parser(
        "report", help="curves, tables and settings of one run or several, as HTML and Markdown"
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN", type=Path, help="several are drawn over one another")
    report.add_argument("--out", metavar="DIR", type=Path, help="default: the folder `report` of the first run")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from seqengine.launch.report.build import build_report

    page = build_report(arguments.run_dirs, arguments.out or arguments.run_dirs[0] / "report")
    print(page)
    return 0
