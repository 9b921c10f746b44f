"""The source that [data] asks for."""

from collections.abc import Sequence
from pathlib import Path

from seqengine.config.data import TASKS, DataSection, SourceSection
from seqengine.data.contract import IGNORE, Batch, Source, Windows
from seqengine.data.mixture import MixtureSource
from seqengine.data.packed import PackedGenome, pack_genome
from seqengine.data.task_source import TaskSource
from seqengine.data.text_source import TextSource
from seqengine.data.tokenizer import MASK, VOCABULARY, A
from seqengine.data.windows import Windows as GenomeWindows
from seqengine.data.windows import genome_windows
from seqengine.errors import InputError

__all__ = ["IGNORE", "Batch", "GenomeSource", "Source", "Windows", "check_vocabulary", "open_source"]


class GenomeSource:
    """A packed genome; see `seqengine.data.contract.Source`."""

    def __init__(self, genome: PackedGenome, section: SourceSection) -> None:
        self.genome = genome
        self._section = section
        self.content_hash = genome.content_hash
        self.vocab_size = VOCABULARY
        self.mask_id: int | None = MASK
        self.replacements: range | None = range(A, A + 4)

    def windows(self, seq_len: int, splits: Sequence[str] = ("train", "valid")) -> dict[str, GenomeWindows]:
        """The windows of each split. Raises: InputError for a bad BED, and for a split without a window."""
        return genome_windows(self.genome, self._section, seq_len, splits)


def open_source(section: DataSection) -> Source:
    """The data that [data] asks for, packed into data.cache if they are not there; safe in many processes at once.

    Raises: InputError for data that cannot be read, and a cache that cannot be written. A failure leaves nothing behind.
    """
    cache = Path(section.cache).absolute()
    if section.source != "mixture":
        return _open(section, cache, "data")
    if not section.mix or any(part.source == "mixture" for part in section.mix):
        raise InputError(
            "data.mix: must hold the sources of the mixture, none of them a mixture; add tables [[data.mix]]."
        )
    sources = [_open(part, cache, place) for place, part in section.sources]
    return MixtureSource(sources, [part.weight for part in section.mix])


def check_vocabulary(source: Source, vocab_size: int) -> None:
    """Raises: InputError if a model of `vocab_size` ids has no row for some id of the source."""
    if vocab_size < source.vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size} must be at least {source.vocab_size}, the ids of the data; "
            f"set model.vocab_size = {source.vocab_size}."
        )


def _open(section: SourceSection, cache: Path, place: str) -> Source:
    if section.source in TASKS:
        return TaskSource("recall" if section.source == "recall" else "induction", section)
    if section.source in ("fasta", "synthetic"):
        return GenomeSource(pack_genome(section, cache, place), section)
    return TextSource(section, cache, place)
