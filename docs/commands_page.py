"""Write docs/reference/commands.md from the parser of the command line: python docs/commands_page.py"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from seqengine.launch.cli import _parser

HEAD = """# Commands

`seqengine COMMAND --help` says the same. Settings `a.b=c` are keys of [a config](../config.md), and take precedence over its
file; they may stand before options and after them. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped after a good save.
This page is made from the command line's own parser by `python docs/commands_page.py`; a test compares them.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(parser, about) for parser, about in _commands(_parser(), ""))])


def _commands(parser: argparse.ArgumentParser, about: str) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The parsers that do something, with what they are for."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser, about
        yield from ((other, other.description or "") for other in getattr(parser, "below", {}).values())
    for action in below:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, other in action.choices.items():
            yield from _commands(other, helps.get(name, ""))


def _section(parser: argparse.ArgumentParser, about: str) -> str:
    given = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    words = [_metavar(action) for action in given if not action.option_strings]
    lines = [f"## `{' '.join([parser.prog, *words])}`", "", f"{about[:1].upper()}{about[1:]}.", ""]
    told = [action for action in given if action.option_strings or action.help]
    if told:
        lines += ["| | |", "|---|---|"]
    for action in told:
        flags = [" ".join(filter(None, (flag, _value(action)))) for flag in action.option_strings]
        name = "`, `".join(flags) if flags else _metavar(action)
        lines.append(f"| `{name}` | {_meaning(action)} |")
    return "\n".join([*lines, ""])


def _metavar(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    name = name.replace("|", " or ")
    return f"[{name} ...]" if action.nargs == "*" else f"{name} ..." if action.nargs == "+" else name


def _value(action: argparse.Action) -> str:
    """What follows a flag."""
    if action.nargs == 0:
        return ""
    return " or ".join(map(str, action.choices)) if action.choices else _metavar(action)


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "").replace("|", "\\|")
    notes = ["needed"] if action.option_strings and action.required else []
    if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text:
        notes.append(f"default {action.default}")
    return "; ".join(filter(None, (text, *notes)))


if __name__ == "__main__":
    (Path(__file__).parent / "reference" / "commands.md").write_text(page())
