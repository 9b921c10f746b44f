"""The tasks recall and induction as sources: a window is an example, made when it is read."""

from collections.abc import Sequence

from seqengine.config.data import SourceSection
from seqengine.data.cache import digest
from seqengine.data.contract import IntArray
from seqengine.data.recall import RecallTask, Task
from seqengine.data.tiles import check_index, check_slice, mix
from seqengine.errors import InputError

_VALID = 1 << 32  # what a word is drawn for: the seed of validation examples


class TaskWindows:
    """Examples of one split; see `seqengine.data.contract.Windows`.

    anew: every epoch of training has other examples, numbers epoch * count + index of the task.
    """

    def __init__(self, task: RecallTask, count: int, *, every: bool, anew: bool) -> None:
        self.task, self.count, self.every, self.anew = task, count, every, anew
        self.seq_len = task.length

    def __len__(self) -> int:
        return self.count

    def read(
        self, index: int, begin: int, end: int, *, seed: int = 0, epoch: int = 0, training: bool = False
    ) -> tuple[IntArray, IntArray, None]:
        """An example, whatever the run's seed: the run's seed only orders them."""
        check_index(index, self.count)
        check_slice(begin, end, self.seq_len)
        number = epoch * self.count + index if training and self.anew else index
        ids, labels = self.task.batch(number, 1, every=self.every)
        return ids[0, begin:end].numpy(), labels[0, begin:end].numpy(), None


class TaskSource:
    """Examples without end; see `seqengine.data.contract.Source`."""

    def __init__(self, task: Task, section: SourceSection) -> None:
        self._task: Task = task
        self._section = section.recall
        self.vocab_size = self._section.vocab + 1
        self.mask_id: int | None = None
        self.replacements: range | None = None
        self.num_classes: int | None = None
        identity = {"task": task, **self._section.model_dump()}
        self.content_hash = digest(identity)

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, TaskWindows]:
        """Examples of `seq_len` tokens. Raises: InputError for a length that the task does not have, and another split."""
        section = self._section
        found = {}
        for split in splits:
            if split not in ("train", "valid"):
                raise InputError(f"data.source: {self._task!r} has the splits train and valid; got {split!r}.")
            seed, count = section.seed, section.examples
            if split == "valid":
                seed, count = mix(_VALID, section.seed) >> 1, section.valid_examples
            try:
                task = RecallTask(self._task, vocab_size=section.vocab, length=seq_len, seed=seed)
            except ValueError as error:
                raise InputError(f"data.seq_len: {error} Set data.seq_len or data.recall.vocab.") from None
            found[split] = TaskWindows(task, count, every=section.every, anew=split == "train")
        return found
