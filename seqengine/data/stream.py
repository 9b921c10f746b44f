"""The order in which a run reads its windows, as arithmetic on one number: the samples read so far.

Sample n of a run, counted over all ranks, is window permutation(seed, n // W)[n % W] of the W training windows (of a mixture:
see `seqengine.data.mixture`), and what is random in it, such as a strand, is a function of (seed, epoch, window). So a run that
resumes, on as many ranks or on others, reads exactly what an uninterrupted run would: there is no sampler, no worker and no
buffer whose state could be lost.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from seqengine.data.contract import Batch, Labelled, Order, Ordered, Windows
from seqengine.data.order import Shuffle
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


class Stream:
    """The training windows of a run, by sample number. Holds no position: the caller counts the samples. Threads may share it.

    Raises: ValueError if there is no window.
    """

    def __init__(self, windows: Windows, *, seed: int) -> None:
        if not len(windows):
            raise ValueError("Stream: needs at least one window; got none")
        self.windows = windows
        self.seed = seed
        self._order: Order = windows.order(seed) if isinstance(windows, Ordered) else Shuffle(len(windows), seed)

    def window(self, sample: int) -> tuple[int, int]:
        """(epoch, window index) of a sample."""
        return self._order.window(sample)

    def batch(self, first_sample: int, rows: int, *, begin: int, end: int) -> Batch:
        """Samples first_sample .. first_sample + rows - 1, tokens [begin, end) of each, as training reads them.

        Shapes: ids and labels int64 [rows, end - begin] on the CPU; rows and tokens may be none; of sequences with classes
        also classes and lengths int64 [rows], of whole windows. Over ranks, the batches of a cut of the samples and of the
        tokens, put together, are the batch of one rank.
        Raises: ValueError for several rows of windows with documents.
        """
        chosen = [self.window(first_sample + row) for row in range(rows)]
        return _read(self.windows, chosen, begin, end, seed=self.seed, training=True)

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


def read_windows(windows: Windows, indices: Iterable[int], *, begin: int, end: int) -> Batch:
    """Whole tiles by their indices, as evaluation reads them: nothing in them is random.

    Shapes: ids and labels int64 [number of indices, end - begin] on the CPU; of sequences with classes also classes and
    lengths int64 [number of indices], of whole windows.
    Raises: ValueError for several rows of windows with documents.
    """
    return _read(windows, [(0, index) for index in indices], begin, end, seed=0, training=False)


def validation_indices(num_windows: int, wanted: int | Literal["all"]) -> list[int]:
    """`wanted` windows spread evenly over `num_windows`, in order and each once; all of them if there are no more."""
    if wanted == "all" or wanted >= num_windows:
        return list(range(num_windows))
    return [(2 * i + 1) * num_windows // (2 * wanted) for i in range(wanted)]


def _read(
    windows: Windows, chosen: Sequence[tuple[int, int]], begin: int, end: int, *, seed: int, training: bool
) -> Batch:
    """Windows by (epoch, index), one a row."""
    inputs = np.empty((len(chosen), end - begin), dtype=np.int64)
    labels = np.empty_like(inputs)
    documents = None
    for row, (epoch, index) in enumerate(chosen):
        inputs[row], labels[row], documents = windows.read(index, begin, end, seed=seed, epoch=epoch, training=training)
        if documents is not None and len(chosen) > 1:
            raise ValueError(f"Stream.batch: windows with documents must be read one at a time; got {len(chosen)} rows")
    batch = Batch(torch.from_numpy(inputs), torch.from_numpy(labels), documents)
    if not isinstance(windows, Labelled):
        return batch
    classes = torch.tensor([windows.label(index) for _, index in chosen], dtype=torch.int64)
    return batch._replace(
        classes=classes, lengths=torch.tensor([windows.length(index) for _, index in chosen], dtype=torch.int64)
    )
