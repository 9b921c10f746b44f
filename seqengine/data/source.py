"""The source that [data] asks for."""

from collections.abc import Sequence
from pathlib import Path

from seqengine.config.data import GENERATED, LABELLED, TASKS, DataSection, SourceSection
from seqengine.data.contract import IGNORE, Batch, Source, Windows
from seqengine.data.folder_source import FolderSource
from seqengine.data.generated_source import GeneratedSource
from seqengine.data.mixture import MixtureSource
from seqengine.data.packed import PackedGenome, pack_genome
from seqengine.data.task_source import TaskSource
from seqengine.data.text_source import TextSource
from seqengine.data.tokenizer import MASK, VOCABULARY, A
from seqengine.data.windows import Windows as GenomeWindows
from seqengine.data.windows import genome_windows
from seqengine.errors import InputError

__all__ = ["IGNORE", "Batch", "GenomeSource", "Source", "Windows", "check_classes", "check_vocabulary", "open_source"]


class GenomeSource:
    """A packed genome; see `seqengine.data.contract.Source`."""

    def __init__(self, genome: PackedGenome, section: SourceSection) -> None:
        self.genome = genome
        self._section = section
        self.content_hash = genome.content_hash
        self.vocab_size = VOCABULARY
        self.mask_id: int | None = MASK
        self.replacements: range | None = range(A, A + 4)
        self.num_classes: int | None = None

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
    labelled = [place for place, part in section.sources if part.source in LABELLED]
    if labelled:
        raise InputError(
            f"{labelled[0]}.source: a mixture must not hold sequences with classes; take it out, or read it alone."
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


def check_classes(source: Source, num_classes: int) -> None:
    """Raises: InputError if a model of `num_classes` classes, 0 for none, cannot learn those of the source."""
    if not num_classes or source.num_classes == num_classes:
        return
    if source.num_classes is None:
        raise InputError(
            f"model.num_classes = {num_classes} needs sequences with classes, of data.source = {', '.join(LABELLED)}; the data "
            "have none. Set model.num_classes = 0, or another data.source."
        )
    raise InputError(
        f"model.num_classes = {num_classes} must be {source.num_classes}, the classes of the data; "
        f"set model.num_classes = {source.num_classes}."
    )


def _open(section: SourceSection, cache: Path, place: str) -> Source:
    if section.source in GENERATED:
        return GeneratedSource(section)
    if section.source in LABELLED:
        return FolderSource(section, cache)
    if section.source in TASKS:
        return TaskSource("recall" if section.source == "recall" else "induction", section)
    if section.source in ("fasta", "synthetic"):
        return GenomeSource(pack_genome(section, cache, place), section)
    return TextSource(section, cache, place)
