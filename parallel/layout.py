"""How a sequence and its channels are cut over ranks: integers only, no tensors, no processes.

Tokens are global positions, in intervals (start, stop). Contiguous: P chunks, r on rank r. Zigzag: 2 P chunks, r and then
2 P - 1 - r on rank r, so that with equal chunks each rank has the same share of a causal triangle.

References: Brandon et al. 2023, arXiv:2311.09431 (balance of causal attention over ranks).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal

Layout = Literal["contiguous", "zigzag"]
Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` items over `parts`, sizes differing by at most one, larger ones first; parts may be empty."""
    if total < 0 or parts < 1:
        raise ValueError(f"split_sizes: total must be >= 0 and parts >= 1; got {total}, {parts}.")
    small, extra = divmod(total, parts)
    return [small + (i < extra) for i in range(parts)]


def split_size(total: int, parts: int, part: int) -> int:
    """One of `split_sizes`, without the others."""
    small, extra = divmod(total, parts)
    return small + (part < extra)


def split_span(total: int, parts: int, part: int) -> Interval:
    """Where one part of `split_sizes` lies, without the others."""
    small, extra = divmod(total, parts)
    start = part * small + min(part, extra)
    return start, start + split_size(total, parts, part)


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Running sums with a leading zero: part i is [offsets[i], offsets[i + 1])."""
    return (0, *accumulate(sizes))


def overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The common part of two intervals, as (start, stop); empty ones have stop == start."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def num_parts(cuts: Sequence[int], layout: Layout) -> int:
    """P. cuts: boundaries of the chunks, P + 1 or for zigzag 2 P + 1 of them."""
    return (len(cuts) - 1) // (1 if layout == "contiguous" else 2)


def part_of(cuts: Sequence[int], layout: Layout, rank: int) -> Intervals:
    """What one rank holds, in its order."""
    first = (cuts[rank], cuts[rank + 1])
    return (first,) if layout == "contiguous" else (first, (cuts[-2 - rank], cuts[-1 - rank]))


@lru_cache(maxsize=256)
def parts_of(cuts: tuple[int, ...], layout: Layout) -> tuple[Intervals, ...]:
    """What each rank holds."""
    return tuple(part_of(cuts, layout, rank) for rank in range(num_parts(cuts, layout)))


def zigzag_cuts(total: int, parts: int) -> tuple[int, ...]:
    """Boundaries of 2 P chunks whose sizes differ by at most one."""
    return offsets(split_sizes(total, 2 * parts))


def count(held: Intervals) -> int:
    """Tokens."""
    return sum(b - a for a, b in held)


def common_rows(source: Intervals, target: Intervals) -> list[tuple[Interval, Interval]]:
    """Tokens that are in both: (rows of what the source holds, rows of what the target holds), in the order of the target."""
    found, place = [], 0
    for a, b in target:
        row = 0
        for c, d in source:
            start, stop = overlap((a, b), (c, d))
            if stop > start:
                found.append(((row + start - c, row + stop - c), (place + start - a, place + stop - a)))
            row += d - c
        place += b - a
    return found


def _wanted(bounds: Sequence[int], rank: int, left: int, documents: Sequence[int] | None) -> Interval:
    first = bounds[rank]
    begin = 0 if documents is None else documents[bisect_right(documents, first) - 1]
    return max(first - left, begin), first


def halo_sources(
    bounds: Sequence[int], rank: int, left: int, documents: Sequence[int] | None = None
) -> list[tuple[int, int, int]]:
    """What `rank` needs of the `left` positions before its part: (owner, start, stop) in global positions, ascending.

    Several owners if their parts are short; none for positions before the sequence, and none before the document (boundaries
    of all, from 0 to the end) in which the part begins.
    """
    wanted = _wanted(bounds, rank, left, documents)
    found = []
    for owner in range(max(0, bisect_right(bounds, wanted[0]) - 1), rank):
        start, stop = overlap(wanted, (bounds[owner], bounds[owner + 1]))
        if stop > start:
            found.append((owner, start, stop))
    return found


def halo_targets(
    bounds: Sequence[int], rank: int, left: int, documents: Sequence[int] | None = None
) -> list[tuple[int, int, int]]:
    """What `rank` gives to the ranks after it: (receiver, start, stop); the mirror image of `halo_sources`."""
    own, found = (bounds[rank], bounds[rank + 1]), []
    last = min(len(bounds) - 1, bisect_left(bounds, own[1] + left))  # later ones begin too far away
    for receiver in range(rank + 1, last):
        start, stop = overlap(_wanted(bounds, receiver, left, documents), own)
        if stop > start:
            found.append((receiver, start, stop))
    return found
