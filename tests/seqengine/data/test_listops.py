"""ListOps: the value of every expression by another parser, the settings kept, an example a function of (seed, number)."""

import random
from collections import Counter
from statistics import median

import numpy as np
import pytest

from seqengine.data.listops import CLOSE, MAX, MED, MIN, SM, TOKENS, ListOps, evaluate
from seqengine.errors import InputError

FIRST = ("[MED 4 8 3 9 1 3 3 [SM 1 3 0 2 8 ] ]", 3)
"""Of seed 1, with 8 to 16 tokens."""
TASK = ListOps(min_length=50, max_length=200, max_depth=10, max_args=10, seed=3)


def parse(tokens):
    """(value, depth, most arguments, tokens left) of the expression at the start: by recursion, from text."""
    first, rest = tokens[0], tokens[1:]
    if first.isdigit():
        return int(first), 1, 0, rest
    values, depth, most = [], 1, 0
    while rest[0] != "]":
        value, below, args, rest = parse(rest)
        values.append(value)
        depth, most = max(depth, 1 + below), max(most, args)
    of = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(median(v)), "[SM": lambda v: sum(v) % 10}
    assert len(values) >= 2
    return of[first](values), depth, max(most, len(values)), rest[1:]


def text(ids):
    return [TOKENS[i] for i in ids]


def test_every_example_is_an_expression_with_its_value_and_within_the_settings():
    found = Counter()
    for number in range(300):
        ids, label = TASK.example(number)
        assert ids.dtype == np.uint8
        value, depth, args, rest = parse(text(ids))
        assert (value, rest) == (label, [])
        assert 50 <= len(ids) <= 200
        assert depth <= 10
        assert args <= 10
        found |= Counter(depth=depth, args=args)
    assert found["depth"] > 6  # the limits are reached, or nearly
    assert found["args"] == 10


@pytest.mark.parametrize(("depth", "args"), [(2, 10), (3, 4), (4, 2)])
def test_shallow_expressions_keep_to_their_depth_and_arguments(depth, args):
    task = ListOps(min_length=4, max_length=12, max_depth=depth, max_args=args, seed=1)
    seen = set()
    for number in range(100):
        ids, label = task.example(number)
        value, own, most, rest = parse(text(ids))
        assert (value, rest) == (label, [])
        assert own <= depth
        assert most <= args
        seen.add(own)
    assert max(seen) == min(depth, 4)


def test_operators_digits_and_arguments_are_as_likely_as_the_grammar_says():
    task = ListOps(min_length=4, max_length=2000, max_depth=4, max_args=5, seed=2)
    ids = np.concatenate([task.example(n)[0] for n in range(1500)])
    counts = np.bincount(ids, minlength=15)
    assert counts[CLOSE] == counts[MIN : SM + 1].sum()
    assert np.allclose(counts[MIN : SM + 1] / counts[MIN : SM + 1].sum(), 1 / 4, atol=0.02)
    assert np.allclose(counts[:10] / counts[:10].sum(), 1 / 10, atol=0.01)
    # Of an operator's arguments a quarter are operators: 3.5 children, of which 0.875 are, at depths 1 to 3.
    per_tree = [1, 0.875, 0.875**2]
    assert counts[CLOSE] / 1500 == pytest.approx(sum(per_tree) * 3.5 / 3.5, rel=0.08)


def test_classes_are_balanced_as_the_docs_say():
    labels = Counter(TASK.example(n)[1] for n in range(800))
    assert set(labels) == set(range(10))
    assert 0.12 < labels[0] / 800 < 0.20
    assert all(0.05 < labels[digit] / 800 < 0.13 for digit in range(1, 9))
    assert 0.12 < labels[9] / 800 < 0.20


def test_an_example_is_a_function_of_seed_and_number():
    again = ListOps(min_length=50, max_length=200, seed=3)
    for number in random.Random(0).sample(range(10**9), 5):
        assert np.array_equal(TASK.example(number)[0], again.example(number)[0])
    drawn = {ListOps(50, 200, seed=s).example(n)[0].tobytes() for s in (1, 2) for n in range(50)}
    assert len(drawn) == 100
    # Fixed for ever: another numpy, another machine.
    ids, label = ListOps(min_length=8, max_length=16, seed=1).example(0)
    assert (" ".join(text(ids)), label) == FIRST


@pytest.mark.parametrize(
    "ids",
    [[], [1, 2], [CLOSE], [MIN, CLOSE], [MIN, 1], [MAX, 1, 2, CLOSE, CLOSE], [SM, 1, 16], [MED, 1, 2, CLOSE, 3]],
)
def test_what_is_no_expression_has_no_value(ids):
    with pytest.raises(ValueError, match="evaluate: needs"):
        evaluate(ids)


def test_the_median_of_an_even_number_is_rounded_down_and_sums_are_modulo_ten():
    assert evaluate([MED, 1, 4, CLOSE]) == 2
    assert evaluate([MED, 9, 0, 3, 8, CLOSE]) == 5
    assert evaluate([SM, 9, 9, [MAX][0], 1, 2, CLOSE, CLOSE]) == 0
    assert evaluate([7]) == 7


def test_lengths_out_of_reach_are_refused():
    for settings in (
        {"min_length": 3},
        {"min_length": 20, "max_length": 10},
        {"min_length": 50, "max_length": 60, "max_depth": 2},
    ):
        with pytest.raises(ValueError, match="ListOps: needs"):
            ListOps(**{"min_length": 4, "max_length": 100, **settings})
    with pytest.raises(InputError, match=r"data\.listops: lengths 37 to 37 must be within reach of depth 3"):
        ListOps(min_length=37, max_length=37, max_depth=3, max_args=5).example(0)  # all operators: 1 in millions
