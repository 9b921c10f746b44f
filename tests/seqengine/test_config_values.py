"""The numbers that people write: counts, shares, durations."""

import pytest
from pydantic import ValidationError

from seqengine.config.data import DataSection
from seqengine.config.engine import CkptSection
from seqengine.config.optim import ScheduleSection
from seqengine.config.sections import TrainSection
from seqengine.config.values import (
    Section,
    parse_count,
    parse_duration,
    parse_fraction,
    parse_fraction_or_count,
    parse_steps_or_seconds,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("1000", 1000), ("1_000", 1000), ("1k", 1000), ("1K", 1000), ("1Ki", 1024), ("16Ki", 16384),
        ("2.5M", 2_500_000), ("1.5Ki", 1536), ("10B", 10**10), ("1G", 10**9), ("3Ti", 3 * 2**40), (" 7 k ", 7000),
    ],
)  # fmt: skip
def test_count_reads_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


def test_count_is_exact_where_binary_floats_are_not() -> None:
    assert parse_count("2.3M") == 2_300_000
    assert parse_count("9007199254740993") == 2**53 + 1


@pytest.mark.parametrize("text", ["", "k", "fast", "1.5", "1.0001k", "-1k", "1e3", "1KiB", "1 000", "٣"])
def test_count_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        parse_count(text)


def test_fraction_reads_percent_and_passes_numbers_on() -> None:
    assert parse_fraction("1%") == 0.01
    assert parse_fraction(" 12.5 % ") == 0.125
    assert parse_fraction(0.3) == 0.3
    with pytest.raises(ValueError, match="percentage"):
        parse_fraction("one")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("5m", 300), ("2h", 7200), ("1.5d", 129600), ("10 sec", 10)]
)
def test_duration_reads_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "soon", "-1s", "1w", "1M"])
def test_duration_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("500", 500),
        ("1k", 1000),
        (500, 500),
        ("30min", 1800.0),
        ("90s", 90.0),
        ("2h", 7200.0),
        ("1m", 60.0),
        ("1M", 10**6),
    ],
)
def test_checkpoint_interval_is_steps_or_seconds_by_type(value: str | int, expected: float) -> None:
    every = CkptSection.model_validate({"every": value}).every
    assert every == expected
    assert type(every) is type(expected)


@pytest.mark.parametrize("text", ["often", "1.5", "10%", ""])
def test_checkpoint_interval_refuses_in_plain_words(text: str) -> None:
    with pytest.raises(ValueError, match="must be steps such as 500 or '1k', or a duration such as"):
        parse_steps_or_seconds(text)


@pytest.mark.parametrize("value", [0, -5, 0.0, True, float("inf"), float("nan")])
def test_checkpoint_interval_must_be_above_zero(value: object) -> None:
    with pytest.raises(ValidationError):
        CkptSection.model_validate({"every": value})


@pytest.mark.parametrize(("value", "expected"), [("1%", 0.01), (0.05, 0.05), ("10M", 10**7), (1000, 1000), (0, 0)])
def test_warmup_is_a_share_or_tokens_by_type(value: object, expected: float) -> None:
    warmup = ScheduleSection.model_validate({"warmup": value}).warmup
    assert warmup == expected
    assert type(warmup) is type(expected)


def test_warmup_refuses_a_share_above_one() -> None:
    with pytest.raises(ValidationError):
        ScheduleSection.model_validate({"warmup": "150%"})
    with pytest.raises(ValueError, match="share such as"):
        parse_fraction_or_count("some")


def test_numbers_must_be_finite() -> None:
    class Sample(Section):
        rate: float

    assert Sample(rate=1).rate == 1.0
    for value in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ValidationError):
            Sample(rate=value)


@pytest.mark.parametrize("value", [True, 1.0, "true", None])
def test_a_count_is_not_another_type(value: object) -> None:
    with pytest.raises(ValidationError):
        TrainSection.model_validate({"batch_tokens": value})


def test_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert str(DataSection.model_validate({"fasta": "~/genome.fa"}).fasta) == "/home/of/someone/genome.fa"


def test_sections_are_frozen() -> None:
    section = TrainSection(steps=3)
    with pytest.raises(ValidationError):
        section.steps = 4
