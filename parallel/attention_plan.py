"""Who does what of an attention over ranks: integers only.

Tokens are global positions, in intervals (start, stop). A mask says which keys a query sees; `Mask.pieces` cuts the rectangle
of an interval of queries and an interval of keys into calls of the kernel, which puts the last query at the last key. With a
window w, queries p to the right of all keys see those with s > p - w: a triangle that is causal once both axes are turned
round. `Plan` says which queries and which heads a rank works on, and with whom it shares a ring.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from seqengine.parallel.exchange.ring import Route
from seqengine.parallel.layout import (
    Interval,
    Intervals,
    Layout,
    count,
    offsets,
    overlap,
    parts_of,
    split_sizes,
    zigzag_cuts,
)


class Piece(NamedTuple):
    """One call of the kernel: queries and keys, as positions or as rows of what is held, and how they see each other."""

    queries: Interval
    keys: Interval
    causal: bool = False
    window: int | None = None
    documents: tuple[int, ...] | None = None
    """Boundaries counted from the first query; then queries and keys are the same interval."""
    turned: bool = False
    """Both axes backwards."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. documents: boundaries from 0 to the number of tokens, without empty ones."""

    causal: bool
    window: int | None
    documents: tuple[int, ...]

    def document(self, position: int) -> Interval:
        i = bisect_right(self.documents, position) - 1
        return self.documents[i], self.documents[i + 1]

    def keys_of(self, queries: Interval) -> Interval:
        """All keys that some of the queries see: one interval, since its ends never fall as the query moves on."""
        first, last = queries[0], queries[1] - 1
        if last < first:
            return first, first
        low, high = self.document(first)[0], self.document(last)[1]
        if self.window is not None:
            low = max(low, first - self.window + 1)
            high = min(high, last + self.window)
        return low, (last + 1 if self.causal else high)

    def pieces(self, queries: Interval, keys: Interval) -> list[Piece]:
        """The calls for one rectangle. Where the intervals overlap, the keys must hold all the queries."""
        (a, b), (c, d) = queries, keys
        if a >= b or c >= d:
            return []
        is_one = len(self.documents) == 2
        if is_one and self.causal and self.window is not None and c <= a and d == b:
            return [Piece(queries, (max(c, self.keys_of(queries)[0]), d), True, self.window)]
        if is_one and not self.causal and self.window is None:
            return [Piece(queries, keys)]
        found = self._before(a, b, c, min(d, a))
        if c < b and a < d:
            assert c <= a < b <= d, "keys that overlap the queries hold all of them"
            cut = tuple(x - a for x in self.documents if a < x < b)
            found.append(Piece(queries, queries, self.causal, self.window, (0, *cut, b - a) if cut else None))
        return found if self.causal else found + self._after(a, b, max(c, b), d)

    def _before(self, a: int, b: int, c: int, d: int) -> list[Piece]:
        """Keys [c, d) that all lie before the queries [a, b): those that see all of them, and a triangle."""
        low, high = self.document(a)
        b, c = min(b, high), max(c, low)
        if c >= d:
            return []
        if self.window is None:
            return [Piece((a, b), (c, d))]
        full, end = min(b, c + self.window), min(b, d + self.window - 1)
        found = [Piece((a, full), (c, d))] if full > a else []
        start = max(a, c + self.window)
        if end > start:
            found.append(Piece((start, end), (start - self.window + 1, d), causal=True, turned=True))
        return found

    def _after(self, a: int, b: int, c: int, d: int) -> list[Piece]:
        """Keys that all lie after the queries."""
        low, high = self.document(b - 1)
        a, d = max(a, low), min(d, high)
        if c >= d:
            return []
        if self.window is None:
            return [Piece((a, b), (c, d))]
        full, start = max(a, d - self.window), max(a, c - self.window + 1)
        found = [Piece((full, b), (c, d))] if full < b else []
        end = min(b, d - self.window)
        if end > start:
            found.append(Piece((start, end), (c, end + self.window - 1), causal=True))
        return found


def head_ranges(ranks: int, heads: int, groups: int) -> tuple[Intervals, Intervals]:
    """(query heads, groups of keys) of each of `ranks`: whole groups, or a part of the heads of one group.

    With more ranks than groups each group has several ranks, which all hold its keys and cut its heads; with more than heads
    some ranks have none.
    """
    per_group = heads // groups
    if ranks <= groups:
        held = tuple(pairwise(offsets(split_sizes(groups, ranks))))
        return tuple((a * per_group, b * per_group) for a, b in held), held
    of_heads: list[Interval] = []
    of_groups: list[Interval] = []
    for group, sharers in enumerate(split_sizes(ranks, groups)):
        for a, b in pairwise(offsets(split_sizes(per_group, sharers))):
            of_heads.append((group * per_group + a, group * per_group + b))
            of_groups.append((group, group + (b > a)))
    return tuple(of_heads), tuple(of_groups)


def zigzag(tokens: int, ranks: int) -> tuple[Intervals, ...]:
    """2 P chunks, r and 2 P - 1 - r to rank r: each has the same share of a causal triangle."""
    return parts_of(zigzag_cuts(tokens, ranks), "zigzag")


