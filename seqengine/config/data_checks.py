"""What must hold between the keys of [data], and between them and the model and the steps."""

import math
from collections.abc import Callable, Iterator

from seqengine.config.data import (
    CLASSES,
    FOLDERS,
    GENOMES,
    LABELLED,
    PACKED,
    PIXELS,
    TASKS,
    TEXTS,
    DataSection,
    SourceSection,
)
from seqengine.config.mesh_checks import Problem
from seqengine.config.model import ModelConfig
from seqengine.config.sections import TrainSection
from seqengine.mixers.registry import MIXERS

DNA_SYMBOLS = 12
"""Token ids of the published HyenaDNA alphabet: 0 to 6 special, 7 to 11 A, C, G, T, N."""
BYTE_SYMBOLS = 258
"""256 bytes, the end of a document, and the mask."""
LISTOPS_SYMBOLS, PAIR_SYMBOLS = 17, 259
READERS: dict[str, tuple[str, ...]] = {
    "fasta": ("fasta",),
    "bed": ("fasta",),
    "files": PACKED,
    "valid_files": (*PACKED, "cifar10"),
    "folder": FOLDERS,
    "classes": ("class_folders",),
    "alphabet": ("class_folders",),
    "separator": ("text",),
    "dataset": ("hf",),
    "dataset_config": ("hf",),
    "dataset_valid_split": ("hf",),
    "tokenizer_vocab": TEXTS,
    "tokenizer_end": TEXTS,
}
"""Keys that say what is read, and the sources that read them; a key that nobody reads is a mistake."""


def keys_are_read(data: DataSection) -> Iterator[Problem]:
    """Nothing that names data is passed over in silence."""
    tables: list[tuple[str, SourceSection]] = [("data", data)]
    if data.source == "mixture":
        tables += data.sources
    for place, section in tables:
        given = [name for name, sources in READERS.items() if getattr(section, name) and section.source not in sources]
        if given:
            keys = tuple(f"{place}.{name}" for name in given)
            readers = " or ".join(f"'{source}'" for source in READERS[given[0]])
            told = " and ".join(keys)
            yield Problem(
                (*keys, f"{place}.source"),
                f"{told} would not be read, because {place}.source = '{section.source}'; "
                f"delete {told}, or set {place}.source = {readers}",
            )
    if data.source != "mixture" and data.mix:
        yield Problem(
            ("data.mix", "data.source"),
            f"data.mix would not be read, because data.source = '{data.source}'; delete it, or set data.source = 'mixture'",
        )


def intervals_have_a_genome(data: DataSection) -> Iterator[Problem]:
    """A BED file speaks of a FASTA file."""
    for place, section in data.sources:
        if section.source == "fasta" and section.bed is not None and section.fasta is None:
            yield Problem(
                (f"{place}.bed", f"{place}.fasta"),
                f"{place}.bed = '{section.bed}' needs {place}.fasta, the genome that its intervals lie in; "
                f"add {place}.fasta=/path/to/genome.fa to the command, or set fasta under [{place}]",
            )


def mixture_is_whole(data: DataSection) -> Iterator[Problem]:
    """A mixture has sources, and none of them is a mixture."""
    if data.source != "mixture":
        return
    if not data.mix:
        text = "data.mix: a mixture needs its sources, got none; add a table [[data.mix]] for each"
        yield Problem(("data.mix", "data.source"), text)
    for place, section in data.sources:
        if section.source == "mixture":
            text = f"{place}.source = 'mixture': a mixture must not hold another; put its tables [[data.mix]] beside the others"
            yield Problem((f"{place}.source",), text)
        if section.source in LABELLED:
            text = (
                f"{place}.source = '{section.source}': a mixture must not hold sequences with classes; read them alone"
            )
            yield Problem((f"{place}.source",), text)
    total = sum(part.weight for part in data.mix)
    for i, part in enumerate(data.mix):
        if part.weight < total / 1000:
            yield Problem(
                (f"data.mix[{i}].weight",),
                f"data.mix[{i}].weight = {part.weight:g} must be at least 1/1000 of the sum of all weights, {total:g}; "
                "raise it, or delete the table",
            )


