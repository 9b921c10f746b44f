"""Shuffled windows as arithmetic: which window sample n is follows from (seed, n)."""

import numpy as np
import numpy.typing as npt


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of `count` windows in an epoch: int64 [count], a pure function of (seed, epoch).

    The windows sorted by raw words of Philox with key (seed, epoch), which numpy keeps the same over its versions.
    """
    source = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(source.random_raw(count), kind="stable")


class Shuffle:
    """Sample n is window permutation(seed, n // count)[n % count] of `count` windows. Threads may share it."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        # The epoch used last and its order, in one object: another thread sees both or neither.
        self._last: tuple[int, npt.NDArray[np.int64]] = -1, np.empty(0, dtype=np.int64)

    def window(self, sample: int) -> tuple[int, int]:
        """(epoch, window index) of a sample."""
        epoch, position = divmod(sample, self.count)
        last, order = self._last
        if epoch != last:
            order = permutation(self.seed, epoch, self.count)
            self._last = epoch, order
        return epoch, int(order[position])
