"""Write docs/config.md from the config's own sections: python docs/config_page.py"""

import typing
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from seqengine.config.data import MixSection, StageSection
from seqengine.config.optim import OptimGroup
from seqengine.config.run import RunConfig
from seqengine.config.values import Section

ARRAYS: dict[str, dict[str, type[Section]]] = {
    "optim": {"groups": OptimGroup},
    "data": {"mix": MixSection, "stages": StageSection},
}
"""Arrays of tables, by section."""

HEAD = """# Configuration

A config is a TOML file. `extends = "other.toml"` (or a preset's name) lays it over another; `a.b=c` on the command line
lays over both. Whole numbers may be written `1k`, `1Ki`, `2.5M`, `10B`; shares `1%`; durations `90s`, `30min`, `2h`.
Paths are relative to the working directory. Every key below is optional but `train.steps` or `train.tokens`. This page is
made from the code by `python docs/config_page.py`; a test compares them.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        parts += _section(name, field.annotation)
        for table, section in ARRAYS.get(name, {}).items():
            parts += _section(f"{name}.{table}", section, brackets=("[[", "]]"))
    return "\n".join(parts)


def _section(path: str, section: Any, brackets: tuple[str, str] = ("[", "]")) -> list[str]:
    assert issubclass(section, Section)
    about = (section.__doc__ or "").strip().split("\n")[0].split(":", 1)[-1].strip().rstrip(".")
    title = f"## {brackets[0]}{path}{brackets[1]}"
    rows = [
        "",
        title,
        "",
        *([about[:1].upper() + about[1:] + ".", ""] if about else []),
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    nested: list[str] = []
    for key, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            nested += _section(f"{path}.{key}", annotation)
        elif key not in ARRAYS.get(path, {}):
            default = "" if field.is_required() or field.default is None else f"`{_toml(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            assert meaning, f"{path}.{key} needs a docstring"
            choices = _choices(annotation)
            rows.append(f"| `{key}` | {default} | {'; '.join(x for x in (choices, meaning) if x)} |")
    return rows + nested


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def _choices(annotation: Any) -> str:
    """The words that a key takes, if it takes words only."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, typing.Union):
        return ""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_toml(v)}`" for v in get_args(annotation))
    return ""


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page())
