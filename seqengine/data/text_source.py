"""Packed documents as a source: windows across or within documents, and what a label is at a document's end."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqengine.config.data import SourceSection
from seqengine.data.cache import digest
from seqengine.data.contract import IGNORE, IntArray
from seqengine.data.corpus import open_corpora
from seqengine.data.packed_text import PackedText, num_valid, pack_and_train, pack_text
from seqengine.data.text_tokenizer import ByteTokenizer, TextTokenizer, read_tokenizer
from seqengine.data.tiles import Region, Tiles, WindowMode, check_slice
from seqengine.errors import InputError


class TextWindows(Tiles):
    """The windows of one split of packed documents; see `seqengine.data.contract.Windows`.

    separate: `read` returns the boundaries of documents, and a label that would be another document's first token is -100.
    """

    def __init__(
        self, packed: PackedText, regions: Sequence[Region], seq_len: int, *, window: WindowMode, separate: bool
    ) -> None:
        super().__init__(regions, seq_len)
        self.packed = packed
        self.mode: WindowMode = window
        self.separate = separate

    def read(
        self, index: int, begin: int, end: int, *, seed: int = 0, epoch: int = 0, training: bool = False
    ) -> tuple[IntArray, IntArray, tuple[int, ...] | None]:
        """Inputs, labels and boundaries of a window; moved in training, if windows are.

        Traffic: reads end - begin + 1 tokens of the file and no other, and the boundaries inside the window.
        """
        check_slice(begin, end, self.seq_len)
        start = self.start(index, seed=seed, epoch=epoch, window=self.mode if training else "tile")
        tokens = self.packed.tokens()[start + begin : start + end + 1]
        inputs = np.array(tokens[:-1] if begin < end else tokens[:0])
        labels = np.array(tokens[1:], dtype=np.int64) if begin < end else np.empty(0, dtype=np.int64)
        if not self.separate:
            return inputs, labels, None
        bounds = self.packed.documents()
        inside = (
            bounds[bounds.searchsorted(start, "right") : bounds.searchsorted(start + self.seq_len, "right")] - start
        )
        last = inside[(inside > begin) & (inside <= end)] - 1  # the window's last token may be its document's too
        labels[last - begin] = IGNORE
        cuts = [int(cut) for cut in inside if cut < self.seq_len]
        return inputs, labels, (0, *cuts, self.seq_len)


class TextSource:
    """Text, JSON lines, a Hugging Face data set or raw files; see `seqengine.data.contract.Source`.

    place: the table of its keys, for messages. Raises: InputError for data that cannot be read.
    """

    def __init__(self, section: SourceSection, cache: Path, place: str = "data") -> None:
        self._section, self._place = section, place
        train, valid = open_corpora(section, place)
        if section.tokenizer == "train":
            self.train = pack_and_train(train, section, cache, apart=valid is not None)
            self.tokenizer: TextTokenizer = self.train.tokenizer()
        else:
            self.tokenizer = _tokenizer(section, place)
            self.train = pack_text(train, self.tokenizer, cache)
        self.valid = None if valid is None else pack_text(valid, self.tokenizer, cache)
        self.vocab_size = self.tokenizer.vocab_size
        self.mask_id = self.tokenizer.mask_id
        self.replacements = None if self.mask_id is None else self.tokenizer.replacements
        self.num_classes: int | None = None
        hashes = [part.content_hash for part in (self.train, self.valid) if part is not None]
        self.content_hash = hashes[0] if self.valid is None else digest(hashes)

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, TextWindows]:
        """The windows of each split. Raises: InputError for a split without a window."""
        regions = self._regions()
        found: dict[str, TextWindows] = {}
        problems = []
        for split in splits:
            packed, region = regions.get(split, (self.train, Region(0, 0)))
            section = self._section
            found[split] = TextWindows(
                packed, [region], seq_len, window=section.window, separate=section.documents == "separate"
            )
            if not len(found[split]):
                problems.append(self._no_window(split, region, seq_len))
        if problems:
            raise InputError(*problems)
        return found

    def _regions(self) -> dict[str, tuple[PackedText, Region]]:
        """The tokens of each split: a cut between two documents, or the files of each."""
        end = self.train.num_tokens
        if self.valid is not None:
            return {"train": (self.train, Region(0, end)), "valid": (self.valid, Region(0, self.valid.num_tokens))}
        count = self.train.num_documents
        cut = int(self.train.documents()[count - num_valid(count, self._section.valid_fraction)])
        return {"train": (self.train, Region(0, cut)), "valid": (self.train, Region(cut, end))}

    def _no_window(self, split: str, region: Region, seq_len: int) -> str:
        place, tokens = self._place, region.end - region.start
        if split == "test":
            return f"{place}.source: '{self._section.source}' has the splits train and valid; got 'test'."
        remedies = [f"lower data.seq_len to at most {tokens - 1}"] if tokens > 1 else []
        documents = self.train.num_documents
        if self.valid is None:
            if documents > 1:
                change = "raise" if split == "valid" else "lower"
                remedies.append(f"{change} {place}.valid_fraction (now {self._section.valid_fraction:g})")
            elif self._section.source == "text":
                remedies.append(f"set {place}.separator, which parts the one document there is")
            remedies.append(f"set {place}.valid_files")
        remedies.append("give more data")
        return (
            f"data.seq_len: a window of {seq_len} tokens needs {seq_len + 1} tokens of split {split!r}; it has {tokens}, of "
            f"{documents} documents in all. Do one of: {'; '.join(remedies)}."
        )


def _tokenizer(section: SourceSection, place: str) -> TextTokenizer:
    if section.tokenizer == "bytes" or section.source == "bytes":
        return ByteTokenizer()
    return read_tokenizer(Path(section.tokenizer), section.tokenizer_end, f"{place}.tokenizer")
