"""[data]: what is read."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seqengine.config.values import Count, FilePath, Fraction, Positive, Section, Share

GENOMES = ("fasta", "synthetic")
TEXTS = ("text", "jsonl", "hf")
PACKED = (*TEXTS, "bytes")
TASKS = ("recall", "induction")
GENERATED = ("listops", "pathfinder")
FOLDERS = ("class_folders", "cifar10", "aan")
LABELLED = (*GENERATED, *FOLDERS)
"""Sources whose sequences have classes."""
CLASSES = {"listops": 10, "pathfinder": 2, "cifar10": 10, "aan": 2}
"""Of sources that have always as many; those of class_folders are counted when they are read."""
PIXELS = 1024
"""Of a picture of cifar10."""


class SyntheticSection(Section):
    """[data.synthetic]: the genome of the demo (seqengine.data.synthetic)."""

    length: Positive = 2_000_000
    """Bases."""
    lag: Positive = 40
    """Distance in bases at which the genome repeats itself."""
    repeat: Share = 0.7
    """Probability that a base is the one `lag` bases before."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is another genome."""


class RecallSection(Section):
    """[data.recall]: examples of the tasks recall and induction (seqengine.data.recall)."""

    vocab: Annotated[Count, Field(ge=4, multiple_of=2)] = 20
    """Symbols, the mark aside; an even number. Of recall the first half are keys, the second half values."""
    examples: Positive = 2**16
    """Training examples of an epoch; every epoch has new ones."""
    valid_examples: Positive = 1024
    """Validation examples, apart from the training ones; the same in every run."""
    every: bool = False
    """Of recall: each key that has stood before asks for its value too, not only the last one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is other examples."""


class ListopsSection(Section):
    """[data.listops]: nested operations on digits (seqengine.data.listops); the defaults are those of the Long Range Arena."""

    min_length: Positive = 500
    """Tokens of an expression, at least."""
    max_length: Positive = 2000
    """Tokens of an expression, at most; data.seq_len must hold them."""
    max_depth: Annotated[Count, Field(ge=2)] = 10
    """Expressions inside each other, the digits included."""
    max_args: Annotated[Count, Field(ge=2)] = 10
    """Arguments of an operator, at most."""
    examples: Positive = 96_000
    """Training examples, the same in every epoch."""
    valid_examples: Positive = 2000
    """Validation examples, apart from the training ones; as many again for a test."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is other examples."""


class PathfinderSection(Section):
    """[data.pathfinder]: drawings of dashed curves (seqengine.data.pathfinder)."""

    size: Annotated[Count, Field(ge=16)] = 32
    """Pixels of a side; a sequence is size * size gray levels, which data.seq_len must hold."""
    distractors: Annotated[Count, Field(ge=0)] = 3
    """Short curves that join nothing."""
    examples: Positive = 160_000
    """Training examples, the same in every epoch."""
    valid_examples: Positive = 20_000
    """Validation examples, apart from the training ones; as many again for a test."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is other examples."""


class StageSection(Section):
    """[[data.stages]]: part of a run, at one length of windows."""

    tokens: Count | None = Field(default=None, gt=0)
    """Tokens over all ranks; the last stage runs to the end of the run and has none."""
    seq_len: Positive
    """Tokens in a window."""
    sequence: Positive | None = None
    """Ranks over which each window is split, if not parallel.sequence."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Windows per forward pass, if not train.micro_batch."""


