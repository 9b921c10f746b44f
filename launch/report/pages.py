"""A report as one HTML page that needs nothing else, and as Markdown beside its curves."""

from collections.abc import Sequence
from html import escape

import seqengine
from seqengine.launch.report.chart import Chart, draw
from seqengine.launch.report.records import Record
from seqengine.launch.report.tables import Cell, Table

CURVES = "curves"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 0 auto;
  padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; padding-bottom: 4px; border-bottom: 1px solid #ccc; }
p { margin: 6px 0; color: #444; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr));
  gap: 20px 24px; align-items: end; }
.curves svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td { overflow-wrap: anywhere; }
th { font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
td.marked { font-weight: 600; background: #fff3d6; }
td:first-child { white-space: nowrap; }
pre { font-size: 12.5px; background: #f6f6f6; padding: 12px; overflow-x: auto; }
summary { cursor: pointer; }
footer { margin-top: 40px; color: #555; font-size: 13px; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .curves { grid-template-columns: 1fr 1fr; gap: 8px; }
  svg, tr { break-inside: avoid; } h2 { break-after: avoid; } .screen { display: none; } .scroll { overflow: visible; }
  table { font-size: 10px; } td.marked { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(records: Sequence[Record], charts: Sequence[Chart], tables: Sequence[Table]) -> str:
    """HTML with its style and its curves inside."""
    title = escape(", ".join(record.label for record in records))
    results = [table for table in tables if table.name == "results"]
    others = [table for table in tables if table.name != "results"]
    settings = "".join(
        f"<details><summary>all settings of {escape(record.label)}</summary><pre>{escape(record.config_text)}</pre></details>"
        for record in records
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            *(html_table(table) for table in results),
            '<h2>Curves</h2><div class="curves">',
            *(f"<div>{draw(chart)}</div>" for chart in charts),
            "</div>",
            *(html_table(table) for table in others),
            f'<section class="screen"><h2>All settings</h2>{settings}</section>',
            f"<footer>seqengine {escape(seqengine.__version__)}</footer></body></html>",
            "",
        ]
    )


def html_table(table: Table) -> str:
    """A heading and the table; data-value holds a number with all its digits."""
    numeric = [
        all(row[i].value is not None or row[i].text == "–" for row in table.rows) for i in range(len(table.columns))
    ]
    classes = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{name}>{escape(column)}</th>" for name, column in zip(classes, table.columns))
    rows = "\n".join(
        "<tr>" + "".join(_html_cell(cell, is_number) for cell, is_number in zip(row, numeric)) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>{note}<div class="scroll"><table id="{escape(table.name)}">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _html_cell(cell: Cell, is_number: bool) -> str:
    names = " ".join(name for name, is_it in (("number", is_number), ("marked", cell.is_marked)) if is_it)
    css = f' class="{names}"' if names else ""
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    return f"<td{css}{value}>{escape(cell.text)}</td>"


def markdown(records: Sequence[Record], charts: Sequence[Chart], tables: Sequence[Table]) -> str:
    """The same tables; curves are files in the folder `curves`."""
    parts = [f"# {_escaped(', '.join(record.label for record in records))}"]
    parts += [markdown_table(table) for table in tables if table.name == "results"]
    parts += ["## Curves", *(f"![{chart.title}]({CURVES}/{chart.name}.svg)" for chart in charts)]
    parts += [markdown_table(table) for table in tables if table.name != "results"]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A heading and the table."""
    lines = [f"## {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines.append("| " + " | ".join(_escaped(column) for column in table.columns) + " |")
    lines.append("|" + "---|" * len(table.columns))
    for row in table.rows:
        texts = (f"**{_escaped(cell.text)}**" if cell.is_marked else _escaped(cell.text) for cell in row)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Letters that Markdown would read as its own, in a cell of a table."""
    for letter in "\\|*_`<[":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")
