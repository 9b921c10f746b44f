"""Text to ids: bytes, a byte-level BPE trained on the data, or a tokenizer.json (the `tokenizers` library).

bytes   ids 0 to 255 are the bytes, 256 ends a document, 257 hides a token
train   BPE over bytes: id 0 ends a document, 1 hides a token, then the 256 bytes, then merges; deterministic
file    the file's own ids; its mask is '[MASK]', '<mask>' or '<|mask|>', if it has one

Text that spells a special token, such as "<|endoftext|>", is read as text.

References: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019, GPT-2 (over bytes).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from seqengine.errors import InputError

END, MASK = "<|endoftext|>", "<|mask|>"
ENDS = (END, "</s>", "[SEP]")
"""Names of the token that ends a document, in files that do not say which it is."""
MASKS = ("[MASK]", "<mask>", MASK)
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class TextTokenizer(Protocol):
    """Ids of text, and the id that ends a document."""

    vocab_size: int
    """Above every id."""
    end_id: int
    mask_id: int | None
    replacements: range
    """Ids of text."""
    digest: str
    """Equal for tokenizers that make equal ids."""
    json: str | None
    """As a tokenizer.json; None: bytes."""
    end: str | None
    """The token that ends a document, if it was given by name."""

    def encode(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Ids of each text, without ends of documents."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are no UTF-8 are replaced."""
        ...


class ByteTokenizer:
    """A `TextTokenizer` without a vocabulary to learn: one byte, one id."""

    vocab_size, end_id = 258, 256
    mask_id: int | None = 257
    replacements = range(256)
    digest = "bytes"
    json: str | None = None
    end: str | None = None

    def encode(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """See `TextTokenizer`."""
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `TextTokenizer`."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A `TextTokenizer` from the text of a tokenizer.json.

    end: the token that ends a document, or None: the first of `ENDS` that there is. place: of messages.

    Raises: InputError if the library cannot read it, or there is no such token.
    """

    def __init__(self, text: str, *, end: str | None = None, place: str = "data.tokenizer") -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
            raise InputError(f"{place}: must be a tokenizer.json of the tokenizers library; got: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a special token's name in the text is text
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = ENDS if end is None else (end,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found:
            wanted = " or ".join(repr(name) for name in names)
            raise InputError(
                f"{place}: must have a token that ends a document, {wanted}; got none of them. Set data.tokenizer_end."
            )
        self.end_id: int = found[0]
        self.mask_id: int | None = next((vocabulary[name] for name in MASKS if name in vocabulary), None)
        self.vocab_size: int = max(vocabulary.values()) + 1
        special = {self.end_id, self.mask_id}
        self.replacements = range(2 if special == {0, 1} else 0, self.vocab_size)
        self.end = end
        self.json: str | None = text
        self.digest: str = hashlib.sha256(f"{self.end_id} {text}".encode()).hexdigest()
        self._dtype: Any = dtype_of(self.vocab_size)

    def encode(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """See `TextTokenizer`."""
        encoded = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(one.ids, dtype=self._dtype) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """See `TextTokenizer`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def dtype_of(vocab_size: int) -> str:
    """The smallest of two types of unsigned numbers that holds ids below vocab_size."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def read_tokenizer(path: Path, end: str | None, place: str) -> FileTokenizer:
    """The tokenizer of a file. Raises: InputError if it cannot be read or is damaged."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{place}: must be 'bytes', 'train' or a readable tokenizer.json; got {path} ({error.strerror})."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: must be a tokenizer.json; got {path}, which is not UTF-8 ({error.reason})."
        ) from None
    return FileTokenizer(text, end=end, place=f"{place} = '{path}'")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE with at most `vocab_size` ids, the same for the same texts.

    Memory: the distinct words of the texts with their counts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())