@dataclass(frozen=True)
class Plan:
    """What each rank holds while it computes.

    parts: tokens by rank as the context cuts them; queries, keys: as they lie while computing; heads, groups: by rank.
    route: of this rank's ring, whose blocks are `keys` of its members.
    moved: queries have to be brought to that place, and results back. gathered: keys have to be.
    """

    parts: tuple[Intervals, ...]
    rank: int
    mask: Mask
    queries: tuple[Intervals, ...]
    keys: tuple[Intervals, ...]
    heads: Intervals
    groups: Intervals
    route: Route
    moved: bool
    gathered: bool

    def pieces(self, source: int) -> list[Piece]:
        """The calls for this rank's queries and the block of a member of its ring."""
        return _pieces(self.mask, self.queries[self.rank], self.keys[self.route.members[source]])


def _pieces(mask: Mask, queries: Intervals, keys: Intervals) -> list[Piece]:
    """Pieces by rows of what is held. Those without a mask are joined where one goes on from the other."""
    plain_causal = mask.causal and mask.window is None and len(mask.documents) == 2
    if plain_causal and queries == keys and len(queries) > 1:  # ascending, so that order by row is order by position
        rows = (0, count(queries))
        return [Piece(rows, rows, causal=True)]
    found: list[Piece] = []
    for piece in (p for q in queries for k in keys for p in mask.pieces(q, k)):
        piece = piece._replace(queries=_rows(queries, piece.queries), keys=_rows(keys, piece.keys))
        last = found[-1] if found else None
        joined = None if last is None else _join(last, piece)
        if joined is None:
            found.append(piece)
        else:
            found[-1] = joined
    return found


def _rows(held: Intervals, tokens: Interval) -> Interval:
    """Where the tokens, a part of one of the intervals, lie in what is held."""
    row = 0
    for a, b in held:
        if a <= tokens[0] and tokens[1] <= b:
            return row + tokens[0] - a, row + tokens[1] - a
        row += b - a
    raise AssertionError(f"tokens {tokens} lie in one of {held}")


def _join(a: Piece, b: Piece) -> Piece | None:
    """Both as one call, if neither has a mask and together they are a rectangle."""
    if a != Piece(a.queries, a.keys) or b != Piece(b.queries, b.keys):
        return None
    if a.queries == b.queries and a.keys[1] == b.keys[0]:
        return Piece(a.queries, (a.keys[0], b.keys[1]))
    if a.keys == b.keys and a.queries[1] == b.queries[0]:
        return Piece((a.queries[0], b.queries[1]), a.keys)
    return None


@lru_cache(maxsize=64)
def ring_spans(mask: Mask, held: tuple[Intervals, ...]) -> tuple[tuple[int, int], ...]:
    """The spans of a route whose members hold these queries and keys."""
    seen = [[mask.keys_of(q) for q in intervals] for intervals in held]

    def needs(receiver: int, source: int) -> bool:
        return any(a < b for wanted in seen[receiver] for k in held[source] for a, b in [overlap(wanted, k)])

    return Route.of(range(len(held)), [count(x) for x in held], needs).spans


@lru_cache(maxsize=256)
def ring_plan(
    cuts: tuple[int, ...],
    rank: int,
    mask: Mask,
    heads: int,
    groups: int,
    head_ranks: int,
    balance: bool,
    layout: Layout = "contiguous",
) -> Plan:
    """Rings across groups of `head_ranks` consecutive ranks that divide the heads. 1: a ring; all: Ulysses, without a ring.

    cuts: of the context, in its layout. The ranks of a group hold neighbouring chunks, so that a group of a zigzag context
    has two intervals, as a rank has, and nothing moves between groups but for balance.
    """
    parts = parts_of(cuts, layout)
    ranks = len(parts)
    size = ranks // head_ranks
    held = parts_of(cuts[::head_ranks], layout)
    moved = head_ranks > 1
    if balance and size > 1:
        balanced = zigzag(cuts[-1], size)
        moved, held = moved or held != balanced, balanced
    if size == 1:
        held = (((0, cuts[-1]),),)
    tokens = tuple(held[r // head_ranks] for r in range(ranks))
    of_heads, of_groups = head_ranges(head_ranks, heads, groups)
    members = range(rank % head_ranks, ranks, head_ranks)
    sizes = tuple(count(x) for x in held)
    route = Route(tuple(members), sizes, ring_spans(mask, held))
    return Plan(parts, rank, mask, tokens, tokens, of_heads * size, of_groups * size, route, moved, False)


def keys_seen(mask: Mask, queries: Intervals) -> Intervals:
    """All keys that some of the queries see, in intervals that do not touch."""
    found: list[Interval] = []
    for low, high in sorted(mask.keys_of(q) for q in queries):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        elif low < high or len(queries) == 1:
            found.append((low, high))
    return tuple(found)


@lru_cache(maxsize=256)
def gather_plan(
    cuts: tuple[int, ...], rank: int, mask: Mask, heads: int, groups: int, layout: Layout = "contiguous"
) -> Plan:
    """Queries stay; each rank gets the keys that its queries see."""
    queries = parts_of(cuts, layout)
    ranks = len(queries)
    keys = tuple(keys_seen(mask, held) for held in queries)
    route = Route.of([rank], [count(keys[rank])], None)
    return Plan(queries, rank, mask, queries, keys, ((0, heads),) * ranks, ((0, groups),) * ranks, route, False, True)
