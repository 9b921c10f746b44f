"""Masked tokens, for models that see what follows: some tokens are hidden, and have to be told from the rest.

Which ones follows from (key of the window, position in the sequence) alone, so that any split over ranks hides the same.

References: Devlin et al. 2019, BERT, arXiv:1810.04805: of the chosen tokens 80 % become the mask, 10 % another, 10 % stay.
"""

import torch
from torch import Tensor

from seqengine.data.tokenizer import MASK, A
from seqengine.dropout import keep_mask

IGNORE = -100
HIDDEN, REPLACED = 0.8, 0.5
"""Of the chosen tokens; of those that are not hidden."""
_SITE = 1 << 20  # apart from the model's dropouts


def _happens(probability: float, keys: Tensor, positions: Tensor, site: int) -> Tensor:
    """Bool [B, T]."""
    shape = torch.Size((keys.shape[0], positions.shape[0], 1))
    return ~keep_mask(shape, probability, keys, positions, _SITE + site)[..., 0]


def chosen_tokens(keys: Tensor, positions: Tensor, rate: float) -> Tensor:
    """Bool [B, T]: the tokens to be told, each with probability `rate`. keys [B] and positions [T] int64."""
    return _happens(rate, keys, positions, 0)


def mask_tokens(
    ids: Tensor,
    keys: Tensor,
    positions: Tensor,
    rate: float,
    *,
    mask_id: int = MASK,
    replacements: range = range(A, A + 4),
) -> tuple[Tensor, Tensor]:
    """What the model reads, and the labels: the chosen tokens' own ids, -100 elsewhere.

    mask_id, replacements: what hides a token, and the ids that may stand for another one; those of a source
    (`seqengine.data.contract.Source`), or of DNA.

    Shapes: ids [B, T] int64; keys [B] int64, one per window; positions [T] int64, of these tokens in the whole
    sequence -> two int64 [B, T].
    Raises: ValueError if there is no replacement.
    """
    if not replacements:
        raise ValueError(f"mask_tokens: replacements must not be empty; got {replacements}")
    chosen = chosen_tokens(keys, positions, rate)
    hidden = chosen & _happens(HIDDEN, keys, positions, 1)
    replaced = chosen & ~hidden & _happens(REPLACED, keys, positions, 2)
    other = replacements.start + replacements.step * _below(len(replacements), keys, positions)
    inputs = torch.where(hidden, mask_id, torch.where(replaced, other, ids))
    return inputs, torch.where(chosen, ids, IGNORE)


def _below(count: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Int64 [B, T], each from 0 to count - 1: as likely, or within one part in 256 where count is no power of two."""
    bits = (count - 1).bit_length()
    bits += 8 if count & (count - 1) else 0
    word = torch.zeros(len(keys), len(positions), dtype=torch.int64, device=keys.device)
    for bit in range(bits):
        word = 2 * word + _happens(0.5, keys, positions, 3 + bit).long()
    return (word * count) >> bits
