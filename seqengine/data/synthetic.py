"""A made-up genome whose best possible loss is known, bitwise the same on every machine.

Base t repeats base t - lag with probability `repeat`; otherwise it is drawn from an order-2 Markov chain whose sixteen rows
come from the seed and are moderately skewed. The first `lag` bases, which have nothing to repeat, come from the chain, and
before the first base the chain sees AA. So the probability of each base given its whole past is

    p(x_t = x) = repeat * [x = x_{t-lag}] + (1 - repeat) * M(x | x_{t-2}, x_{t-1})        (t >= lag; M alone before)

and the mean of -log2 p over some positions is their entropy floor: no model, whatever it has learnt, scores fewer bits per
base there in expectation (Gibbs' inequality). A model that misses the repeats is far above it, because a repeat is one
base at exactly `lag` steps: short contexts cannot see it.

References: Philox4x64-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Only the generator's raw
64-bit words are used: numpy guarantees those to stay the same, unlike what its distributions make of them.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seqengine.config.data import SyntheticSection
from seqengine.data.tokenizer import A, Ids, T

RECORD = "synthetic"
LINE_BASES = 70
_LETTERS = np.frombuffer(b"ACGT", dtype=np.uint8)
_NUM_CONTEXTS = 16
_BLOCK = 1 << 16  # bases drawn at a time; the genome does not depend on it


def chain(section: SyntheticSection) -> npt.NDArray[np.float64]:
    """The Markov rows M: float64 [16, 4]; row 4 * x_{t-2} + x_{t-1} holds the probabilities of A, C, G, T."""
    return _weights(np.random.Philox(section.seed))


def _weights(source: np.random.Philox) -> npt.NDArray[np.float64]:
    """The rows, from the generator's first 64 words: weights 1, 2, 4 or 8, so a row's entropy is about 1.7 bits."""
    words = np.asarray(source.random_raw(_NUM_CONTEXTS * 4))
    weights = np.left_shift(1, (words >> np.uint64(62)).astype(np.int64)).reshape(_NUM_CONTEXTS, 4)
    rows: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return rows


def generate(section: SyntheticSection) -> bytes:
    """The genome's letters, `section.length` of b"ACGT"; the same for the same section, everywhere.

    Two words of Philox(seed) per base: the first decides whether it repeats, the second what the chain would draw.
    """
    source = np.random.Philox(section.seed)
    # The last bound must be 1 whatever the sum rounds to, so only the three inner ones are compared.
    bounds = np.cumsum(_weights(source), axis=1)[:, :3]
    genome = bytearray(section.length)
    context = 0
    for first in range(0, section.length, _BLOCK):
        count = min(_BLOCK, section.length - first)
        words = np.asarray(source.random_raw(2 * count)).reshape(count, 2)
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        # What the chain would draw in each of its contexts: the loop below is then one look-up per base.
        chosen = uniform[:, 1, None]
        drawn = sum((chosen >= bound).view(np.uint8) for bound in bounds.T).tobytes()
        repeats = (uniform[:, 0] < section.repeat).tobytes()
        for i in range(count):
            t = first + i
            if repeats[i] and t >= section.lag:
                base = genome[t - section.lag]
            else:
                base = drawn[_NUM_CONTEXTS * i + context]
            genome[t] = base
            context = (context & 3) << 2 | base
    return _LETTERS[np.frombuffer(genome, dtype=np.uint8)].tobytes()


def write_fasta(path: Path, section: SyntheticSection) -> None:
    """Writes the genome as one record of 70-column lines; the file appears whole or not at all.

    Raises: OSError where the directory of `path` cannot be written.
    """
    genome = generate(section)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            what = f"length={section.length} lag={section.lag} repeat={section.repeat} seed={section.seed}"
            file.write(f">{RECORD} {what}\n".encode())
            file.writelines(genome[i : i + LINE_BASES] + b"\n" for i in range(0, len(genome), LINE_BASES))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def surprise(ids: Ids, section: SyntheticSection) -> npt.NDArray[np.float64]:
    """-log2 p(x_t | whole past) in bits of every base of the genome, by the generator's own rule.

    Shapes: ids uint8 [n], token ids from the genome's first base on (n at most its length) -> float64 [n].
    Raises: ValueError if a token is not A, C, G or T: then this is not the synthetic genome.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < A or ids.max() > T):
        raise ValueError("surprise: the synthetic genome holds only A, C, G and T; got other tokens")
    bases = ids.astype(np.int64) - A
    before = np.concatenate([np.zeros(2, dtype=np.int64), bases])  # the chain sees AA before the first base
    p = chain(section)[4 * before[:-2] + before[1:-1], bases]
    lag = section.lag
    if lag < len(bases):
        p[lag:] = section.repeat * (bases[lag:] == bases[:-lag]) + (1.0 - section.repeat) * p[lag:]
    if not p.all():
        raise ValueError("surprise: got a base that the generator cannot produce: these are not this section's bases")
    bits: npt.NDArray[np.float64] = -np.log2(p)
    return bits


def entropy_floor(ids: Ids, section: SyntheticSection, positions: npt.ArrayLike) -> float:
    """Mean surprise, in bits per base, over the bases at `positions` of the genome `ids` (see `surprise`).

    The positions are those of the predicted bases: a window that starts at s predicts s+1 .. s+T.
    """
    return float(surprise(ids, section)[np.asarray(positions, dtype=np.int64)].mean())
