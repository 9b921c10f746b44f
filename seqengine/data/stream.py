"""The order in which a run reads its windows, as arithmetic on one number: the samples read so far.

Sample n of a run, counted over all ranks, is window permutation(seed, n // W)[n % W] of the W training windows, on a strand
and at a shift that are functions of (seed, epoch, window). So a run that resumes, on as many ranks or on others, reads
exactly what an uninterrupted run would: there is no sampler, no worker and no buffer whose state could be lost.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from seqengine.data.windows import WindowMode, Windows, is_reverse
from seqengine.errors import InputError


@dataclass(frozen=True)
class StreamState:
    """All that a checkpoint keeps of the data: the run's seed, the epoch, and the samples read since step 0 on all ranks.

    `epoch` follows from `samples` and the number of windows; it is kept so that a changed data set is noticed.
    """

    seed: int
    epoch: int
    samples: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises: InputError unless `values` holds exactly seed, epoch and samples, whole numbers from 0."""
        names = ("seed", "epoch", "samples")
        if set(values) != set(names) or any(type(v) is not int or v < 0 for v in values.values()):
            raise InputError(
                f"data state: must hold the whole numbers {', '.join(names)} and nothing else; got {values}"
            )
        return cls(**values)


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of `count` windows in an epoch: int64 [count], a pure function of (seed, epoch).

    The windows sorted by raw words of Philox with key (seed, epoch), which numpy keeps the same over its versions.
    """
    source = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(source.random_raw(count), kind="stable")


class Stream:
    """The training windows of a run, by sample number. Holds no position: the caller counts the samples.

    Raises: ValueError if there is no window.
    """

    def __init__(self, windows: Windows, *, seed: int, rc_prob: float, window_mode: WindowMode) -> None:
        if not len(windows):
            raise ValueError("Stream: needs at least one window; got none")
        self.windows = windows
        self.seed = seed
        self.rc_prob = rc_prob
        self.window_mode: WindowMode = window_mode
        self._epoch = -1  # of the order below: the last one used
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def window(self, sample: int) -> tuple[int, int]:
        """(epoch, window index) of a sample."""
        epoch, position = divmod(sample, len(self.windows))
        if epoch != self._epoch:
            self._order = permutation(self.seed, epoch, len(self.windows))
            self._epoch = epoch
        return epoch, int(self._order[position])

    def batch(self, first_sample: int, rows: int, *, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of samples first_sample .. first_sample + rows - 1, tokens [begin, end) of each.

        Shapes: two int64 [rows, end - begin] on the CPU; rows and tokens may be none. Over ranks, the batches of a cut of
        the samples and of the tokens, put together, are the batch of one rank.
        """
        inputs, labels = _empty(rows, end - begin)
        for row in range(rows):
            epoch, index = self.window(first_sample + row)
            reverse = is_reverse(index, seed=self.seed, epoch=epoch, rc_prob=self.rc_prob)
            inputs[row], labels[row] = self.windows.read(
                index, begin, end, rc=reverse, seed=self.seed, epoch=epoch, window=self.window_mode
            )
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    def state(self, samples: int) -> StreamState:
        """What to save once `samples` samples have been read."""
        return StreamState(self.seed, samples // len(self.windows), samples)

    def resume(self, state: StreamState) -> int:
        """The number of the next sample after `state`.

        Raises: InputError if `state` is of another seed, or of another number of windows.
        """
        if state != self.state(state.samples):
            raise InputError(
                f"data state: the checkpoint must be of the same run.seed and data; it is of seed {state.seed} and epoch "
                f"{state.epoch} after {state.samples} samples, got seed {self.seed} and {len(self.windows)} windows. "
                "Restore the config, or start another run."
            )
        return state.samples


def read_windows(
    windows: Windows, indices: Iterable[int], *, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of whole tiles, as evaluation reads them: forward strand, no shift.

    Shapes: two int64 [number of indices, end - begin] on the CPU.
    """
    chosen = list(indices)
    inputs, labels = _empty(len(chosen), end - begin)
    for row, index in enumerate(chosen):
        inputs[row], labels[row] = windows.read(index, begin, end)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def validation_indices(num_windows: int, wanted: int | Literal["all"]) -> list[int]:
    """`wanted` windows spread evenly over `num_windows`, in order and each once; all of them if there are no more."""
    if wanted == "all" or wanted >= num_windows:
        return list(range(num_windows))
    return [(2 * i + 1) * num_windows // (2 * wanted) for i in range(wanted)]


def _empty(rows: int, tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.empty((rows, tokens), dtype=np.int64), np.empty((rows, tokens), dtype=np.int64)
