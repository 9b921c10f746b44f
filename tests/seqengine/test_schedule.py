"""The learning rate as a pure function of tokens: every boundary, every shape, continuity, bad input."""

import math
import random
from itertools import pairwise

import pytest
from pydantic import ValidationError

from seqengine.config.optim import ScheduleSection
from seqengine.schedule import SHAPES, learning_rate

TOTAL = 10_000
SECTIONS = [
    ScheduleSection(kind="cosine", warmup=0.1),
    ScheduleSection(kind="linear", warmup=1000, min_ratio=0.0),
    ScheduleSection(kind="constant", warmup=0.1),
    *[ScheduleSection(kind="wsd", warmup=0.1, decay=0.3, decay_shape=shape) for shape in SHAPES],
]
ids = [f"{s.kind}-{s.decay_shape}" for s in SECTIONS]


def rate(tokens, section, base=1.0, total=TOTAL):
    return learning_rate(tokens, total, base, section)


def test_cosine_with_warm_up():
    section = ScheduleSection(kind="cosine", warmup=100, min_ratio=0.1)
    rates = [learning_rate(t, 1100, 2.0, section) for t in range(0, 1101, 50)]
    assert 0 < rates[0] < 0.02
    assert rates[1] == pytest.approx(1.0, rel=0.02)
    assert rates[2] == 2.0
    assert learning_rate(600, 1100, 2.0, section) == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(5000, 1100, 2.0, section) == pytest.approx(0.2)


def test_linear_and_constant_schedules_and_warm_up_as_a_share():
    section = ScheduleSection(kind="linear", warmup=0.1, min_ratio=0.0)
    assert learning_rate(550, 1000, 1.0, section) == pytest.approx(0.5)
    assert learning_rate(990, 1000, 1.0, ScheduleSection(kind="constant", warmup=0.1)) == 1.0
    assert learning_rate(0, 1000, 1.0, ScheduleSection(warmup=0)) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_is_stable_until_its_decay_and_follows_its_shape(shape):
    section = ScheduleSection(kind="wsd", warmup=1000, decay=2000, decay_shape=shape, min_ratio=0.1)
    assert {rate(t, section, 3.0) for t in (1000, 1001, 4000, 7999, 8000)} == {3.0}
    assert rate(8001, section, 3.0) < 3.0
    half = {"linear": 0.5, "sqrt": 1 - math.sqrt(0.5), "cosine": 0.5}[shape]
    quarter = {"linear": 0.75, "sqrt": 0.5, "cosine": 0.5 * (1 + math.sqrt(0.5))}[shape]
    assert rate(8500, section) == pytest.approx(0.1 + 0.9 * quarter)
    assert rate(9000, section) == pytest.approx(0.1 + 0.9 * half)
    assert [rate(t, section) for t in (10_000, 10_001, 99_999)] == pytest.approx([0.1] * 3)


def test_wsd_goes_on_from_its_stable_part_when_the_run_is_made_longer():
    section = ScheduleSection(kind="wsd", warmup=1000, decay=2000)
    assert all(rate(t, section, total=TOTAL) == rate(t, section, total=2 * TOTAL) for t in range(0, 8001, 100))
    assert rate(9000, section, total=2 * TOTAL) == 1.0


def test_wsd_lengths_as_shares_are_those_in_tokens():
    share, tokens = (ScheduleSection(kind="wsd", warmup=w, decay=d) for w, d in (("10%", "20%"), (1000, 2000)))
    assert [rate(t, share) for t in range(0, TOTAL, 37)] == [rate(t, tokens) for t in range(0, TOTAL, 37)]
    assert ScheduleSection(kind="wsd").decay == 0.2


def test_a_decay_without_a_stable_part_begins_where_the_warm_up_ends():
    section = ScheduleSection(kind="wsd", warmup=0.5, decay=0.5, decay_shape="linear", min_ratio=0.0)
    assert [rate(t, section) for t in (5000, 7500, 10_000)] == pytest.approx([1.0, 0.5, 0.0])
    assert rate(0, ScheduleSection(kind="wsd", warmup=0, decay=1.0)) == 1.0
    none = ScheduleSection(kind="wsd", warmup=0, decay=0)
    assert [rate(t, none) for t in (0, 9999, 10_001)] == [1.0, 1.0, 0.1]


@pytest.mark.parametrize("section", SECTIONS, ids=ids)
def test_rates_move_without_jumps_and_stay_in_range(section):
    rates = [rate(t, section) for t in range(TOTAL + 500)]
    steps = [abs(b - a) for a, b in pairwise(rates)]
    # 1 - sqrt(x) begins with an infinite slope: over one token of 3000 it falls by 1 / sqrt(3000).
    assert max(steps) < (0.02 if section.decay_shape == "sqrt" and section.kind == "wsd" else 0.0015)
    assert min(rates) > 0 or section.min_ratio == 0
    assert max(rates) == 1.0
    after = rates[1000:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("section", SECTIONS, ids=ids)
def test_a_rate_depends_on_its_tokens_alone(section):
    tokens = random.Random(0).sample(range(TOTAL), 200)
    assert {t: rate(t, section) for t in tokens} == {t: rate(t, section) for t in sorted(tokens)}
    assert rate(tokens[0], section, 5.0) == pytest.approx(5.0 * rate(tokens[0], section))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.3}, r"schedule\.decay would do nothing: it needs schedule\.kind = 'wsd'; got 'cosine'"),
        ({"kind": "linear", "decay_shape": "linear"}, r"schedule\.decay_shape would do nothing"),
        ({"kind": "constant", "min_ratio": 0.5}, r"schedule\.min_ratio would do nothing"),
        (
            {"kind": "wsd", "warmup": 0.6, "decay": 0.5},
            r"schedule\.decay = 0\.5 and schedule\.warmup = 0\.6 must be at most 1",
        ),
        ({"kind": "wsd", "decay": 1.5}, "decay"),
        ({"kind": "wsd", "decay": -1}, "decay"),
        ({"kind": "wsd", "decay_shape": "square"}, "decay_shape"),
        ({"kind": "trapezoid"}, "kind"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleSection(**settings)


def test_defaults_may_be_written_out():
    assert ScheduleSection(decay=0.2, decay_shape="sqrt", min_ratio=0.1) == ScheduleSection()
