"""The tasks listops and pathfinder as sources: a sequence is made when it is read, and is the same in every epoch and run."""

from collections.abc import Callable, Sequence
from typing import Any

from seqengine.config.data import CLASSES, SourceSection
from seqengine.data import listops
from seqengine.data.cache import digest
from seqengine.data.contract import IntArray
from seqengine.data.labelled import BYTES, LabelledWindows, Vocabulary
from seqengine.data.listops import ListOps
from seqengine.data.pathfinder import Pathfinder
from seqengine.data.tiles import mix
from seqengine.errors import InputError

FORMAT = 1
"""Changes with what is made from one seed and number."""
KEPT_BYTES = 256 << 20
"""Memory of a process for examples that were made, by split: their class and length are asked for beside their tokens, and the
next epoch has the same. 96,000 expressions of ListOps or 160,000 drawings of 32 x 32 fit in."""
LISTOPS_IDS = Vocabulary(listops.MASK + 1, listops.PAD, listops.MASK, range(listops.PAD))
_SPLITS = {"train": 0, "valid": 1 << 36, "test": 1 << 37}  # what a word is drawn for: the seed of a split


class Examples:
    """`seqengine.data.labelled.Sequences` that are made when asked for. Threads may share it."""

    def __init__(self, make: Callable[[int], tuple[IntArray, int]], count: int, longest: int) -> None:
        self._make, self._count = make, count
        self._most_kept = max(256, KEPT_BYTES // longest)
        self._kept: dict[int, tuple[IntArray, int]] = {}

    def __len__(self) -> int:
        return self._count

    def ids(self, index: int, most: int) -> IntArray:
        """A whole example: the source refuses lengths that would cut one."""
        return self._example(index)[0][:most]

    def label(self, index: int) -> int:
        """The class of an example."""
        return self._example(index)[1]

    def _example(self, index: int) -> tuple[IntArray, int]:
        kept = self._kept
        found = kept.get(index)
        if found is None:
            if len(kept) >= self._most_kept:
                kept = self._kept = {}
            found = kept[index] = self._make(index)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


class GeneratedSource:
    """Examples by number; see `seqengine.data.contract.Source`. Their content_hash is of the settings that make them.

    Raises: InputError for settings that no example can have.
    """

    def __init__(self, section: SourceSection) -> None:
        self._section = section
        self.task = section.source
        settings = section.listops if self.task == "listops" else section.pathfinder
        ids = LISTOPS_IDS if self.task == "listops" else BYTES
        self.vocab_size, self.pad_id = ids.vocab_size, ids.pad_id
        self.mask_id: int | None = ids.mask_id
        self.replacements: range | None = ids.replacements
        self.num_classes: int | None = CLASSES[self.task]
        self.content_hash = digest({"format": FORMAT, "task": self.task, **settings.model_dump()})
        self._maker("train")

    @property
    def longest(self) -> int:
        """Tokens of the longest example that there may be."""
        section = self._section
        return section.listops.max_length if self.task == "listops" else section.pathfinder.size**2

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, LabelledWindows]:
        """Examples of each split; validation and test have as many. Raises: InputError for windows that would cut one."""
        if seq_len < self.longest:
            raise InputError(
                f"data.seq_len = {seq_len} must be at least {self.longest}, the longest example of {self.task!r}: one that is "
                f"cut has another class. Set data.seq_len, or change data.{self.task}."
            )
        settings = self._section.listops if self.task == "listops" else self._section.pathfinder
        found = {}
        for split in splits:
            if split not in _SPLITS:
                raise InputError(
                    f"data.source: {self.task!r} has the splits {', '.join(_SPLITS)}; got {split!r}. Name one."
                )
            count = settings.examples if split == "train" else settings.valid_examples
            assert self.num_classes is not None
            examples = Examples(self._maker(split), count, self.longest)
            found[split] = LabelledWindows(
                examples, range(count), seq_len, num_classes=self.num_classes, pad_id=self.pad_id
            )
        return found

    def _maker(self, split: str) -> Callable[[int], tuple[IntArray, int]]:
        """Example by number."""
        try:
            if self.task == "listops":
                of = self._section.listops
                seed = _seed(of.seed, split)
                return ListOps(of.min_length, of.max_length, of.max_depth, of.max_args, seed).example
            drawing = self._section.pathfinder
            return Pathfinder(drawing.size, drawing.distractors, _seed(drawing.seed, split)).example
        except ValueError as error:
            raise InputError(f"data.{self.task}: {error}. Change its keys.") from None


def _seed(seed: int, split: str) -> int:
    return mix(_SPLITS[split], seed) >> 1
