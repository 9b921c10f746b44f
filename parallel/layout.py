"""How a sequence and its channels are cut over ranks: integers only, no tensors, no processes."""

from collections.abc import Sequence
from itertools import accumulate


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` items over `parts`, sizes differing by at most one, larger ones first; parts may be empty."""
    if total < 0 or parts < 1:
        raise ValueError(f"split_sizes: total must be >= 0 and parts >= 1; got {total}, {parts}.")
    small, extra = divmod(total, parts)
    return [small + (i < extra) for i in range(parts)]


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Running sums with a leading zero: part i is [offsets[i], offsets[i + 1])."""
    return (0, *accumulate(sizes))


def overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The common part of two intervals, as (start, stop); empty ones have stop == start."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def halo_sources(bounds: Sequence[int], rank: int, left: int) -> list[tuple[int, int, int]]:
    """What `rank` needs of the `left` positions before its part: (owner, start, stop) in global positions, ascending.

    Several owners if their parts are short; none for positions before the sequence.
    """
    wanted = (bounds[rank] - left, bounds[rank])
    found = []
    for owner in range(rank):
        start, stop = overlap(wanted, (bounds[owner], bounds[owner + 1]))
        if stop > start:
            found.append((owner, start, stop))
    return found


def halo_targets(bounds: Sequence[int], rank: int, left: int) -> list[tuple[int, int, int]]:
    """What `rank` gives to the ranks after it: (receiver, start, stop); the mirror image of `halo_sources`."""
    return [
        (receiver, start, stop)
        for receiver in range(rank + 1, len(bounds) - 1)
        for owner, start, stop in halo_sources(bounds, receiver, left)
        if owner == rank
    ]
