"""Extension of griffe, for mkdocstrings: the parts of a docstring (Shapes, Memory, State, Raises, ...) become a list.

In the sources a part is a line "Word:  text", with the lines that belong to it indented below.
"""

import re
from typing import Any

import griffe

PART = re.compile(r"^(\w[\w ,`.]{0,30}):\s+(\S.*)$")


class DocstringLists(griffe.Extension):
    """Rewrites the docstring of every object before it is shown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The text with its parts as points of a list; text without parts as it is."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        part = PART.match(line)
        if part and (inside or not lines or lines[-1] == ""):
            lines.append(f"- **{part[1]}:** {part[2]}")
            inside = True
        elif inside and line.startswith("  ") and line.strip():
            lines.append(f"    {line.strip()}")
        else:
            if inside and line.strip():
                lines.append("")
            inside = False
            lines.append(line)
    return "\n".join(lines)
