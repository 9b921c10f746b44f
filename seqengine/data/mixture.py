"""Several sources by weight. Which source a sample comes from is arithmetic on its number, and so is its number there.

Samples come in periods of PERIOD slots. Each source owns a share of the slots, its weight to the nearest slot (by the largest
remainders), and the slots of a period are shuffled by (seed, period). The samples of a source, in the order of their slots, are
those that a run on it alone would read, with a seed of its own. So any stretch of whole periods has exactly the shares, and
nothing has to be remembered to go on from any sample.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from seqengine.data.cache import digest
from seqengine.data.contract import IntArray, Order, Ordered, Source, Windows
from seqengine.data.order import Shuffle, permutation
from seqengine.data.tiles import check_index, mix

PERIOD = 1000
"""Slots in which a mixture keeps its weights exactly; `data.mix.weight` is kept to one part of it."""
_SLOTS, _SOURCE = 1 << 33, 1 << 34  # what a word is drawn for: the seed of the slots, of a source


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots of each source, PERIOD in all and at least one each: the nearest to the weights, by the largest remainders.

    Raises: ValueError unless there are 1 to PERIOD weights, all above 0.
    """
    if not 0 < len(weights) <= PERIOD or min(weights) <= 0:
        raise ValueError(f"shares: needs 1 to {PERIOD} weights above 0; got {list(weights)}")
    exact = [weight * PERIOD / sum(weights) for weight in weights]
    slots = [max(1, int(share)) for share in exact]
    # The first of equal remainders comes first: sorted keeps the order.
    for i in sorted(range(len(exact)), key=lambda i: slots[i] - exact[i])[: max(0, PERIOD - sum(slots))]:
        slots[i] += 1
    while sum(slots) > PERIOD:  # sources below one slot took more than there was
        slots[slots.index(max(slots))] -= 1
    return tuple(slots)


class MixedOrder:
    """The order of a mixture's samples. Threads may share it."""

    def __init__(self, orders: Sequence[Order], slots: Sequence[int], first_index: Sequence[int], seed: int) -> None:
        self._orders, self._slots, self._first_index = tuple(orders), tuple(slots), tuple(first_index)
        self._seed = mix(_SLOTS, seed)
        self._owners = np.repeat(np.arange(len(slots)), slots)
        self._last: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] = -1, np.empty(0, int), np.empty(0, int)

    def place(self, sample: int) -> tuple[int, int]:
        """(source, number of the sample among those of the source)."""
        period, slot = divmod(sample, PERIOD)
        last, owners, earlier = self._last
        if period != last:
            owners = self._owners[permutation(self._seed, period, PERIOD)]
            earlier = np.empty(PERIOD, dtype=np.int64)  # samples of the same source in earlier slots of the period
            for source, count in enumerate(self._slots):
                earlier[owners == source] = np.arange(count)
            self._last = period, owners, earlier
        source = int(owners[slot])
        return source, period * self._slots[source] + int(earlier[slot])

    def window(self, sample: int) -> tuple[int, int]:
        """(epoch of its source, window index among those of all sources)."""
        source, number = self.place(sample)
        epoch, index = self._orders[source].window(number)
        return epoch, self._first_index[source] + index


class MixedWindows:
    """The windows of all sources, end to end; see `seqengine.data.contract.Windows` and `Ordered`."""

    def __init__(self, parts: Sequence[Windows], slots: Sequence[int]) -> None:
        self.parts, self.slots = tuple(parts), tuple(slots)
        self.seq_len = self.parts[0].seq_len
        # Window i is of source s where first_index[s] <= i < first_index[s + 1].
        self.first_index = tuple(accumulate((len(part) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self.first_index[-1]

    def source_of(self, index: int) -> int:
        """The source that a window is of. Raises: IndexError for an index outside 0 .. len - 1."""
        check_index(index, len(self))
        return bisect_right(self.first_index, index) - 1

    def read(
        self, index: int, begin: int, end: int, *, seed: int, epoch: int, training: bool
    ) -> tuple[IntArray, IntArray, tuple[int, ...] | None]:
        """What its source reads."""
        source = self.source_of(index)
        own = index - self.first_index[source]
        return self.parts[source].read(own, begin, end, seed=seed, epoch=epoch, training=training)

    def order(self, seed: int) -> MixedOrder:
        """The order of a run: a seed of its own for each source, so that equal sources are read differently."""
        orders: list[Order] = []
        for source, part in enumerate(self.parts):
            own = mix(_SOURCE, seed, source) >> 1
            orders.append(part.order(own) if isinstance(part, Ordered) else Shuffle(len(part), own))
        return MixedOrder(orders, self.slots, self.first_index, seed)


class MixtureSource:
    """Several sources, each with a weight; see `seqengine.data.contract.Source`.

    Masked tokens need the same mask in all sources. Raises: ValueError for a source whose sequences have classes.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        if any(source.num_classes is not None for source in self.sources):
            raise ValueError("MixtureSource: sources must not have classes; got one that has")
        self.slots = shares(weights)
        self.vocab_size = max(source.vocab_size for source in self.sources)
        masks = {(source.mask_id, source.replacements) for source in self.sources}
        self.mask_id, self.replacements = masks.pop() if len(masks) == 1 else (None, None)
        self.num_classes: int | None = None
        identity = [[source.content_hash, slots] for source, slots in zip(self.sources, self.slots, strict=True)]
        self.content_hash = digest(identity)

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, MixedWindows]:
        """The windows of each split, of all sources. Raises: InputError for a source without a window in a split."""
        found = [source.windows(seq_len, splits) for source in self.sources]
        return {split: MixedWindows([windows[split] for windows in found], self.slots) for split in splits}