class SourceSection(Section):
    """What is read of one source, and how."""

    source: Literal[
        "fasta", "synthetic", "text", "jsonl", "hf", "bytes", "recall", "induction", "listops", "pathfinder",
        "class_folders", "cifar10", "aan", "mixture",
    ] = "fasta"  # fmt: skip
    """A genome of yours, or the synthetic one; text, JSON lines, a Hugging Face data set, files as bytes; two tasks; sequences
    with classes, made (listops, pathfinder) or read from data.folder; or several sources (data.mix)."""
    fasta: FilePath | None = None
    """FASTA file, plain or gzip or bgzip."""
    bed: FilePath | None = None
    """Intervals with a split: chromosome, start, end, train|valid|test. Without it see `valid_fraction`."""
    bed_join: bool = False
    """Join neighbouring intervals of one split, gap included, so that windows longer than an interval exist."""
    files: tuple[str, ...] = ()
    """Of text, jsonl, bytes and hf: paths, or patterns such as 'books/*.txt.gz', whose files come in order of names."""
    valid_files: tuple[str, ...] = ()
    """Files of the validation split. Without them see `valid_fraction`. Of cifar10: names in data.folder; without them the last
    tenth of the training files."""
    folder: FilePath | None = None
    """Of class_folders, cifar10 and aan: where the sequences with classes lie."""
    classes: tuple[str, ...] = ()
    """Of class_folders: the folders that are classes; empty: all there are."""
    alphabet: Literal["bytes", "dna"] | None = None
    """Of class_folders: what its files hold, for the ids; bytes if not given."""
    separator: str = ""
    """Of text: what stands between two documents of a file, such as "\\n\\n\\n"; one without a newline is a line of its own.
    Empty: a file is one document."""
    field: str = "text"
    """Of jsonl and hf: the field that holds a document."""
    dataset: str | None = None
    """Of hf: a name on the hub, a directory, or a format ('json', 'parquet', 'csv') of data.files."""
    dataset_config: str | None = None
    """Of hf: the data set's configuration."""
    dataset_split: str = "train"
    """Of hf: the split that is read."""
    dataset_valid_split: str | None = None
    """Of hf: the split that is the validation split. Without it see `valid_fraction`."""
    tokenizer: str = "bytes"
    """Of text, jsonl and hf: 'bytes', 'train' (a byte-level BPE of the training split) or the path of a tokenizer.json."""
    tokenizer_vocab: Annotated[Count, Field(ge=258)] | None = None
    """With tokenizer = 'train': ids at most, 256 bytes and two special ones among them."""
    tokenizer_end: str | None = None
    """With a tokenizer.json: its token that ends a document. If not given, '<|endoftext|>', '</s>' or '[SEP]'."""
    documents: Literal["join", "separate"] = "join"
    """join: a window is one sequence. separate: no state and no attention crosses from one document into the next."""
    window: Literal["tile", "jitter"] = "tile"
    """tile: windows end to end. jitter: each is moved by up to half a window, anew in every epoch."""
    rc_prob: Share = 0.5
    """Of genomes and class_folders of DNA: probability that a training window is read as its reverse complement."""
    soft_mask: Literal["upper", "unk"] = "upper"
    """Lower-case bases: upper = as their capitals; unk = as [UNK] (the published behaviour)."""
    valid_fraction: Annotated[Fraction, Field(gt=0.0, lt=1.0)] = 0.05
    """Without a BED or validation files: this share of the bases or documents, at the end, is validation."""
    synthetic: SyntheticSection = SyntheticSection()
    recall: RecallSection = RecallSection()
    listops: ListopsSection = ListopsSection()
    pathfinder: PathfinderSection = PathfinderSection()


class MixSection(SourceSection):
    """[[data.mix]]: one source of a mixture; its keys are those of [data], and its weight."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of the samples, as a part of the sum of all weights; kept to 1/1000."""


class DataSection(SourceSection):
    """[data]: what is read."""

    cache: str = "runs/cache"
    """Directory of packed data, shared by runs."""
    seq_len: Positive = 1024
    """Tokens in a window."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that read ahead of training; 0 = none. Batches are the same for every number."""
    mix: tuple[MixSection, ...] = ()
    """The sources of a mixture, as tables [[data.mix]]."""
    stages: tuple[StageSection, ...] = ()
    """Lengths of windows one after the other; without stages all windows have seq_len tokens."""

    @model_validator(mode="after")
    def _stages_end(self) -> Self:
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            if last and stage.tokens is not None:
                raise ValueError(
                    f"data.stages[{i}].tokens: the last stage runs to the end of the run, got {stage.tokens}; delete it"
                )
            if not last and stage.tokens is None:
                raise ValueError(f"data.stages[{i}].tokens: missing; every stage but the last must say how long it is")
        return self

    @property
    def sources(self) -> tuple[tuple[str, SourceSection], ...]:
        """The tables that each name one source: ('data', itself), or ('data.mix[0]', ..), .. of a mixture."""
        if self.source == "mixture":
            return tuple((f"data.mix[{i}]", part) for i, part in enumerate(self.mix))
        return (("data", self),)

    @property
    def is_given(self) -> bool:
        """Whether the section names data: a config may leave the files to the command line."""
        needs = {"fasta": "fasta", "text": "files", "jsonl": "files", "bytes": "files", "hf": "dataset"}
        needs |= dict.fromkeys(FOLDERS, "folder")
        sources = self.sources
        return bool(sources) and all(bool(getattr(s, needs[s.source])) for _, s in sources if s.source in needs)

    @property
    def has_documents(self) -> bool:
        """Windows come with the boundaries of their documents, and so one at a time."""
        return any(section.documents == "separate" for _, section in self.sources)
