"""ListOps: nested operations on lists of digits, whose value is one of ten classes.

    [MAX 2 9 [MIN 4 7 ] 0 ]   -> 9

An expression is a digit or an operator with 2 to max_args expressions and a closing bracket. Operators: MIN, MAX, MED (the
median, of an even number of values the mean of the middle two, rounded down) and SM (the sum modulo 10). Below the root a part
is an operator with probability 1/4, and at depth max_depth (the root's is 1) always a digit. Trees are drawn until one has
min_length to max_length tokens; an operator with its bracket is one token, as a closing bracket is. The digits of an operator's
arguments make some values likelier than others: 0 and 9 are some 17 % each, the other digits 7 to 10 %.

A tree is drawn level by level, a raw word of Philox a part, so that an example is a function of (seed, number) alone, whatever
the version of numpy.

References: Nangia and Bowman 2018, ListOps, arXiv:1804.06028; Tay et al. 2021, Long Range Arena, arXiv:2011.04006: lengths 500
to 2,000, depth and arguments up to 10, 96,000 examples for training and 2,000 each for validation and test.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from seqengine.errors import InputError

TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Text of the ids 0 to 14; a digit is its own id."""
MIN, MAX, MED, SM, CLOSE, PAD, MASK = range(10, 17)
MOST_TREES = 20_000
"""Trees drawn for one example before its lengths are called out of reach."""

Words: TypeAlias = npt.NDArray[np.uint64]
Counts: TypeAlias = npt.NDArray[np.int64]
_LOW = np.uint64(0xFFFFFFFF)


class Tree(NamedTuple):
    """The parts of an expression, level by level: those that belong to one operator stand together."""

    words: Words
    """[parts], of which operators and digits are made."""
    args: Counts
    """[parts], 0 of digits."""
    bounds: list[int]
    """Of the levels, from 0 to the number of parts."""


@dataclass(frozen=True)
class ListOps:
    """Examples of the task; see the module. Threads may share it."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        longest = longest_expression(self.max_depth, self.max_args, self.max_length)
        if not 4 <= self.min_length <= self.max_length or self.max_args < 2 or longest < self.min_length:
            raise ValueError(
                "ListOps: needs 4 <= min_length <= max_length, max_args of at least 2, and a depth that reaches min_length; "
                f"got lengths {self.min_length} to {self.max_length}, max_args {self.max_args}, max_depth {self.max_depth}"
            )

    def example(self, number: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Ids uint8 [length] and the class of an example. Raises: InputError if no tree of such a length is found."""
        tree = self._tree(np.random.Philox(key=np.array([self.seed, number], dtype=np.uint64)))
        ids = _in_order(tree)
        return ids, evaluate(ids.tolist())

    def _tree(self, random: np.random.Philox) -> Tree:
        """The first of many that has a length in range."""
        size = 2 * self.max_length + 64
        start = size
        for _ in range(MOST_TREES):
            if start + self.max_length > size:
                words = random.random_raw(size)
                args = np.where(words >> np.uint64(62) == 0, 2 + _below(words, self.max_args - 1), 0)
                # What is asked of level after level is sums over them.
                num_parts = np.concatenate([[0], np.cumsum(args)])
                num_operators = np.concatenate([[0], np.cumsum(args > 0)])
                start = 0
            root = 2 + int(_below(words[start : start + 1], self.max_args - 1)[0])  # an operator in any case
            bounds, is_whole = [0, 1, 1 + root], self.max_depth == 2
            operators = 1
            while not is_whole and bounds[-1] + operators <= self.max_length:
                begin, end = start + bounds[-2], start + bounds[-1]
                operators += int(num_operators[end] - num_operators[begin])
                children = int(num_parts[end] - num_parts[begin])
                if children:
                    bounds.append(bounds[-1] + children)
                is_whole = not children or len(bounds) > self.max_depth
            parts = slice(start, start + bounds[-1])
            start += bounds[-1]
            if is_whole and self.min_length <= bounds[-1] + operators <= self.max_length:
                found = args[parts].copy()
                found[0] = root
                if len(bounds) > self.max_depth:
                    found[bounds[-2] :] = 0  # the last level that there may be
                return Tree(words[parts], found, bounds)
        raise InputError(
            f"data.listops: lengths {self.min_length} to {self.max_length} must be within reach of depth {self.max_depth} and "
            f"{self.max_args} arguments; {MOST_TREES} trees had none. Widen min_length and max_length, or change the others."
        )


def _below(words: Words, count: int) -> Counts:
    """Evenly from 0 to count - 1, from the low half of each word."""
    return ((words & _LOW) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def _in_order(tree: Tree) -> npt.NDArray[np.uint8]:
    """The tokens of a tree as they are read: uint8 [length]."""
    words, args, bounds = tree
    is_operator = args > 0
    sizes = 1 + is_operator  # tokens of each part
    levels = [slice(a, b) for a, b in pairwise(bounds)]
    parents = [np.flatnonzero(is_operator[level]) + level.start for level in levels[:-1]]
    for own, below in reversed([*zip(parents, levels[1:], strict=True)]):
        ends = np.cumsum(args[own])
        sizes[own] += np.add.reduceat(sizes[below], ends - args[own])
    begins = np.zeros(len(args), dtype=np.int64)
    for own, below in zip(parents, levels[1:], strict=True):
        # A part begins where its operator does, and behind that and the parts before it.
        before = np.cumsum(sizes[below]) - sizes[below]
        first = before[np.cumsum(args[own]) - args[own]]
        begins[below] = before + np.repeat(begins[own] + 1 - first, args[own])
    ids = np.empty(int(sizes[0]), dtype=np.uint8)
    ids[begins] = np.where(is_operator, MIN + (words >> np.uint64(60)).astype(np.int64) % 4, _below(words, 10))
    ids[begins[is_operator] + sizes[is_operator] - 1] = CLOSE
    return ids


def evaluate(ids: list[int]) -> int:
    """The value of an expression, 0 to 9. Raises: ValueError if it is none."""
    outer: list[tuple[int, list[int]]] = []
    operator, values = -1, list[int]()
    for token in ids:
        if token < 10:
            values.append(token)
        elif token < CLOSE:
            outer.append((operator, values))
            operator, values = token, []
        else:
            if not outer or not values or token != CLOSE:
                raise ValueError(f"evaluate: needs an expression; got a bracket or an id that does not fit: {token}")
            value = _apply(operator, values)
            operator, values = outer.pop()
            values.append(value)
    if outer or len(values) != 1:
        raise ValueError(f"evaluate: needs one whole expression; got {len(outer)} open brackets, {len(values)} values")
    return values[0]


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    values.sort()
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2


def longest_expression(max_depth: int, max_args: int, enough: int) -> int:
    """Tokens of the longest expression, or some number above `enough` if it is longer."""
    length = 1
    for _ in range(1, max_depth):
        length = 2 + max_args * length
        if length > enough:
            break
    return length
