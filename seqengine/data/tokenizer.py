"""HyenaDNA's character tokenizer: one base, one id, by table lookup.

Ids: [CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11. Every other
character, the ambiguity codes of IUPAC included, is [UNK]. The published tokenizer also reads lower-case (soft-masked)
bases as [UNK], which hides half of a mammalian genome from the model; here that is `soft_mask="unk"`, and "upper" is the
default.

References: Nguyen et al. 2023, HyenaDNA, arXiv:2306.15794; the ids are those of its `CharacterTokenizer`.
"""

from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import numpy.typing as npt

from seqengine.errors import InputError

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.uint8]
SoftMask = Literal["upper", "unk"]

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(12)
TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
VOCABULARY = len(TOKENS)
FIRST_BASE = A
"""Ids from here on are single letters: A, C, G, T, N."""


def _frozen(values: Ids) -> Ids:
    values.setflags(write=False)
    return values


def _table(letters: str) -> Ids:
    table = np.full(256, UNK, dtype=np.uint8)
    for letter in letters:
        table[ord(letter)] = TOKENS.index(letter.upper())
    return _frozen(table)


_UPPER = _table("ACGTNacgtn")
_UNK = _table("ACGTN")

COMPLEMENT: Ids = _frozen(np.array([CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, T, G, C, A, N], dtype=np.uint8))
"""COMPLEMENT[id] is the id of the opposite base (A-T, C-G); every other token is its own."""


def encode(sequence: bytes | str, soft_mask: SoftMask = "upper") -> Ids:
    """Token ids of a sequence, one per character.

    Shapes: `sequence` of n characters -> uint8 [n]. Characters outside ASCII become one [UNK] each.
    """
    data = sequence.encode("ascii", errors="replace") if isinstance(sequence, str) else sequence
    return (_UPPER if soft_mask == "upper" else _UNK)[np.frombuffer(data, dtype=np.uint8)]


def encode_exactly(sequence: str) -> Ids:
    """Token ids of a sequence of A, C, G, T and N in either case. Raises InputError naming the first other character."""
    for position, letter in enumerate(sequence):
        if letter.upper() not in TOKENS[FIRST_BASE:]:
            letters = ", ".join(TOKENS[FIRST_BASE:])
            raise InputError(f"the prompt must be of the letters {letters}; got {letter!r} at position {position}.")
    return encode(sequence)


def decode(ids: npt.ArrayLike) -> str:
    """The text of token ids [n]: bases as letters, special tokens by name ("[UNK]").

    Raises: ValueError for an id outside the vocabulary (the rows that pad a model's vocabulary to 16 have no text).
    """
    array = np.asarray(ids).reshape(-1)
    bad = array[(array < 0) | (array >= VOCABULARY)]
    if bad.size:
        raise ValueError(f"decode: every id must be in 0..{VOCABULARY - 1}; got {bad[0]}")
    return "".join(TOKENS[i] for i in array.tolist())


@overload
def reverse_complement(ids: Ids) -> Ids: ...
@overload
def reverse_complement(ids: "torch.Tensor") -> "torch.Tensor": ...
def reverse_complement(ids: "Ids | torch.Tensor") -> "Ids | torch.Tensor":
    """The opposite strand, read in its own direction: complemented and reversed along the last dimension.

    Shapes: [..., n] -> [..., n], same dtype (and device, for a tensor). Special tokens, [UNK] and N keep their id.
    """
    if isinstance(ids, np.ndarray):
        return COMPLEMENT[ids[..., ::-1]]
    return ids.new_tensor(COMPLEMENT.tolist())[ids.long()].flip(-1)
