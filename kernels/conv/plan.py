"""Which way a long convolution takes in plain torch, and with which sizes: the measured dispatch table."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal, NamedTuple

BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Reals of one padded block: 2 MB in float32 on a CPU, for the second caches of two cores; on a GPU only a bound on memory."""
SPARSE_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""The same where a block's spectra go through a matrix product, which is faster for more of them."""
FEW_CHANNELS, LARGEST_BLOCK = 4, 1 << 21
"""So many channels are worked on at once even if they are more than a block, up to so many reals: calls cost time too."""
MOST_WORKERS, WORTH_WORKERS = 8, 1 << 24
"""Blocks are shared out among so many threads at most, and from so many padded reals on: torch's own spin for 3 ms before."""
IN_CACHE, LONGEST_TRANSFORM = 1 << 14, 1 << 20
"""Points of one transform on a CPU. Up to the first a point costs log n; beyond the second, partitions are faster."""
CACHE_COST = 0.15
"""What a point costs more with each doubling beyond IN_CACHE."""
MIXED_RADIX, MIXED_RADIX_COST = 1 << 16, 1.25
"""What a point costs more where there are so many and their number is no power of two."""
FILTER_SHARE = 0.25
"""Transforms of filters for each frame of inputs: between a batch of one and of many."""
FEW_FRAMES = 8
"""Frames may be of any size up to so many; more are of a power of two, small ones all at once."""
FRAME_RATIO = 4
"""Points of an overlap-save frame for each tap, at least."""
SMALLEST_FRAME, LONGEST_FRAME = 1 << 10, 1 << 15
TRITON_FLOAT64_TAPS = 1024
"""Triton's transforms work in float32; float64 goes through the Toeplitz product, whose work grows with the taps."""
SMALLEST_PIECE, MOST_PIECES = 1 << 13, 8
"""Partitions: pieces of at least so many values, and, where that allows, at most so many pieces."""


@lru_cache(maxsize=256)
def fft_size(length: int) -> int:
    """The smallest 2^a 3^b 5^c that is >= length, a multiple of 16, or small and even.

    Large prime factors cost several times more, and so does a size with one or two twos: 1.7 times a point of the next one.
    """
    twos = 2 if length <= 16 else 16
    best = 2
    while best < length:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(twos, 1 << (-(-length // three) - 1).bit_length())
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
    """Many small frames at once where the sequence holds more than a few; else the cheapest frames; else partitions.

    `keep` inputs stand before the T: their outputs are not wanted, so that they make no transform longer. On a GPU always one
    frame: launches cost more than points there. Measured on two cores, D = 256, T = 2^14 .. 2^22 (benchmarks/conv.py).
    """
    n = T + keep
    if device_type != "cpu":
        return Plan("frames", fft_size(T + L - 1), n, 1)
    frame = max(SMALLEST_FRAME, 1 << (FRAME_RATIO * L - 1).bit_length())
    if frame <= LONGEST_FRAME and pieces(n, frame - L + 1) > FEW_FRAMES:
        hop = frame - L + 1
        return Plan("many frames", frame, hop, pieces(n, hop))
    candidates = list(_frames(T, L, keep))
    if candidates:
        return min(candidates, key=_cost)
    piece = max(SMALLEST_PIECE, 1 << (pieces(L, MOST_PIECES) - 1).bit_length())
    return Plan("partitions", 2 * piece, piece, pieces(n, piece))


def _frames(T: int, L: int, keep: int) -> Iterator[Plan]:
    """The whole at once, a few frames of any size, and more of a power of two that is at least twice the taps."""
    n = T + keep
    whole = fft_size(T + L - 1)
    if whole <= LONGEST_TRANSFORM:
        yield Plan("frames", whole, n, 1)
    for count in range(2, FEW_FRAMES + 1):
        hop = pieces(n, count)
        size = fft_size(hop + L - 1)
        if SMALLEST_FRAME <= size <= LONGEST_TRANSFORM:
            yield Plan("frames", size, hop, pieces(n, hop))
    size = max(2 * LONGEST_FRAME, 1 << (2 * L - 1).bit_length())
    while size <= LONGEST_TRANSFORM and pieces(n, size - L + 1) > FEW_FRAMES:
        yield Plan("frames", size, size - L + 1, pieces(n, size - L + 1))
        size *= 2


def _cost(how: Plan) -> float:
    """Of the transforms of a plan, in arbitrary units."""
    a_point = log2(how.size) * (1.0 + CACHE_COST * max(0.0, log2(how.size / IN_CACHE)))
    if how.size > MIXED_RADIX and how.size & (how.size - 1):
        a_point *= MIXED_RADIX_COST
    return (how.count + FILTER_SHARE) * how.size * a_point


class Block(NamedTuple):
    """Channels that are worked on at once, and the filters that they use."""

    channels: slice
    filters: slice
    starts_filter: bool
    """False if an earlier block used the same filter."""

    @property
    def groups(self) -> int:
        """g: filters."""
        count: int = self.filters.stop - self.filters.start
        return count

    @property
    def group_size(self) -> int:
        """p: channels for each filter."""
        count: int = self.channels.stop - self.channels.start
        return count // self.groups


def num_workers(batch: int, channels: int, filters: int, how: Plan, device_type: str, threads: int) -> int:
    """Among how many threads blocks are shared out: each has four filters or more, and all their blocks are one largest one."""
    if device_type != "cpu" or batch * channels * how.size * how.count < WORTH_WORKERS:
        return 1
    return max(1, min(threads, MOST_WORKERS, filters // FEW_CHANNELS, LARGEST_BLOCK // (batch * how.points)))


def channels_at_once(batch: int, points: int, device_type: str, at_once: int = 1) -> int:
    """Whose padded values, `points` for each sample, are one of the blocks that are worked on at the same time."""
    own = max(1, batch * points)
    block = BLOCK_ELEMENTS.get(device_type, 1 << 24) // min(at_once, 2)
    return max(1, block // own, min(FEW_CHANNELS, LARGEST_BLOCK // (at_once * own)))


def blocks(batch: int, channels: int, filters: int, how: Plan, device_type: str, at_once: int = 1) -> Iterator[Block]:
    """Whole groups of channels that share a filter, or parts of one group; `at_once` of them at the same time."""
    per_filter = channels // filters
    width = channels_at_once(batch, how.points, device_type, at_once)
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
