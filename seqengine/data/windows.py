"""Which bases a window holds: integer arithmetic only, so that any rank computes any window without asking anyone.

A split (train, valid, test) is a list of regions of the packed genome. A window of T tokens is T + 1 bases, because the
targets are the inputs moved by one, and lies wholly within one region: at every length and every shift, no window of one
split holds a base of another.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from seqengine.config.data import DataSection
from seqengine.data.bed import SPLITS, Interval, read_bed
from seqengine.data.packed import PackedGenome
from seqengine.data.tokenizer import Ids, reverse_complement
from seqengine.errors import InputError

WindowMode = Literal["tile", "jitter"]
_WORD = (1 << 64) - 1


class Region(NamedTuple):
    """Bases [start, end) of the packed genome, all of one record and one split."""

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


def regions(
    genome: PackedGenome, section: DataSection, bed: Sequence[Interval] | None = None
) -> dict[str, list[Region]]:
    """The regions of train, valid and test, in genome order.

    Without a BED: the last `valid_fraction` of all bases, in file order and cut inside a record where it falls, is valid;
    the rest is train. With one: intervals of a split that overlap or touch are one region; with `section.bed_join` so are
    neighbours of one split on one record, gap included, if no interval of another split stands between them.
    """
    if bed is not None:
        return _regions_of_bed(genome, bed, section.bed_join)
    cut = genome.num_tokens - round(genome.num_tokens * section.valid_fraction)
    found: dict[str, list[Region]] = {split: [] for split in SPLITS}
    for _, offset, length in genome.records:
        middle = min(max(cut, offset), offset + length)
        if middle > offset:
            found["train"].append(Region(offset, middle))
        if offset + length > middle:
            found["valid"].append(Region(middle, offset + length))
    return found


def _regions_of_bed(genome: PackedGenome, bed: Sequence[Interval], join: bool) -> dict[str, list[Region]]:
    offsets = {record.name: record.offset for record in genome.records}
    found: dict[str, list[Region]] = {split: [] for split in SPLITS}
    previous: Interval | None = None
    for this in sorted(bed, key=lambda i: (offsets[i.record], i.start)):
        start, end = offsets[this.record] + this.start, offsets[this.record] + this.end
        mine = found[this.split]
        neighbours = previous is not None and (previous.record, previous.split) == (this.record, this.split)
        if neighbours and (join or start <= mine[-1].end):
            mine[-1] = Region(mine[-1].start, max(mine[-1].end, end))
        else:
            mine.append(Region(start, end))
        previous = this
    return found


def split_windows(
    genome: PackedGenome, section: DataSection, splits: Sequence[str] = ("train", "valid")
) -> dict[str, "Windows"]:
    """The windows of `splits`, as [data] asks for them; reads the BED file if there is one.

    Raises: InputError for a bad BED (see `read_bed`), and for each split that has no window.
    """
    bed = None if section.bed is None else read_bed(section.bed, {r.name: r.length for r in genome.records})
    found = regions(genome, section, bed)
    windows = {split: Windows(genome, found[split], section.seq_len) for split in splits}
    problems = [_no_window(split, found[split], section) for split in splits if not len(windows[split])]
    if problems:
        raise InputError(*problems)
    return windows


def _no_window(split: str, found: Sequence[Region], section: DataSection) -> str:
    longest = max((r.end - r.start for r in found), default=0)
    remedies = []
    if longest > 1:
        remedies.append(f"lower data.seq_len to at most {longest - 1}")
    if section.bed is not None:
        remedies.append(f"give {split} longer intervals in {section.bed}")
        if not section.bed_join:
            remedies.append("set data.bed_join = true")
    elif split == "test":
        remedies.append("set data.bed, without which there is no test split")
    else:
        change = "raise" if split == "valid" else "lower"
        remedies.append(f"{change} data.valid_fraction (now {section.valid_fraction:g})")
        remedies.append("give a longer genome")
    return (
        f"data.seq_len: a window of {section.seq_len} tokens needs {section.seq_len + 1} bases of one region of split "
        f"{split!r}; its longest of {len(found)} regions has {longest}. Do one of: {'; '.join(remedies)}."
    )


class Windows:
    """The windows of T tokens of one split, numbered from 0 in genome order.

    `len(windows)` is their number: (bases - 1) // T of each region, end to end, so that every base but a region's first
    is predicted once and what is left over at a region's end not at all. It may be 0.
    """

    def __init__(self, genome: PackedGenome, regions: Sequence[Region], seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"Windows: seq_len must be at least 1; got {seq_len}")
        self.genome = genome
        self.seq_len = seq_len
        self._regions = tuple(r for r in regions if r.end - r.start > seq_len)
        counts = ((r.end - r.start - 1) // seq_len for r in self._regions)
        # Window i is in region r where before[r] <= i < before[r + 1].
        self._before = tuple(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._before[-1]

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that hold a window, in genome order."""
        return self._regions

    def start(self, index: int, *, seed: int = 0, epoch: int = 0, window: WindowMode = "tile") -> int:
        """The first base of window `index`, as a position in the packed genome.

        tile: the same in every epoch. jitter: moved by up to half a window either way, evenly, and kept inside its
        region; a pure function of (seed, epoch, index).

        Raises: IndexError for an index outside 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Windows: index must be in 0..{len(self) - 1}; got {index}")
        at = bisect_right(self._before, index) - 1
        region = self._regions[at]
        start = region.start + (index - self._before[at]) * self.seq_len
        if window == "tile":
            return start
        half = self.seq_len // 2
        shift = ((mix(_SHIFT, seed, epoch, index) * (2 * half + 1)) >> 64) - half
        return min(max(start + shift, region.start), region.end - self.seq_len - 1)

    def read(
        self, index: int, begin: int, end: int, *, rc: bool = False,
        seed: int = 0, epoch: int = 0, window: WindowMode = "tile",
    ) -> tuple[Ids, Ids]:  # fmt: skip
        """Inputs and targets of tokens [begin, end) of a window, from its reverse complement if `rc`.

        Shapes: two uint8 [end - begin]; targets[t] is the base behind inputs[t]. Both are empty for an empty slice.
        Traffic: reads end - begin + 1 bases of the file and no other: a rank reads its shard, not the window.
        Raises: ValueError unless 0 <= begin <= end <= T.
        """
        if not 0 <= begin <= end <= self.seq_len:
            raise ValueError(f"Windows.read: needs 0 <= begin <= end <= {self.seq_len}; got {begin} and {end}")
        start = self.start(index, seed=seed, epoch=epoch, window=window)
        if begin == end:
            return np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)
        tokens = self.genome.tokens()
        if rc:  # base t of the other strand is the complement of base T - t
            last = start + self.seq_len
            bases = reverse_complement(tokens[last - end : last - begin + 1])
        else:
            bases = tokens[start + begin : start + end + 1]
        return np.array(bases[:-1]), np.array(bases[1:])
