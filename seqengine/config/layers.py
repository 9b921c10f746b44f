"""Layers of a config: TOML files that extend each other, then `a.b=c` overrides, merged with the origin of every key.

A key is a path of names, and of indices inside arrays: ("optim", "groups", 0, "match"). Nothing here knows the schema
but for the pairs of keys that exclude each other.
"""

import os.path
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seqengine.config.lines import KeyPath, nodes, scan_lines
from seqengine.errors import InputError

PRESETS = Path(__file__).resolve().parent.parent / "configs"
EXCLUSIVE: tuple[tuple[KeyPath, KeyPath], ...] = ((("train", "steps"), ("train", "tokens")),)
"""Pairs of which a later layer's one replaces an earlier layer's other."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OVERRIDE_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_SYNTAX_PLACE = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)


@dataclass(frozen=True)
class Layer:
    """One file, or the command line: its table, and the origin of every key in it."""

    tree: dict[str, Any]
    origins: dict[KeyPath, str]


@dataclass(frozen=True)
class Merged:
    """All layers as one table, the origin of every key in it, and what was wrong with the layers."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def key_text(path: KeyPath) -> str:
    """("optim", "groups", 0, "match") -> 'optim.groups[0].match'; a name that TOML would quote is quoted."""
    names = [
        f"[{part}]" if isinstance(part, int) else f".{part if _NAME.fullmatch(part) else repr(part)}" for part in path
    ]
    return "".join(names).removeprefix(".")


