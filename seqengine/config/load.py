"""Read a run's config: a TOML file or preset, what it extends, `a.b=c` overrides; every problem is told at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from seqengine.config.data import DataSection
from seqengine.config.layers import Merged, key_text, lay_over, parse_overrides, read_files
from seqengine.config.lines import KeyPath, nodes
from seqengine.config.run import RunConfig, check_sections
from seqengine.config.values import Section
from seqengine.config.wording import problems_of, section_of, unknown_key
from seqengine.errors import InputError


@dataclass(frozen=True)
class Loaded:
    """A config and where each of its values came from."""

    config: RunConfig
    provenance: dict[str, str]
    """Dotted key -> 'configs/x.toml:14', 'configs/base.toml:3 (extended)', 'command line' or 'default'."""


def load(source: str | Path, overrides: Sequence[str] = (), *, need_data: bool = True) -> Loaded:
    """Read a TOML file, or a preset by its bare name, with `section.key=value` overrides on top. Writes nothing.

    Layers: what the file extends < the file < the overrides. With `need_data` the data files must exist. Relative paths
    of data files are relative to the working directory. Raises InputError with every problem found.
    """
    merged = Merged()
    problems: list[str] = []
    try:
        for layer in read_files(source):
            lay_over(merged, layer)
    except InputError as error:
        # What lies under the overrides is not known, so only their form can still be judged.
        raise InputError(*error.problems, *parse_overrides(overrides, {})[1]) from None
    command_line, malformed = parse_overrides(overrides, merged.tree)
    lay_over(merged, command_line)

    sections, wrong = _validate(merged)
    problems += [*malformed, *merged.problems, *wrong, *(nul := _with_nul(merged))]
    problems += [problem.text + _origins(problem.keys, merged) for problem in check_sections(sections)]
    data = sections.get("data")
    if need_data and isinstance(data, DataSection) and not nul:
        problems += _missing_data(data, merged)
    if problems:
        raise InputError(*problems)
    config = RunConfig.model_validate(dict(sections))
    return Loaded(config, _provenance(config, merged.origins))


def _with_nul(merged: Merged) -> list[str]:
    """Text that no file system takes in a path, and nobody can read in a name."""
    found = [path for path, value in nodes(merged.tree) if isinstance(value, str) and "\0" in value]
    return [
        f"{key_text(path)}: must not hold the character NUL ({merged.origins.get(path, 'default')})"
        for path in found
        if path[-1] != "separator"
    ]


def _validate(merged: Merged) -> tuple[dict[str, Section], list[str]]:
    """The sections that are valid by themselves, and what is wrong with the others."""
    sections: dict[str, Section] = {}
    problems: list[str] = []
    for name in merged.tree.keys() - RunConfig.model_fields.keys():
        origin = merged.origins.get((name,))
        problems.append(unknown_key((name,), RunConfig) + (f" ({origin})" if origin else ""))
    problems.sort()
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None, f"RunConfig.{name} is not a section"
        table = merged.tree.get(name, {})
        try:
            sections[name] = section.model_validate(table)
        except ValidationError as error:
            problems += problems_of(error, RunConfig, name, table, merged.origins)
    return sections, problems


def _origins(keys: Sequence[str], merged: Merged) -> str:
    """' (train.steps: configs/x.toml:3; data.seq_len: default)'."""
    by_text = {key_text(path): origin for path, origin in merged.origins.items()}
    told = [f"{key}: {by_text.get(key, 'default')}" for key in keys]
    return f" ({'; '.join(told)})"


def _missing_data(data: DataSection, merged: Merged) -> list[str]:
    """What is wrong with the files that the data section names; synthetic data has none."""
    if data.source != "fasta":
        return []
    problems: list[str] = []
    if data.fasta is None and data.bed is None:
        problems.append(
            "data.fasta: no genome given; add data.fasta=/path/to/genome.fa to the command, set fasta under [data], "
            "or try data.source=synthetic"
        )
    for name, path in (("fasta", data.fasta), ("bed", data.bed)):
        if path is None:
            continue
        what = _why_unreadable(path)
        if what:
            origin = merged.origins.get(("data", name), "default")
            problems.append(f"data.{name}: {what}: '{path}'; check the path ({origin})")
    return problems


def _why_unreadable(path: Path) -> str | None:
    try:
        if path.is_file():
            return None
        return "is not a file" if path.exists() else "no such file"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"


def _provenance(config: RunConfig, origins: Mapping[KeyPath, str]) -> dict[str, str]:
    """Where each value of the config came from; a key that no layer set is a default."""
    found: dict[str, str] = {}

    def visit(section: Section, path: KeyPath) -> None:
        for name in type(section).model_fields:
            here, value = (*path, name), getattr(section, name)
            if isinstance(value, Section):
                visit(value, here)
                continue
            found[key_text(here)] = origins.get(here, "default")
            if isinstance(value, tuple):
                for index, item in enumerate(value):
                    if isinstance(item, Section):
                        visit(item, (*here, index))

    visit(config, ())
    return found
