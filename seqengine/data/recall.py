"""Two small tasks that tell sequence mixers apart: associative recall and induction heads.

    recall     k1 v1 k2 v2 .. km vm  ?  k   -> v, the value that stood behind k
    induction  a random text in which a mark stands once;  at the end the mark again   -> the token that stood behind it

Examples are made from (seed, number) alone: nothing is stored, and any rank makes any example.

References: Fu et al. 2022, H3, arXiv:2212.14052, section 3; Olsson et al. 2022, arXiv:2209.11895; Poli et al. 2023,
arXiv:2302.10866, section 4.1. Sizes: vocabulary 20 and 40 tokens for recall, 20 and 30 for induction heads.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Task = Literal["recall", "induction"]
IGNORE = -100


@dataclass(frozen=True)
class RecallTask:
    """Examples of one task.

    vocab_size: symbols, marks aside; of recall the first half are keys, the second half values. length: tokens of an example,
    the question included.
    """

    task: Task
    vocab_size: int = 20
    length: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in ("recall", "induction"):
            raise ValueError(f"RecallTask: task must be 'recall' or 'induction'; got {self.task!r}.")
        if self.vocab_size < 4 or self.vocab_size % 2 or self.length < 6 or self.length % 2:
            raise ValueError(
                "RecallTask: vocab_size must be even and at least 4, length even and at least 6; "
                f"got {self.vocab_size} and {self.length}."
            )

    @property
    def num_tokens(self) -> int:
        """Ids in use: the symbols, and the mark."""
        return self.vocab_size + 1

    @property
    def mark(self) -> int:
        """The id that begins the question."""
        return self.vocab_size

    def batch(self, first: int, rows: int, *, every: bool = False) -> tuple[Tensor, Tensor]:
        """Examples first .. first + rows - 1: ids and labels, int64 [rows, length]; only the answer has a label.

        every: of recall, each key that has stood before asks for its value too, which teaches ten times as fast.
        """
        make = self._recall if self.task == "recall" else self._induction
        made = [make(np.random.Generator(np.random.Philox(key=[self.seed, first + row]))) for row in range(rows)]
        ids = torch.from_numpy(np.stack([ids for ids, _ in made]))
        labels = torch.full_like(ids, IGNORE)
        labels[:, -1] = torch.tensor([answer for _, answer in made])
        if every and self.task == "recall":
            keys, values = ids[:, :-2:2], ids[:, 1:-2:2]
            has_stood = (keys[:, :, None] == keys[:, None, :]).tril(diagonal=-1).any(dim=2)
            labels[:, :-2:2] = torch.where(has_stood, values, IGNORE)
        return ids, labels

    def _recall(self, random: np.random.Generator) -> tuple[np.ndarray, int]:
        half = self.vocab_size // 2
        value_of = half + random.integers(half, size=half)
        keys = random.integers(half, size=self.length // 2 - 1)
        asked = int(random.choice(keys))
        pairs = np.stack([keys, value_of[keys]], axis=1).reshape(-1)
        return np.concatenate([pairs, [self.mark, asked]]), int(value_of[asked])

    def _induction(self, random: np.random.Generator) -> tuple[np.ndarray, int]:
        ids = random.integers(self.vocab_size, size=self.length)
        place = int(random.integers(self.length - 2))
        ids[place] = ids[-1] = self.mark
        return ids, int(ids[place + 1])


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of labels (those that are not ignored) that the likeliest token meets; logits [B, T, V], labels [B, T]."""
    asked = labels != IGNORE
    return float((logits.argmax(dim=-1)[asked] == labels[asked]).double().mean())
