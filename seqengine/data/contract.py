"""What every source of data is: windows by number, a hash of the content, and the ids that occur."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

IGNORE = -100
"""Label of a token that does not count."""
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]


class Batch(NamedTuple):
    """Some tokens of some windows."""

    ids: Tensor
    """int64 [rows, T_local]."""
    labels: Tensor
    """int64 [rows, T_local]: what follows each token, -100 where nothing is asked."""
    documents: tuple[int, ...] | None
    """Boundaries [0, .., T] of the documents in the whole window, ascending; None: the window is one sequence. With boundaries
    there is one row."""
    classes: Tensor | None = None
    """int64 [rows]: the class of every sequence; None: windows have none."""
    lengths: Tensor | None = None
    """int64 [rows]: tokens of every sequence before its padding, on every rank those of the whole window; None as classes."""


class Windows(Protocol):
    """The windows of T tokens of one split, numbered from 0."""

    seq_len: int

    def __len__(self) -> int: ...

    def read(
        self, index: int, begin: int, end: int, *, seed: int, epoch: int, training: bool
    ) -> tuple[IntArray, IntArray, tuple[int, ...] | None]:
        """Inputs and labels of tokens [begin, end) of a window, and the boundaries of documents in the whole of it.

        A function of its arguments alone; the slices of a window, put together, are the window. training: with what is
        random in training (strand, shift), drawn from (seed, epoch, index); otherwise without.

        Shapes: two arrays of integers [end - begin].
        Raises: IndexError for an index outside 0 .. len - 1, ValueError unless 0 <= begin <= end <= T.
        """
        ...


@runtime_checkable
class Labelled(Protocol):
    """Windows that are sequences with a class, padded on the right to seq_len."""

    num_classes: int

    def label(self, index: int) -> int:
        """The class of a window, 0 .. num_classes - 1. Raises: IndexError for an index outside 0 .. len - 1."""
        ...

    def length(self, index: int) -> int:
        """Tokens of a window before its padding, 1 .. seq_len. Raises: as label."""
        ...


class Order(Protocol):
    """In which order a run reads the windows of a split."""

    def window(self, sample: int) -> tuple[int, int]:
        """(epoch, window index) of sample number `sample` of a run: a function of it alone."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """Windows that say themselves in which order they are read; others are shuffled anew in every epoch."""

    def order(self, seed: int) -> Order:
        """The order of a run."""
        ...


class Source(Protocol):
    """Data that a run reads."""

    content_hash: str
    """sha256, in hex: equal for equal data, wherever they lie."""
    vocab_size: int
    """The smallest model.vocab_size that holds every id, mask_id included."""
    mask_id: int | None
    """Hides a token in training on masked tokens; None: the source has none."""
    replacements: range | None
    """Ids that may stand for another token there; None as mask_id."""
    num_classes: int | None
    """Classes of its sequences, and then its windows are `Labelled`; None: it has none."""

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> Mapping[str, Windows]:
        """The `Windows` of each split, of `seq_len` tokens. Raises: InputError for a split without a window."""
        ...
