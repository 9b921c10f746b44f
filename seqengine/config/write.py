"""Write a resolved config as TOML that `load` reads back to an equal one, and tell two configs apart."""

from pathlib import Path

from seqengine.config.load import Loaded
from seqengine.config.run import RunConfig
from seqengine.config.values import Section

_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r",
}  # fmt: skip


def dump(loaded: Loaded) -> str:
    """The config as TOML, every line with the origin of its value; values that are None are left out."""
    lines: list[str] = []
    for name in RunConfig.model_fields:
        _write_table(lines, f"[{name}]", name, getattr(loaded.config, name), loaded.provenance)
    return "\n".join(lines).lstrip("\n") + "\n"


def changed(old: RunConfig, new: RunConfig) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ -> (old value, new value); an array counts as one value."""
    before, after = _flat(old), _flat(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _write_table(lines: list[str], header: str, key: str, section: Section, provenance: dict[str, str]) -> None:
    """Plain keys first, because in TOML all that follows a sub-table's header belongs to the sub-table."""
    lines += ["", header]
    tables: list[tuple[str, str, Section]] = []
    for name in type(section).model_fields:
        value, dotted = getattr(section, name), f"{key}.{name}"
        path = header.strip("[]") + f".{name}"
        if isinstance(value, Section):
            tables.append((f"[{path}]", dotted, value))
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            tables += [(f"[[{path}]]", f"{dotted}[{index}]", item) for index, item in enumerate(value)]
        elif value is not None:
            lines.append(f"{name} = {_value(value)}  # {_comment(provenance.get(dotted, 'default'))}")
    for sub_header, dotted, item in tables:
        _write_table(lines, sub_header, dotted, item, provenance)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return f'"{"".join(_escaped(letter) for letter in str(value))}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"dump: a config value must be a number, text, a path or an array, got {type(value).__name__}")


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    return letter if letter >= " " and letter != "\x7f" else f"\\u{ord(letter):04x}"


def _comment(text: str) -> str:
    """Comments may not hold control characters, and a file's name may."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _flat(section: Section, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found.update(_flat(value, f"{path}{name}."))
        else:
            found[f"{path}{name}"] = value
    return found
