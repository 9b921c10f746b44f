"""Sequences that have a class, as windows: one sequence a window, padded on the right.

Labels ask for the next token, so that a model without classes can be trained on the same sequences first (Amos et al. 2024,
Never Train from Scratch, arXiv:2310.02980). After the last token of a sequence that is shorter than its window, that is one
token of padding, which stands for the end; what follows is not asked for.
"""

from typing import NamedTuple, Protocol

import numpy as np

from seqengine.data.contract import IGNORE, IntArray
from seqengine.data.tiles import check_index, check_slice, is_reverse
from seqengine.data.tokenizer import reverse_complement


class Vocabulary(NamedTuple):
    """Ids of a labelled source: those that occur, the padding, and the mask."""

    vocab_size: int
    pad_id: int
    mask_id: int
    replacements: range


BYTES = Vocabulary(258, 256, 257, range(256))
"""Bytes or gray levels, the padding behind them, and the mask."""


class Sequences(Protocol):
    """Sequences and their classes, by number."""

    def __len__(self) -> int: ...

    def ids(self, index: int, most: int) -> IntArray:
        """A sequence of at least one token, cut to at most `most`."""
        ...

    def label(self, index: int) -> int:
        """Its class."""
        ...


class LabelledWindows:
    """Some sequences of one split; see `seqengine.data.contract.Windows` and `Labelled`.

    rows: which of the sequences they are. rc_prob: of DNA, the probability in training that a sequence, as it is cut, is read
    as its reverse complement.
    """

    def __init__(
        self,
        sequences: Sequences,
        rows: range,
        seq_len: int,
        *,
        num_classes: int,
        pad_id: int,
        rc_prob: float = 0.0,
    ) -> None:
        self.sequences, self.rows, self.seq_len = sequences, rows, seq_len
        self.num_classes, self.pad_id, self.rc_prob = num_classes, pad_id, rc_prob

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int:
        """The class of a window."""
        return self.sequences.label(self._row(index))

    def length(self, index: int) -> int:
        """Tokens of a window before its padding."""
        return len(self.sequences.ids(self._row(index), self.seq_len))

    def read(
        self, index: int, begin: int, end: int, *, seed: int = 0, epoch: int = 0, training: bool = False
    ) -> tuple[IntArray, IntArray, None]:
        """Inputs and labels of tokens [begin, end) of a window: int64 [end - begin] each."""
        row = self._row(index)
        check_slice(begin, end, self.seq_len)
        ids = self.sequences.ids(row, self.seq_len)
        if training and is_reverse(index, seed=seed, epoch=epoch, rc_prob=self.rc_prob):
            ids = reverse_complement(ids.astype(np.uint8))
        window = np.full(self.seq_len + 1, self.pad_id, dtype=np.int64)
        window[: len(ids)] = ids
        labels = window[begin + 1 : end + 1].copy()
        known = min(len(ids), self.seq_len - 1)  # what follows a full window may have been cut off
        labels[max(0, known - begin) :] = IGNORE
        return window[begin:end].copy(), labels, None

    def _row(self, index: int) -> int:
        check_index(index, len(self.rows))
        return self.rows[index]