def preset_names() -> list[str]:
    """Names of the packaged configs."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_files(source: str | Path) -> list[Layer]:
    """The file (or the preset) and all that it extends, the base first. Raises InputError."""
    layers: list[Layer] = []
    chain: list[tuple[Path, str]] = []
    path, shown = _find(source, beside=None, wanted_by="")
    while True:
        if path.resolve() in [seen.resolve() for seen, _ in chain]:
            raise InputError(f"extends goes in a circle: {' -> '.join([*(name for _, name in chain), shown])}")
        chain.append((path, shown))
        layer, parent = _read_file(path, shown, extended=bool(layers))
        layers.insert(0, layer)
        if parent is None:
            return layers
        name, wanted_by = parent
        path, shown = _find(name, beside=chain[-1], wanted_by=wanted_by)


def _find(source: str | Path, *, beside: tuple[Path, str] | None, wanted_by: str) -> tuple[Path, str]:
    """Path of a file or preset, and how messages call it; `beside` is the file whose `extends` names it."""
    name = str(source) or "''"
    path = Path(source) if beside is None else beside[0].parent / source
    shown = name if beside is None else os.path.normpath(Path(beside[1]).parent / source)
    # os.path, because pathlib raises for a name that is too long.
    if os.path.isfile(path):
        return path, shown
    if Path(name).name == name and not name.endswith(".toml"):
        preset = PRESETS / f"{name}.toml"
        if os.path.isfile(preset):
            return preset, f"configs/{name}.toml"
    presets = preset_names()
    close = get_close_matches(Path(name).name.removesuffix(".toml"), presets, n=1)
    hint = f"did you mean the preset '{close[0]}'?" if close else f"the presets are: {', '.join(presets)}"
    what = "is a directory, not a config file" if os.path.isdir(path) else "no such config file or preset"
    raise InputError(f"{wanted_by}{shown}: {what}; {hint}")


def _read_file(path: Path, shown: str, *, extended: bool) -> tuple[Layer, tuple[str, str] | None]:
    """One file as a layer, and what it extends together with the start of a message about that."""
    try:
        # utf-8-sig, because some editors put a byte order mark before the first key.
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise InputError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: must be UTF-8 text; byte {error.start} is not; save the file as UTF-8") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _SYNTAX_PLACE.fullmatch(str(error))
        if place is None:
            raise InputError(f"{shown}: not valid TOML: {error}") from None
        what, line, column = place.groups()
        raise InputError(f"{shown}:{line}: not valid TOML: {what}, at column {column}") from None
    lines = scan_lines(text)
    parent = tree.pop("extends", None)
    line = lines.pop(("extends",), 0)
    if not isinstance(parent, str | None):
        raise InputError(f"extends: must be the name of one TOML file or preset, got {parent!r} ({shown}:{line})")
    suffix = " (extended)" if extended else ""
    layer = Layer(tree, {key: f"{shown}:{number}{suffix}" for key, number in lines.items()})
    return layer, None if parent is None else (parent, f"extends ({shown}:{line}): ")


def parse_overrides(overrides: Sequence[str], below: Mapping[str, Any]) -> tuple[Layer, list[str]]:
    """`a.b=c` arguments as one layer, and what is wrong with them; `below` is the table that they go over."""
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or _OVERRIDE_KEY.fullmatch(key) is None:
            problems.append(f"'{override}': an override must look like section.key=value, such as optim.lr=1e-3")
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            problems.append(f"{override!a}: must be UTF-8 text; rename the file, or quote the value as UTF-8")
            continue
        path = tuple(key.split("."))
        blocker = _blocker(path, tree) or _blocker(path, below)
        if blocker is not None:
            problems.append(f"'{override}': {key_text(blocker)} is not a table, so {key} cannot be set inside it")
            continue
        table = tree
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = _override_value(value.strip())
    return Layer(tree, {path: "command line" for path, _ in nodes(tree)}), problems


def _blocker(path: tuple[str, ...], tree: Mapping[str, Any]) -> KeyPath | None:
    """The first part of `path` that is in `tree` and not a table, the last part aside."""
    table: Any = tree
    for depth, part in enumerate(path[:-1], start=1):
        if part not in table:
            return None
        table = table[part]
        if not isinstance(table, dict):
            return path[:depth]
    return None


def _override_value(text: str) -> Any:
    """A TOML value, or else the text itself: 3, 1e-3, true, ["a"], {x = 1}; 10B and 30min stay text."""
    try:
        parsed = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # No key holds a date, but a run may be named 2024-01-01; a line break could smuggle in a second key.
    if parsed.keys() != {"x"} or isinstance(parsed["x"], date | datetime | time):
        return text
    return parsed["x"]


def lay_over(merged: Merged, layer: Layer) -> None:
    """Put `layer` over `merged`, in place: tables merge, anything else (arrays too) is replaced."""
    values = dict(nodes(layer.tree))
    for pair in EXCLUSIVE:
        given = [path for path in pair if path in values]
        for path in given:
            _remove(merged, pair[1] if path == pair[0] else pair[0])
        if len(given) == 2:
            names = " and ".join(key_text(path) for path in given)
            got = " and ".join(f"{key_text(path)} = {values[path]!r} ({layer.origins[path]})" for path in given)
            merged.problems.append(f"{names} exclude each other, got {got}; delete one of them")
    _merge_table(merged.tree, layer.tree, merged.origins, layer.origins, ())
    for first, second in EXCLUSIVE:
        # Told above; with both left in, the same would be told once more of the whole.
        if first in values and second in values:
            _remove(merged, second)


def _remove(merged: Merged, path: KeyPath) -> None:
    table: Any = merged.tree
    for part in path[:-1]:
        table = table.get(part)
        if not isinstance(table, dict):
            return
    table.pop(path[-1], None)
    _forget(merged.origins, path)


def _forget(origins: dict[KeyPath, str], path: KeyPath) -> None:
    for key in [key for key in origins if key[: len(path)] == path]:
        del origins[key]


def _merge_table(
    into: dict[str, Any],
    table: Mapping[str, Any],
    origins: dict[KeyPath, str],
    new_origins: Mapping[KeyPath, str],
    path: KeyPath,
) -> None:
    for key, value in table.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            origins[here] = new_origins.get(here, "default")
            _merge_table(into[key], value, origins, new_origins, here)
            continue
        into[key] = _copy(value)
        _forget(origins, here)
        origins.update({node: new_origins.get(node, "default") for node in _paths(here, value)})


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _paths(here: KeyPath, value: Any) -> Iterator[KeyPath]:
    yield here
    yield from ((*here, *path) for path, _ in nodes(value))