def tokenizer_fits(data: DataSection) -> Iterator[Problem]:
    """A tokenizer is for text, and one to be trained has a size."""
    for place, section in data.sources:
        trained, key = section.tokenizer == "train", f"{place}.tokenizer"
        if section.tokenizer != "bytes" and section.source not in TEXTS:
            text = f"{key} = '{section.tokenizer}' would not be read, because {place}.source = '{section.source}'; delete it"
            yield Problem((key, f"{place}.source"), text)
        elif trained and section.tokenizer_vocab is None:
            text = f"{key} = 'train' needs {place}.tokenizer_vocab, its number of ids; set it, for instance to 8192"
            yield Problem((key, f"{place}.tokenizer_vocab"), text)
        if section.source in TEXTS and not trained and section.tokenizer_vocab is not None:
            text = (
                f"{place}.tokenizer_vocab is the size of a tokenizer to be trained, got {key} = '{section.tokenizer}'; "
            )
            yield Problem((f"{place}.tokenizer_vocab", key), text + "delete it, or set tokenizer = 'train'")
        if section.source in TEXTS and section.tokenizer in ("bytes", "train") and section.tokenizer_end is not None:
            text = f"{place}.tokenizer_end is a token of a tokenizer.json, got {key} = '{section.tokenizer}'; delete it"
            yield Problem((f"{place}.tokenizer_end", key), text)


def documents_stand_apart(data: DataSection, train: TrainSection) -> Iterator[Problem]:
    """Only packed files have documents, and windows with boundaries come one at a time."""
    for place, section in data.sources:
        if section.documents == "separate" and section.source not in PACKED:
            what = "a record is never read across its end" if section.source in GENOMES else "an example is a window"
            yield Problem(
                (f"{place}.documents", f"{place}.source"),
                f"{place}.documents = 'separate' is for {', '.join(PACKED)}, got {place}.source = '{section.source}', where "
                f"{what}; delete it",
            )
    sizes = [("train.micro_batch", train.micro_batch)]
    sizes += [(f"data.stages[{i}].micro_batch", s.micro_batch or "auto") for i, s in enumerate(data.stages)]
    for key, size in sizes:
        if data.has_documents and size not in ("auto", 1):
            yield Problem(
                (key, "data.documents"),
                f"{key} = {size} must be 1 with documents = 'separate': windows whose documents differ cannot share a forward "
                f"pass; set {key} = 1",
            )


def mixers_stand_apart(model: ModelConfig, data: DataSection) -> Iterator[Problem]:
    """Every mixer can begin anew at the boundaries of documents."""
    if not data.has_documents:
        return
    cannot = [n for n in dict.fromkeys(model.mixer_names) if not getattr(MIXERS[n].make, "keeps_documents_apart", True)]
    if cannot:
        yield Problem(
            ("model.pattern", "model.layers", "data.documents"),
            f"data.documents = 'separate': {', '.join(cannot)} cannot begin anew inside a window; set data.documents = 'join', "
            "or choose other mixers",
        )


def _seq_lens(data: DataSection) -> list[tuple[str, int]]:
    """Every length of window, by its key."""
    stages = [(f"data.stages[{i}].seq_len", stage.seq_len) for i, stage in enumerate(data.stages)]
    return stages or [("data.seq_len", data.seq_len)]


def examples_fit(data: DataSection) -> Iterator[Problem]:
    """An example of a task fills a window: pairs, or a mark and its answer."""
    for place, section in data.sources:
        if section.source not in TASKS:
            continue
        for key, length in _seq_lens(data):
            if length < 6 or length % 2:
                yield Problem(
                    (key, f"{place}.source"),
                    f"{key} = {length} must be even and at least 6, the length of an example of '{section.source}'; "
                    f"set it to {max(6, length + length % 2)}",
                )


def sequences_fit(data: DataSection) -> Iterator[Problem]:
    """A window holds a whole sequence, where a part of one would have another class; and expressions can have their lengths."""
    if data.source not in LABELLED:
        return
    drawing, of = data.pathfinder, data.listops
    longest = {"listops": of.max_length, "pathfinder": drawing.size**2, "cifar10": PIXELS, "aan": 3}.get(data.source, 1)
    key = {"listops": "data.listops.max_length", "pathfinder": "data.pathfinder.size"}.get(data.source, "data.source")
    for length_key, length in _seq_lens(data):
        if length < longest:
            yield Problem(
                (length_key, key),
                f"{length_key} = {length} must be at least {longest}, the tokens of a whole sequence of '{data.source}'; "
                f"set it to {longest}" + (f", or change {key}" if key != "data.source" else ""),
            )
    if data.source == "listops" and not 4 <= of.min_length <= of.max_length:
        yield Problem(
            ("data.listops.min_length", "data.listops.max_length"),
            f"data.listops.min_length = {of.min_length} must be from 4 to data.listops.max_length = {of.max_length}; "
            "change one of them",
        )


