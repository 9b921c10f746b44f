"""The line of every key in a TOML text. tomllib reports none, and a message without a line sends people searching."""

import tomllib
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]
"""Names of tables and keys, and indices inside arrays."""


def nodes(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every path inside a table or array with what is there: tables and arrays as well as what they hold."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for part, item in items:
        yield (*path, part), item
        yield from nodes(item, (*path, part))


def scan_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of the statement that sets each key; a table's is its header's. `text` must be valid TOML.

    Exact, because tomllib reads every statement: a key's statement grows by a line until it parses, and as the start of
    an unfinished array or string never parses, it ends where TOML says that it ends.
    """
    found: dict[KeyPath, int] = {}
    num_elements: dict[KeyPath, int] = {}
    header: KeyPath = ()
    lines = text.replace("\r\n", "\n").split("\n")
    at = 0
    while at < len(lines):
        start, line = at, lines[at].strip(" \t")
        at += 1
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            header = _open_table(line, num_elements)
            found.setdefault(header, start + 1)
            if isinstance(header[-1], int):
                found.setdefault(header[:-1], start + 1)
            continue
        while (statement := _parse("\n".join(lines[start:at]))) is None:
            assert at < len(lines), f"scan_lines: the text must be valid TOML, line {start + 1} is not"
            at += 1
        for path, _ in nodes(statement):
            found.setdefault((*header, *path), start + 1)
    return found


def _parse(chunk: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(chunk)
    except tomllib.TOMLDecodeError:
        return None


def _open_table(line: str, num_elements: dict[KeyPath, int]) -> KeyPath:
    """Path of the table that a header line opens; counts the elements of arrays of tables in `num_elements`."""
    names: list[str] = []
    inner: Any = tomllib.loads(line)
    while isinstance(inner, dict) and inner:
        name, inner = next(iter(inner.items()))
        names.append(name)
    path: KeyPath = ()
    for name in names[:-1]:
        path = (*path, name)
        # A header below an array of tables means the array's newest element.
        if path in num_elements:
            path = (*path, num_elements[path] - 1)
    path = (*path, names[-1])
    if isinstance(inner, list):
        num_elements[path] = num_elements.get(path, 0) + 1
        path = (*path, num_elements[path] - 1)
    return path
