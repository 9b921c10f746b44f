"""Between people's prompts and a run's token ids, without its data: a run of text keeps its tokenizer in its directory."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from seqengine.config.data import GENOMES, TASKS, DataSection
from seqengine.data.source import Source
from seqengine.data.text_tokenizer import ByteTokenizer, TextTokenizer, read_tokenizer
from seqengine.data.tokenizer import A, T, decode, encode_exactly
from seqengine.errors import InputError
from seqengine.runfiles import write_whole

TOKENIZER = "tokenizer.json"


class Codec(Protocol):
    """Prompts to ids, ids to text."""

    allowed: Tensor | None
    """Ids that may be drawn; None: all of the model's."""
    end_id: int | None
    """Ends a document, and with it a continuation."""

    def encode(self, prompt: str) -> Tensor:
        """int64 [T]. Raises InputError for a prompt that has no ids."""
        ...

    def decode(self, ids: Tensor) -> str: ...


class DnaCodec:
    """A, C, G, T and N, of which N is not drawn."""

    allowed: Tensor | None = torch.arange(A, T + 1)
    end_id: int | None = None

    def encode(self, prompt: str) -> Tensor:
        return torch.from_numpy(encode_exactly(prompt)).long()

    def decode(self, ids: Tensor) -> str:
        return decode(ids)


class TextCodec:
    """The tokenizer of a run of text. Its mask is not drawn."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        ids = torch.arange(tokenizer.vocab_size)
        self.allowed: Tensor | None = ids if tokenizer.mask_id is None else ids[ids != tokenizer.mask_id]
        self.end_id: int | None = tokenizer.end_id

    def encode(self, prompt: str) -> Tensor:
        (ids,) = self._tokenizer.encode([prompt.encode()])
        if not len(ids):
            raise InputError("--prompt: must hold at least one token; got nothing. Give some text.")
        return torch.tensor(ids.tolist(), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """A byte, or a part of a letter, may show as a replacement sign until its letter is whole."""
        return self._tokenizer.decode(ids.tolist())


def keep_tokenizer(source: Source, run_dir: Path) -> None:
    """Write a text source's tokenizer into the run's directory, if it has one beyond bytes."""
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None or tokenizer.json is None:
        return
    write_whole(run_dir / TOKENIZER, tokenizer.json)


def codec_of(run_dir: Path, data: DataSection) -> Codec:
    """The codec of a run. Raises InputError for tasks and mixtures that have no letters of their own."""
    kinds = {section.source for _, section in data.sources}
    if kinds <= set(GENOMES):
        return DnaCodec()
    if kinds & {*TASKS, *GENOMES}:
        raise InputError(f"generate: a run of {' and '.join(sorted(kinds))} has no text to begin with or to write.")
    file = run_dir / TOKENIZER
    if file.is_file():
        ends = {section.tokenizer_end for _, section in data.sources}
        return TextCodec(read_tokenizer(file, ends.pop() if len(ends) == 1 else None, str(file)))
    return TextCodec(ByteTokenizer())
