"""Write docs/benchmarks.md from the records in benchmarks/results/: python docs/benchmarks_page.py

Every figure on the page stands in a record, rounded; the page adds none.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Benchmarks

What was measured, by the programs in `benchmarks/`. This page is made from their records in `benchmarks/results/` by
`python docs/benchmarks_page.py`; a test compares them. Programs check results before they time them, time all contenders in
turns, and give medians of ratios within a turn. A ratio above 1 means that this package is the faster one. Devices: {devices}.
"""
ABOUT = {
    "conv": "Long convolution against the field's reference, an FFT of twice the length with torch's autograd (fft), and "
    "against the same eight channels at a time with a backward by hand (fft-blocked).",
    "synthetics": "How well small models learn associative recall and induction heads, accuracy "
    "on examples that decided nothing.",
    "listops": "ListOps by a tiny model of long convolutions, from scratch and after training on the expressions alone, the "
    "same steps each: accuracy on 2,000 unseen expressions, whose standard error is 1.1 points; the likeliest class is 16 % "
    "of them.",
}
CONV = {
    "B": "batch",
    "D": "channels",
    "T": "length",
    "taps": "taps",
    "dtype": "dtype",
    "against": "opponent",
    "forward": "forward_ratio",
    "forward + backward": "both_ratio",
    "quartiles": "both_ratio_spread",
    "ms": "ours_both_ms",
    "saved, bytes": "ours_saved_bytes",
    "error": "largest_error",
}
"""Columns, and the fields of a record that they show."""
SYNTHETICS = {
    "mixers": "pattern",
    "task": "task",
    "tokens": "length",
    "layers": "layers",
    "accuracy": "accuracy",
    "goal": "goal",
    "steps": "steps",
    "examples": "examples",
    "CPU seconds": "cpu_seconds",
    "seed": "seed",
}
COLUMNS = {"conv": CONV, "synthetics": SYNTHETICS}
RATIOS = ("forward_ratio", "both_ratio")


def page() -> str:
    """The whole page."""
    files = sorted(RESULTS.glob("*/*.json"), key=lambda f: (f.stem, f.parent.name))
    records = {file: json.loads(file.read_text()) for file in files if "latest" not in file.parent.name}
    devices = sorted({record.get("device", "cpu").upper() for record in records.values()})
    return "\n".join([HEAD.format(devices=" and ".join(devices)), *(_section(*item) for item in records.items())])


def _section(file: Path, record: dict[str, Any]) -> str:
    rows = record["results"]
    columns = COLUMNS.get(file.stem) or {key: key for key in rows[0]}
    lines = [
        f"## {file.stem}: {file.parent.name}",
        "",
        *([ABOUT[file.stem], ""] if file.stem in ABOUT else []),
        f"Command: `{_command(file, record)}`. {_machine(file, record)}. Record: `{file.relative_to(ROOT)}`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    lines += [f"| {' | '.join(_cell(key, row.get(key)) for key in columns.values())} |" for row in rows]
    return "\n".join([*lines, ""])


def _command(file: Path, record: dict[str, Any]) -> str:
    """The record's own, or one that makes its cases."""
    if record.get("command"):
        return str(record["command"])
    rows, words = record["results"], [f"python benchmarks/{file.stem}.py"]
    if file.stem == "conv":
        taps = {_taps(row["length"], row["taps"]): None for row in rows}
        words += ["--lengths", *_words(rows, "length"), "--taps", *taps, "--batch", *_words(rows, "batch")]
        words += ["--channels", *_words(rows, "channels"), "--dtype", *_words(rows, "dtype")]
        named = [row for row in rows if "opponent" in row]
        words += ["--opponents", *_words(named, "opponent")] if named else []
    if file.stem == "synthetics":
        words += ["--patterns", *_words(rows, "pattern"), "--seed", *_words(rows, "seed")]
    if file.stem == "listops":
        words += ["--seeds", *_words(rows, "seed")]
    return " ".join(words)


def _words(rows: list[dict[str, Any]], key: str) -> list[str]:
    """The values of a field, each once."""
    return list(dict.fromkeys(str(row[key]) for row in rows))


def _taps(length: int, taps: int) -> str:
    """T, T/8, or the number."""
    parts = length // taps
    return "T" if parts == 1 else "T/8" if parts == 8 else str(taps)


def _machine(file: Path, record: dict[str, Any]) -> str:
    """What the record, and its folder's name, say of date, machine and versions."""
    date, machine = record.get("date") or file.parent.name[:10], file.parent.name[11:].replace("-", " ")
    known = [date, " ".join(filter(None, (machine, record.get("device_name"), record.get("machine"))))]
    known += [f"{record['threads']} threads" if record["threads"] != 1 else "1 thread", f"torch {record['torch']}"]
    known += [f"commit {record['commit']}"] if record.get("commit") else []
    return ", ".join(known)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(_cell("both_ratio", part) for part in value)
    if isinstance(value, float):
        if key in RATIOS:
            return f"{value:.2f}x"
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    Path(__file__).with_name("benchmarks.md").write_text(page())
