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


def mask_tokens(ids: Tensor, keys: Tensor, positions: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """What the model reads, and the labels: the chosen tokens' own ids, -100 elsewhere.

    Shapes: ids [B, T] int64 of bases; keys [B] int64, one per window; positions [T] int64, of these tokens in the whole
    sequence -> two int64 [B, T].
    """
    chosen = chosen_tokens(keys, positions, rate)
    hidden = chosen & _happens(HIDDEN, keys, positions, 1)
    replaced = chosen & ~hidden & _happens(REPLACED, keys, positions, 2)
    base = A + 2 * _happens(0.5, keys, positions, 3).long() + _happens(0.5, keys, positions, 4).long()
    inputs = torch.where(hidden, MASK, torch.where(replaced, base, ids))
    return inputs, torch.where(chosen, ids, IGNORE)
