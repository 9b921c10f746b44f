"""Validation errors in people's words: the key, what must hold, what was got, where it was set, what to do.

pydantic reports one error per branch of a union and in its own terms; here they become one message per key, worded from
the key's type.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from seqengine.config.layers import key_text
from seqengine.config.lines import KeyPath
from seqengine.config.values import Section, Wording

_PLAIN = {
    bool: "true or false",
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    Path: "a path in quotes",
}
_LONGEST_VALUE = 60


def problems_of(
    error: ValidationError, root: type[Section], name: str, table: Any, origins: Mapping[KeyPath, str]
) -> list[str]:
    """One message for each wrong key of the section `name` of `root`, which was read from `table`."""
    section = section_of(root.model_fields[name].annotation)
    assert section is not None, f"{name} is not a section"
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(_key_of(details["loc"], section), []).append(details)
    messages: list[str] = []
    for key, details_of_key in by_key.items():
        path: KeyPath = (name, *key)
        messages += [_with_origin(text, path, origins) for text in _texts(path, details_of_key, root, {name: table})]
    return messages


def _with_origin(text: str, path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """`text` and where its key was set; a missing key has the place of its table."""
    by_text = {key_text(key): key for key in origins}
    # A section's own check starts with the key that it blames, which lies deeper than the section.
    path = by_text.get(text.split(maxsplit=1)[0].rstrip(":"), path)
    places = [origins[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in origins]
    return f"{text} ({places[0]})" if places else text


def unknown_key(path: KeyPath, root: type[Section]) -> str:
    """'train.lr: unknown key; did you mean 'optim.lr'?', or the keys that there are."""
    table = path[:-1]
    every_key = _all_keys(root)
    siblings = [key for key in every_key if key[:-1] == tuple(part for part in table if isinstance(part, str))]
    name = str(path[-1])
    close = get_close_matches(name, [key[-1] for key in siblings], n=2)
    likely = [(*table, last) for last in close] + [key for key in every_key if key[-1] == name]
    if not likely:
        near = get_close_matches(name, {key[-1] for key in every_key}, n=1, cutoff=0.75)
        likely = [key for key in every_key if key[-1] in near]
    what = "unknown key" if table else "unknown section"
    if likely:
        # A dict keeps the order and drops what both searches found.
        return f"{key_text(path)}: {what}; did you mean {_or([repr(key_text(key)) for key in dict.fromkeys(likely)])}?"
    known = ", ".join(key[-1] for key in siblings)
    return f"{key_text(path)}: {what}; {f'[{key_text(table)}] has' if table else 'the sections are'}: {known}"


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key of this type holds, alone or in an array; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = [section_of(argument) for argument in get_args(annotation)]
    return next((section for section in inner if section is not None), None)


def _key_of(loc: Sequence[str | int], section: type[Section]) -> KeyPath:
    """The part of pydantic's location that is the user's key; it goes on with the names of union branches."""
    path: KeyPath = ()
    inside: type[Section] | None = section
    for part in loc:
        if inside is None:
            break
        path = (*path, part)
        if isinstance(part, str):
            field = inside.model_fields.get(part)
            inside = None if field is None else section_of(field.annotation)
    return path


def _texts(path: KeyPath, errors: list[ErrorDetails], root: type[Section], tree: Mapping[str, Any]) -> list[str]:
    """Messages for one key, its origin left out."""
    key, first = key_text(path), errors[0]
    if first["type"] == "extra_forbidden":
        return [unknown_key(path, root)]
    field = _field(path, root)
    expected = "a table" if isinstance(path[-1], int) or field is None else describe(field.annotation, field.metadata)
    whole = field is None or section_of(field.annotation) is not None
    if first["type"] == "missing" and first["loc"] and first["loc"][-1] == path[-1]:
        return [f"{key}: missing; it must be {expected}"]
    own = str(first["ctx"]["error"]) if first["type"] == "value_error" and "ctx" in first else ""
    if own and whole:
        return [own if own.startswith(key) else f"{key}: {own}"]
    rule = own if own and len(errors) == 1 else f"must be {expected}"
    return [f"{key}: {rule}, got {_shown(_value(path, tree))}"]


def _field(path: KeyPath, root: type[Section]) -> FieldInfo | None:
    field: FieldInfo | None = None
    section: type[Section] | None = root
    for part in path:
        if isinstance(part, str) and section is not None:
            field = section.model_fields.get(part)
            section = None if field is None else section_of(field.annotation)
    return field


def _value(path: KeyPath, tree: Any) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: "a whole number above 0 (such as 1000, '1k') or 'auto'"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    wordings = [item for item in metadata if isinstance(item, Wording)]
    if origin is Annotated:
        return describe(arguments[0], (*arguments[1:], *metadata))
    if wordings:
        examples = f" (such as {wordings[-1].examples})" if wordings[-1].examples else ""
        return f"{wordings[-1].kind}{_bounds(metadata)}{examples}"
    if origin in (Union, UnionType):
        return _or([describe(argument) for argument in arguments if argument is not type(None)])
    if origin is Literal:
        return _or([repr(argument) for argument in arguments])
    if origin is tuple:
        many = "an array of" if arguments[-1] is Ellipsis else f"an array of {len(arguments)} values, each"
        return f"{many} {'tables' if section_of(arguments[0]) else describe(arguments[0])}"
    if section_of(annotation) is not None:
        return "a table"
    return f"{_PLAIN.get(annotation, 'a value of another type')}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    # A Field inside Annotated keeps its bounds in its own metadata.
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [(word, getattr(part, name)) for part in parts for name, word in words.items() if hasattr(part, name)]
    texts = [f" {word} {limit if isinstance(limit, int) else format(limit, 'g')}" for word, limit in found]
    return " and".join(texts)


def _all_keys(section: type[Section], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a section and of the sections in it; the sections themselves too."""
    keys: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        keys.append((*path, name))
        inner = section_of(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, (*path, name))
    return keys


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shown(value: Any) -> str:
    """A value as its TOML looks, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    text = repr(value) if isinstance(value, str | int | float | list) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