def classes_fit(model: ModelConfig, data: DataSection) -> Iterator[Problem]:
    """A model of classes has a source of classes, and as many; `check_classes` counts what the config does not know."""
    if not model.num_classes:
        return
    known = CLASSES.get(data.source)
    if data.source not in LABELLED:
        yield Problem(
            ("model.num_classes", "data.source"),
            f"model.num_classes = {model.num_classes} needs sequences with classes, got data.source = '{data.source}'; set "
            f"data.source to one of {', '.join(LABELLED)}, or model.num_classes = 0",
        )
    elif known is not None and model.num_classes != known:
        yield Problem(
            ("model.num_classes", "data.source"),
            f"model.num_classes = {model.num_classes} must be {known}, the classes of '{data.source}'; set model.num_classes = "
            f"{known}",
        )


def vocabulary_fits(model: ModelConfig, data: DataSection) -> Iterator[Problem]:
    """The model has a row for every id that the config makes known; `check_vocabulary` knows the rest."""
    for place, section in data.sources:
        needed, what, keys = _ids(place, section)
        if model.vocab_size < needed:
            yield Problem(
                ("model.vocab_size", *keys),
                f"model.vocab_size = {model.vocab_size} must be at least {needed}, {what}; set model.vocab_size = {needed}",
            )


def _ids(place: str, section: SourceSection) -> tuple[int, str, tuple[str, ...]]:
    """The ids that a source will surely need, what they are, and the keys that say so."""
    if section.source in GENOMES:
        return DNA_SYMBOLS, "the symbols of the DNA alphabet", ()
    if section.source in TASKS:
        return section.recall.vocab + 1, "the symbols of the task and its mark", (f"{place}.recall.vocab",)
    if section.source in LABELLED:
        return *_labelled_ids(section), (f"{place}.source",)
    if section.source in PACKED and section.tokenizer == "bytes":
        return BYTE_SYMBOLS, "256 bytes, the end of a document and the mask", (f"{place}.source",)
    if section.tokenizer == "train" and section.tokenizer_vocab is not None:
        return section.tokenizer_vocab, f"{place}.tokenizer_vocab", (f"{place}.tokenizer_vocab",)
    return 0, "", ()


def _labelled_ids(section: SourceSection) -> tuple[int, str]:
    if section.source == "listops":
        return LISTOPS_SYMBOLS, "digits, operators, the padding and the mask"
    if section.source == "aan":
        return PAIR_SYMBOLS, "256 bytes, the separator of two texts, the padding and the mask"
    if section.alphabet == "dna":
        return DNA_SYMBOLS, "the symbols of the DNA alphabet"
    return BYTE_SYMBOLS, "256 bytes or gray levels, the padding and the mask"


def synthetic_genome(data: DataSection) -> Iterator[Problem]:
    """Both splits of a synthetic genome hold a window, and it is long enough to repeat itself."""
    for place, section in data.sources:
        if section.source == "synthetic":
            yield from _synthetic(place, section, data.seq_len)


def _synthetic(place: str, section: SourceSection, seq_len: int) -> Iterator[Problem]:
    bases, share = section.synthetic.length, section.valid_fraction
    valid = int(bases * share)
    shortest = min(valid, bases - valid)
    if shortest <= seq_len:
        enough = math.ceil((seq_len + 1) / min(share, 1 - share)) + 1
        yield Problem(
            (f"{place}.synthetic.length", f"{place}.valid_fraction", "data.seq_len"),
            f"{place}.synthetic.length = {bases} with {place}.valid_fraction = {share} leaves {shortest} bases "
            f"in the smaller split, which must hold more than one window of data.seq_len = {seq_len}; "
            f"set {place}.synthetic.length to at least {enough}",
        )
    if section.synthetic.lag >= bases:
        text = f"{place}.synthetic.lag = {section.synthetic.lag} must be below {place}.synthetic.length = {bases}; "
        yield Problem((f"{place}.synthetic.lag", f"{place}.synthetic.length"), text + "make it smaller")


DATA_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...] = (
    (("data",), keys_are_read),
    (("data",), intervals_have_a_genome),
    (("data",), mixture_is_whole),
    (("data",), tokenizer_fits),
    (("data", "train"), documents_stand_apart),
    (("data",), examples_fit),
    (("data",), sequences_fit),
    (("model", "data"), classes_fit),
    (("model", "data"), vocabulary_fits),
    (("model", "data"), mixers_stand_apart),
    (("data",), synthetic_genome),
)
"""As run.CHECKS: the sections that a check needs, in the order of its arguments, and the check."""
