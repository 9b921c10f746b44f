"""Building blocks of the config: the strict section, and the numbers that people write (1k, 1Ki, 10B, 30min, 1%).

Every section of a run's config derives from `Section`; a component may keep its own section beside its code. This
module imports nothing of the project, so any file may import it.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the config: unknown keys and wrong types are errors, values are frozen once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    FORGOTTEN: ClassVar[frozenset[str]] = frozenset()
    """Settings that may change under trained weights: how they began, how they learn, how far positions are stretched."""

    @property
    def is_told_by_max_len(self) -> bool:
        """Whether the same weights compute something else for another model.max_len."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        """TOML has arrays where sections have tuples."""
        if not isinstance(data, dict):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


@dataclass(frozen=True)
class Wording:
    """What a value is, in words, for messages: "must be {kind} above 0 (such as {examples})"."""

    kind: str
    examples: str = ""


_COUNT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(Ki|Mi|Gi|Ti|k|K|M|G|B|T)?\s*")
_MULTIPLE = {
    None: 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|sec|min|m|h|d)\s*")
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


def parse_count(value: Any) -> Any:
    """'1k' -> 1000, '1Ki' -> 1024, '10B' -> 10**10, '2.5M' -> 2500000; what is not text passes through."""
    if isinstance(value, str):
        match = _COUNT.fullmatch(value)
        if match is None:
            raise ValueError("must be a whole number such as 1000, '1k', '1Ki', '2.5M' or '10B'")
        number, suffix = match.groups()
        # Decimal, because 2.3 * 10**6 is not a whole number in binary.
        scaled = Decimal(number.replace("_", "")) * _MULTIPLE[suffix]
        if scaled != scaled.to_integral_value():
            raise ValueError("must be a whole number once its suffix is applied")
        return int(scaled)
    return value


def parse_fraction(value: Any) -> Any:
    """'1%' -> 0.01; numbers pass through."""
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value)
        if match is None:
            raise ValueError("must be a number or a percentage such as '1%'")
        return float(match.group(1)) / 100.0
    return value


def parse_duration(value: Any) -> Any:
    """'90s' -> 90.0, '30min' -> 1800.0, '2h' -> 7200.0; numbers are seconds."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError("must be a duration such as '90s', '30min' or '2h'")
        number, unit = match.groups()
        return float(number) * _SECONDS[unit]
    return value


def parse_fraction_or_count(value: Any) -> Any:
    """'1%' -> 0.01, a share of the whole; '10M' -> 10**7, a count. Numbers keep their type: 0.01, 1000."""
    if not isinstance(value, str):
        return value
    if _PERCENT.fullmatch(value):
        return parse_fraction(value)
    try:
        return parse_count(value)
    except ValueError:
        raise ValueError("must be a share such as 0.01 or '1%', or tokens such as 1000 or '10M'") from None


def parse_steps_or_seconds(value: Any) -> Any:
    """'500', '1k' -> steps (int); '30min', '90s' -> seconds (float). Numbers keep their type: 500 steps, 90.0 seconds.

    'm' is minutes and 'M' is a million steps, as in the two notations by themselves.
    """
    if not isinstance(value, str):
        return value
    if _DURATION.fullmatch(value):
        return parse_duration(value)
    try:
        return parse_count(value)
    except ValueError:
        raise ValueError("must be steps such as 500 or '1k', or a duration such as '90s', '30min' or '2h'") from None


Count = Annotated[int, BeforeValidator(parse_count), Wording("a whole number", "1000, '1k', '1Ki' or '10B'")]
Fraction = Annotated[float, BeforeValidator(parse_fraction), Wording("a number", "0.01 or '1%'")]
Seconds = Annotated[float, BeforeValidator(parse_duration), Wording("a duration", "'90s', '30min' or '2h'")]
Positive = Annotated[Count, Field(gt=0)]
Share = Annotated[Fraction, Field(ge=0.0, le=1.0)]


def _path(value: Any) -> Any:
    """A leading ~ is the home directory: a shell does not expand it inside `data.fasta=~/genome.fa`."""
    if not isinstance(value, str):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a path; its home directory is not known: {error}") from None


FilePath = Annotated[Path, BeforeValidator(_path), Wording("a path in quotes")]
