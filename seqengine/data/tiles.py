"""Which tokens a window holds: integer arithmetic only, so that any rank computes any window without asking anyone.

A split (train, valid, test) is a list of regions of packed tokens. A window of T tokens is T + 1 tokens of them, because the
targets are the inputs moved by one, and lies wholly within one region: at every length and every shift, no window of one
split holds a token of another.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

WindowMode = Literal["tile", "jitter"]
_WORD = (1 << 64) - 1


class Region(NamedTuple):
    """Packed tokens [start, end) of one split; in a genome, of one record."""

    start: int
    end: int


def mix(*values: int) -> int:
    """A 64-bit word that depends on every bit of the values (taken modulo 2**64) and on their order; keeps no state.

    The finaliser of SplitMix64, chained. References: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", OOPSLA; constants of S. Vigna's public-domain splitmix64.c.
    """
    word = 0
    for value in values:
        word = ((word ^ (value & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return word


_SHIFT, _STRAND = 1, 2  # what a word is drawn for: the two draws of one window must not be the same


def is_reverse(index: int, *, seed: int, epoch: int, rc_prob: float) -> bool:
    """The strand coin of a window in an epoch: True with probability `rc_prob`."""
    return (mix(_STRAND, seed, epoch, index) >> 11) * 2.0**-53 < rc_prob


class Tiles:
    """The windows of T tokens of some regions, numbered from 0 in their order.

    `len(tiles)` is their number: (tokens - 1) // T of each region, end to end, so that every token but a region's first
    is predicted once and what is left over at a region's end not at all. It may be 0.
    """

    def __init__(self, regions: Sequence[Region], seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"Windows: seq_len must be at least 1; got {seq_len}")
        self.seq_len = seq_len
        self._regions = tuple(r for r in regions if r.end - r.start > seq_len)
        counts = ((r.end - r.start - 1) // seq_len for r in self._regions)
        # Window i is in region r where before[r] <= i < before[r + 1].
        self._before = tuple(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._before[-1]

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that hold a window, in their order."""
        return self._regions

    def start(self, index: int, *, seed: int = 0, epoch: int = 0, window: WindowMode = "tile") -> int:
        """The first token of window `index`, as a position in the packed file.

        tile: the same in every epoch. jitter: moved by up to half a window either way, evenly, and kept inside its
        region; a pure function of (seed, epoch, index).

        Raises: IndexError for an index outside 0 .. len - 1.
        """
        check_index(index, len(self))
        at = bisect_right(self._before, index) - 1
        region = self._regions[at]
        start = region.start + (index - self._before[at]) * self.seq_len
        if window == "tile":
            return start
        half = self.seq_len // 2
        shift = ((mix(_SHIFT, seed, epoch, index) * (2 * half + 1)) >> 64) - half
        return min(max(start + shift, region.start), region.end - self.seq_len - 1)


def check_index(index: int, count: int) -> None:
    """Raises: IndexError for an index outside 0 .. count - 1."""
    if not 0 <= index < count:
        raise IndexError(f"Windows: index must be in 0..{count - 1}; got {index}")


def check_slice(begin: int, end: int, seq_len: int) -> None:
    """Raises: ValueError unless 0 <= begin <= end <= seq_len."""
    if not 0 <= begin <= end <= seq_len:
        raise ValueError(f"Windows.read: needs 0 <= begin <= end <= {seq_len}; got {begin} and {end}")
