"""Which way a long convolution takes in plain torch, and with which sizes: the measured dispatch table."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal, NamedTuple

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 28}
"""Reals of one padded block: 1 MB in float32 on a CPU, for its second cache; on a GPU only a bound on memory."""
SPARSE_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""The same where torch makes a plan of the transform for each block, which larger ones share."""
FEW_CHANNELS, LARGEST_BLOCK = 4, 1 << 21
"""So many channels are worked on at once even if they are more than a block, up to so many reals: calls cost time too."""
IN_CACHE, LONGEST_TRANSFORM = 1 << 14, 1 << 18
"""Points of one transform on a CPU. Up to the first a point costs log n; beyond the second, partitions are about as fast."""
CACHE_COST = 0.5
"""What a point costs more with each doubling beyond IN_CACHE."""
FEW_FRAMES = 8
"""So many frames are gone through one by one; more at once."""
FRAME_RATIO = 4
"""Points of an overlap-save frame for each tap, at least."""
SMALLEST_FRAME, LONGEST_FRAME = 1 << 10, 1 << 15
TRITON_FLOAT64_TAPS = 1024
"""Triton's transforms work in float32; float64 goes through the Toeplitz product, whose work grows with the taps."""
SMALLEST_PIECE, MOST_PIECES = 1 << 13, 8
"""Partitions: pieces of at least so many values, and, where that allows, at most so many pieces."""


@lru_cache(maxsize=256)
def fft_size(length: int) -> int:
    """The smallest even 2^a 3^b 5^c that is >= length: sizes with large prime factors cost several times more."""
    best = 2
    while best < length:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(2, 1 << max(1, (-(-length // three) - 1).bit_length()))
            if three * two >= length:
                best = min(best, three * two)
            three *= 3
        five *= 5
    return best


def pieces(length: int, piece: int) -> int:
    """Pieces of `piece` that cover `length`."""
    return -(-length // piece)


@dataclass(frozen=True)
class Plan:
    """How T outputs of an L-tap filter are made: `count` frames of `size` points with `hop` outputs each, or pieces."""

    method: Literal["frames", "many frames", "partitions"]
    size: int
    hop: int
    count: int

    @property
    def points(self) -> int:
        """Of one row, transformed at once."""
        return self.size if self.method == "frames" else self.size * self.count


@lru_cache(maxsize=1024)
def plan(T: int, L: int, device_type: str, keep: int = 0) -> Plan:
    """Many frames where the sequence holds more than a few; else few frames, the cheapest; else partitions.

    `keep` inputs stand before the T: their outputs are not wanted, so that they make no transform longer. The cost of a
    transform of n points is n log n, and more where it leaves the cache. On a GPU always one frame: launches cost more than
    points there. Measured on two cores, D = 256, T = 2^14 .. 2^17 (benchmarks/conv.py).
    """
    n = T + keep
    whole = fft_size(T + L - 1)
    if device_type != "cpu":
        return Plan("frames", whole, n, 1)
    frame = max(SMALLEST_FRAME, 1 << (FRAME_RATIO * L - 1).bit_length())
    if frame <= LONGEST_FRAME and pieces(n, frame - L + 1) > FEW_FRAMES:
        hop = frame - L + 1
        return Plan("many frames", frame, hop, pieces(n, hop))
    candidates = [Plan("frames", whole, n, 1)] if whole <= LONGEST_TRANSFORM else []
    for count in range(2, FEW_FRAMES + 1):
        hop = pieces(n, count)
        size = fft_size(hop + L - 1)
        if SMALLEST_FRAME <= size <= LONGEST_TRANSFORM:
            candidates.append(Plan("frames", size, hop, pieces(n, hop)))
    if candidates:
        return min(candidates, key=_cost)
    piece = max(SMALLEST_PIECE, 1 << (pieces(L, MOST_PIECES) - 1).bit_length())
    return Plan("partitions", 2 * piece, piece, pieces(n, piece))


def _cost(how: Plan) -> float:
    """Of the transforms of a plan, in arbitrary units."""
    leaves_cache = 1.0 + CACHE_COST * max(0.0, log2(how.size / IN_CACHE))
    return how.count * how.size * log2(how.size) * leaves_cache


class Block(NamedTuple):
    """Channels that are worked on at once, and the filters that they use."""

    channels: slice
    filters: slice
    starts_filter: bool
    """False if an earlier block used the same filter."""


def channels_at_once(batch: int, points: int, device_type: str) -> int:
    """Whose padded values, `points` for each sample, are a block."""
    own = max(1, batch * points)
    return max(1, BLOCK_ELEMENTS.get(device_type, 1 << 24) // own, min(FEW_CHANNELS, LARGEST_BLOCK // own))


def blocks(batch: int, channels: int, filters: int, how: Plan, device_type: str) -> Iterator[Block]:
    """Whole groups of channels that share a filter, or parts of one group."""
    per_filter = channels // filters
    width = channels_at_once(batch, how.points, device_type)
    if width >= per_filter:
        step = width // per_filter
        for first in range(0, filters, step):
            last = min(first + step, filters)
            yield Block(slice(first * per_filter, last * per_filter), slice(first, last), True)
        return
    for i in range(filters):
        for first in range(0, per_filter, width):
            last = min(first + width, per_filter)
            yield Block(slice(i * per_filter + first, i * per_filter + last), slice(i, i + 1), first == 0)
