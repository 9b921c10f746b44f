"""HyenaDNA's interval file: chromosome, start, end, split; every bad line is named.

The format is BED (0-based, end not included) with the split in the fourth column: train, valid (or val) or test.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from seqengine.errors import InputError

SPLITS = ("train", "valid", "test")
MOST_REPORTED = 20
_SPLIT_OF = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
_WHOLE = re.compile("[0-9]{1,18}")
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Interval:
    """Bases [start, end) of a record, the split they belong to, and the line that says so (from 1)."""

    record: str
    start: int
    end: int
    split: str
    line: int


def read_bed(path: Path, lengths: Mapping[str, int]) -> list[Interval]:
    """The intervals of a BED file in file order, checked against the records' lengths in bases.

    Columns are separated by tabs or spaces; empty lines, comments (#) and 'track' and 'browser' lines are skipped.

    Raises: InputError with one problem per bad line, at most 20 and then a count: not four columns, start or end no
        whole number, start >= end, another split, an unknown record, an end behind the record's end, or an overlap
        with an interval of another split.
    """
    intervals: list[Interval] = []
    problems: list[tuple[int, str]] = []
    for number, line in _lines(path):
        parsed = _parse(line, number, lengths)
        if isinstance(parsed, Interval):
            intervals.append(parsed)
        else:
            problems.append((number, parsed))
    problems += _overlaps(intervals)
    if problems:
        problems.sort()
        shown = [f"{path}, line {number}: {text}" for number, text in problems[:MOST_REPORTED]]
        if len(problems) > MOST_REPORTED:
            shown.append(f"{path}: and {len(problems) - MOST_REPORTED} more bad lines")
        raise InputError(*shown)
    if not intervals:
        raise InputError(f"{path}: a BED file must hold intervals (chromosome, start, end, split); got none")
    return intervals


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that should hold an interval, with their numbers from 1."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the BED file must be readable; got: {error.strerror}. Set data.bed.") from None
    if data.startswith(_GZIP_MAGIC):
        raise InputError(f"{path}: a BED file must be plain text; got gzip. Decompress it with gunzip.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a BED file must be text; got the byte {data[error.start]:#04x}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split(None, 1)
        if words and not words[0].startswith("#") and words[0] not in ("track", "browser"):
            yield number, line


def _parse(line: str, number: int, lengths: Mapping[str, int]) -> Interval | str:
    """The interval of a line, or what is wrong with it."""
    columns = line.split()
    if len(columns) != 4:
        return f"needs 4 columns (chromosome, start, end, split); got {len(columns)}"
    record, first, last, word = columns
    if not _WHOLE.fullmatch(first) or not _WHOLE.fullmatch(last):
        return f"start and end must be whole numbers of bases from 0; got {first!r} and {last!r}"
    start, end = int(first), int(last)
    if start >= end:
        return f"start must be less than end; got {start} and {end}"
    if word not in _SPLIT_OF:
        return f"the split must be train, valid or test; got {word!r}"
    if record not in lengths:
        return f"the chromosome must be a record of the FASTA file; got {record!r}{_hint(record, lengths)}"
    if end > lengths[record]:
        return f"the interval must end within {record!r}, which has {lengths[record]} bases; got end {end}"
    return Interval(record, start, end, _SPLIT_OF[word], number)


def _hint(record: str, lengths: Mapping[str, int]) -> str:
    other = record.removeprefix("chr") if record.startswith("chr") else "chr" + record
    if other in lengths:
        return f" (the FASTA file calls it {other!r})"
    names = list(lengths)
    return f" (it has {', '.join(repr(n) for n in names[:3])}{', ...' if len(names) > 3 else ''})"


def _overlaps(intervals: list[Interval]) -> list[tuple[int, str]]:
    """Bad lines whose bases another split holds too, at most one problem a line."""
    problems: list[tuple[int, str]] = []
    furthest: dict[str, Interval] = {}  # of each split on this record, the interval that ends last so far
    record = None
    for this in sorted(intervals, key=lambda i: (i.record, i.start, i.line)):
        if this.record != record:
            record, furthest = this.record, {}
        clash = next((o for o in furthest.values() if o.split != this.split and o.end > this.start), None)
        if clash is not None:
            first, second = sorted((clash, this), key=lambda i: i.line)
            problems.append(
                (
                    second.line,
                    f"intervals of different splits must not overlap; {second.record}:{second.start}-{second.end} "
                    f"({second.split}) overlaps line {first.line}, {first.start}-{first.end} ({first.split})",
                )
            )
        if this.split not in furthest or this.end > furthest[this.split].end:
            furthest[this.split] = this
    return problems
