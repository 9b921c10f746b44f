"""The windows of a genome: its regions per split, and the bases of a window on either strand."""

from collections.abc import Sequence

import numpy as np

from seqengine.config.data import DataSection, SourceSection
from seqengine.data.bed import SPLITS, Interval, read_bed
from seqengine.data.packed import PackedGenome
from seqengine.data.tiles import Region, Tiles, WindowMode, check_slice, is_reverse
from seqengine.data.tokenizer import Ids, reverse_complement
from seqengine.errors import InputError

__all__ = ["Region", "Windows", "genome_windows", "is_reverse", "regions", "split_windows"]


def regions(
    genome: PackedGenome, section: SourceSection, bed: Sequence[Interval] | None = None
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
    return genome_windows(genome, section, section.seq_len, splits)


def genome_windows(
    genome: PackedGenome, section: SourceSection, seq_len: int, splits: Sequence[str] = ("train", "valid")
) -> dict[str, "Windows"]:
    """`split_windows` for windows of any length."""
    bed = None if section.bed is None else read_bed(section.bed, {r.name: r.length for r in genome.records})
    found = regions(genome, section, bed)
    windows = {
        split: Windows(genome, found[split], seq_len, rc_prob=section.rc_prob, window=section.window)
        for split in splits
    }
    problems = [_no_window(split, found[split], section, seq_len) for split in splits if not len(windows[split])]
    if problems:
        raise InputError(*problems)
    return windows


def _no_window(split: str, found: Sequence[Region], section: SourceSection, seq_len: int) -> str:
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
        f"data.seq_len: a window of {seq_len} tokens needs {seq_len + 1} bases of one region of split "
        f"{split!r}; its longest of {len(found)} regions has {longest}. Do one of: {'; '.join(remedies)}."
    )


class Windows(Tiles):
    """The windows of one split of a genome; see `Tiles` for which they are, and `seqengine.data.contract.Windows`.

    rc_prob, window: of training, the probability of the other strand, and whether windows are moved.
    """

    def __init__(
        self,
        genome: PackedGenome,
        regions: Sequence[Region],
        seq_len: int,
        *,
        rc_prob: float = 0.0,
        window: WindowMode = "tile",
    ) -> None:
        super().__init__(regions, seq_len)
        self.genome = genome
        self.rc_prob = rc_prob
        self.window: WindowMode = window

    def read(
        self, index: int, begin: int, end: int, *, seed: int = 0, epoch: int = 0, training: bool = False
    ) -> tuple[Ids, Ids, None]:
        """Inputs and targets of tokens [begin, end) of a window, and None: a record is one document.

        training: on a strand and at a shift that are functions of (seed, epoch, index); otherwise the forward strand of
        the tile. For the rest see `bases`.
        """
        if not training:
            return *self.bases(index, begin, end), None
        rc = is_reverse(index, seed=seed, epoch=epoch, rc_prob=self.rc_prob)
        return *self.bases(index, begin, end, rc=rc, seed=seed, epoch=epoch, window=self.window), None

    def bases(
        self, index: int, begin: int, end: int, *, rc: bool = False,
        seed: int = 0, epoch: int = 0, window: WindowMode = "tile",
    ) -> tuple[Ids, Ids]:  # fmt: skip
        """Inputs and targets of tokens [begin, end) of a window, from its reverse complement if `rc`.

        Shapes: two uint8 [end - begin]; targets[t] is the base behind inputs[t]. Both are empty for an empty slice.
        Traffic: reads end - begin + 1 bases of the file and no other: a rank reads its shard, not the window.
        Raises: ValueError unless 0 <= begin <= end <= T.
        """
        check_slice(begin, end, self.seq_len)
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
