"""Cases of bad input to the command: what is typed, over which files, and what the message must name."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GENOME = "".join(random.Random(0).choices("ACGT", k=6000))
CONFIG = """\
[run]
device = "cpu"
[model]
d_model = 8
n_layer = 1
max_len = 64
filter = { order = 8 }
[data]
fasta = "genome.fa"
seq_len = 32
[train]
steps = 2
batch_tokens = 256
[ckpt]
every = 1
"""
"""tiny.toml: two steps on genome.fa, which hold."""


@dataclass(frozen=True)
class Case:
    """One mistake. Every test starts with tiny.toml and genome.fa, and, of cases with a run, with runs/run of two steps."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    """Each must stand in the message: the key, the file or the line, and what is wrong with it."""
    prepare: Callable[[], object] | None = None
    """Makes the files of the mistake."""
    has_run: bool = False
    problems: int = 1
    """Lines of the message."""
    packs: bool = False
    """Data that are good themselves may be packed into data.cache before the mistake is found."""


def fasta(sequence: str = GENOME, name: str = "chr1") -> str:
    """A FASTA file of one record, 60 letters a line."""
    return f">{name}\n" + "\n".join(sequence[i : i + 60] for i in range(0, len(sequence), 60)) + "\n"


def files(**contents: str | bytes) -> Callable[[], None]:
    """Writes files; `__` in a name is a dot, and ___ a slash."""

    def write() -> None:
        for name, content in contents.items():
            path = Path(name.replace("___", "/").replace("__", "."))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def train(*overrides: str, words: str | tuple[str, ...], **options: object) -> Case:
    """`seqengine train tiny.toml` with settings."""
    return Case(("train", "tiny.toml", *overrides), (words,) if isinstance(words, str) else words, **options)  # type: ignore[arg-type]


def config(text: str | bytes, *words: str, **options: object) -> Case:
    """`seqengine train bad.toml`, a file of this text, or (begun with a dot) tiny.toml and what follows the dot."""
    if isinstance(text, str) and text.startswith("."):
        text = CONFIG + text[1:]
    return Case(("train", "bad.toml"), words, prepare=files(bad__toml=text), **options)  # type: ignore[arg-type]
