"""The baseline that any trained model should beat: an order-k Markov table with add-one smoothing.

    p(x | the k bases before) = (count(before, x) + 1) / (count(before) + S)

counted over the training regions, forward strand. S = 4 symbols (A, C, G, T), or 5 if the genome holds anything else: N and
[UNK] then count as one fifth symbol, in contexts and as a target.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from seqengine.data.packed import PackedGenome
from seqengine.data.tokenizer import A, Ids, T
from seqengine.data.windows import Region, Windows

_CHUNK = 1 << 20
_OTHER = 4
_MOST_CELLS = 1 << 26


def markov_bits(train: Sequence[Region], windows: Windows, indices: Iterable[int], *, order: int = 5) -> float:
    """Bits per base of an order-`order` table, fitted on the regions `train` and scored on the targets of tiles `indices`.

    Exact to: every target of the windows counts once. A target with fewer than `order` bases before it in its window is
    scored with the bases that precede the window in the packed genome (of the record before, if the window begins its
    record); before the genome's first base stands A. Training counts use only bases inside one region.
    Memory: S ** (order + 1) counts of 8 bytes, and some 50 MB.
    Raises: ValueError if there is no window to score, or if order is negative or too large for the table.
    """
    genome = windows.genome
    symbols = 5 if _has_other(genome) else 4
    if order < 0 or symbols ** (order + 1) > _MOST_CELLS:
        raise ValueError(f"markov_bits: order must be in 0..{_largest_order(symbols)}; got {order}")
    counts = _fit(genome, train, order, symbols)
    bits = -np.log2((counts + 1.0) / (counts.sum(axis=1, keepdims=True) + symbols)).reshape(-1)
    total, scored = 0.0, 0
    for index in indices:
        start = windows.start(index)
        cells = _cells(_codes(genome, start + 1 - order, start + 1 + windows.seq_len), order, symbols)
        total += float(bits[cells].sum())
        scored += len(cells)
    if not scored:
        raise ValueError("markov_bits: needs at least one window to score; got none")
    return total / scored


def _fit(genome: PackedGenome, train: Sequence[Region], order: int, symbols: int) -> npt.NDArray[np.int64]:
    """Counts of each symbol behind each context: int64 [symbols ** order, symbols]."""
    counts = np.zeros(symbols ** (order + 1), dtype=np.int64)
    for region in train:
        for first in range(region.start + order, region.end, _CHUNK):
            end = min(first + _CHUNK, region.end)
            counts += np.bincount(_cells(_codes(genome, first - order, end), order, symbols), minlength=len(counts))
    return counts.reshape(-1, symbols)


def _cells(codes: npt.NDArray[np.int64], order: int, symbols: int) -> npt.NDArray[np.int64]:
    """The table cell (context, symbol) of each base from number `order` on."""
    count = max(len(codes) - order, 0)
    cells = np.zeros(count, dtype=np.int64)
    for back in range(order, -1, -1):
        cells = cells * symbols + codes[order - back : order - back + count]
    return cells


def _codes(genome: PackedGenome, start: int, end: int) -> npt.NDArray[np.int64]:
    """Symbols 0..4 of bases [start, end); A before the genome begins."""
    tokens = genome.tokens()[max(start, 0) : end]
    codes = np.where((tokens >= A) & (tokens <= T), tokens.astype(np.int64) - A, _OTHER)
    return np.concatenate([np.zeros(max(-start, 0), dtype=np.int64), codes])


def _has_other(genome: PackedGenome) -> bool:
    return any(bool(((chunk < A) | (chunk > T)).any()) for chunk in _chunks(genome.tokens()))


def _chunks(tokens: Ids) -> Iterator[Ids]:
    for start in range(0, len(tokens), _CHUNK):
        yield tokens[start : start + _CHUNK]


def _largest_order(symbols: int) -> int:
    order = 0
    while symbols ** (order + 2) <= _MOST_CELLS:
        order += 1
    return order
