"""Data that cannot be read, or not by this model: FASTA, BED, text, JSON lines, tokenizers, mixtures."""

import gzip
import json
from collections.abc import Callable

from tests.launch.bad_input import CONFIG, Case, config, fasta, files, train

COMPRESSED = gzip.compress(fasta().encode())
FLIPPED = bytearray(COMPRESSED)
FLIPPED[len(FLIPPED) // 2] ^= 0xFF
PROTEIN = fasta("MKVLAAGIEELFPQLLPEWK" * 200, "sp|P1")
ROW = json.dumps({"text": "a b c " * 200})
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


def genome(content: str | bytes, *words: str, name: str = "bad.fa") -> Case:
    """`train` on a FASTA file of this content."""
    return train(f"data.fasta={name}", words=(name, *words), prepare=files(**{name.replace(".", "__"): content}))


def bed(content: str | bytes, *words: str) -> Case:
    """`train` with these intervals of genome.fa."""
    return train("data.bed=bad.bed", words=("bad.bed", *words), prepare=files(bad__bed=content), packs=True)


FASTA = [
    genome("", "must not be empty"),
    genome(gzip.compress(b""), "must not be empty", name="bad.fa.gz"),
    genome("ACGT\n" * 100, "must begin with '>'", "line 1"),
    genome(">a\n\n>b\n", "record(s), all of length 0"),
    genome(PROTEIN, "protein", "sp|P1"),
    genome(fasta().replace("A", "@", 1), "'@'", "chr1"),
    genome(fasta() + fasta(), "record names must differ", "'chr1'", "lines 1, 102"),
    genome(">\nACGT\n>b\nACGT\n", "needs a name", "line 1"),
    genome(">a\nACGTACGT\nACG\nACGTACGT\nACGT\n", "equally long", "line 3"),
    genome(">a\nACGT\nACGTACGT\n", "longer last line", "'a'"),
    genome(b">a\nAC\xffGT\n" * 2, "bad.fa"),
    genome(COMPRESSED[: len(COMPRESSED) // 2], "bad.fa.gz", name="bad.fa.gz"),
    genome(COMPRESSED[:-4], "bad.fa.gz", name="bad.fa.gz"),
    genome(bytes(FLIPPED), "bad.fa.gz", name="bad.fa.gz"),
    train("data.seq_len=64", "train.batch_tokens=512", words=("data.seq_len", "valid"), packs=True,
          prepare=files(genome__fa=fasta("ACGT" * 100))),
    train("data.cache=genome.fa", words=("data.cache", "genome.fa")),
    train("data.cache=/proc/none", words=("data.cache", "/proc/none")),
]  # fmt: skip

BED = [
    bed("chr1\t0\t3000\ttrain\nchr1\t3000\t9000\tvalid\n", "line 2", "9000", "6000"),
    bed("chr1\t0\t3000\ttrain\nchr1\t3000\tmany\tvalid\n", "line 2", "many"),
    bed("chr1\t0\t3000\ttrain\n\nchr1\t5000\t4000\tvalid\n", "line 3"),
    bed("chrX\t0\t3000\ttrain\n", "line 1", "chrX"),
    bed("1\t0\t3000\ttrain\n", "line 1", "calls it 'chr1'"),
    bed("chr1\t0\t3000\ttrain\nchr1\t2000\t4000\tvalid\n", "overlap", "line 2", "line 1"),
    bed("chr1\t0\t3000\n", "line 1", "4 columns"),
    bed("chr1\t0\t3000\tlearn\n", "line 1", "'learn'"),
    bed("# nothing\n", "got none"),
    bed(gzip.compress(b"chr1\t0\t3000\ttrain\n"), "plain text; got gzip"),
    bed(b"chr1\t0\t3000\ttr\xffin\n", "must be text", "0xff"),
    train("data.bed=bad.bed", words=("data.seq_len", "'valid'"), packs=True,
          prepare=files(bad__bed="chr1\t0\t3000\ttrain\n")),
]  # fmt: skip


def text(
    *words: str, packs: bool = False, problems: int = 1, vocab: int = 300, prepare: Callable[[], None], **keys: object
) -> Case:
    """`train` on data of other kinds; keys: those of [data]."""
    told = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    content = CONFIG.replace('fasta = "genome.fa"\n', told).replace("d_model = 8", f"d_model = 8\nvocab_size = {vocab}")
    return Case(
        ("train", "bad.toml"), words, prepare=both(files(bad__toml=content), prepare), packs=packs, problems=problems
    )


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        first()
        second()

    return prepare


def nothing() -> None:
    """No file at all."""


def corpus(
    content: str | bytes, *words: str, name: str = "bad.txt", packs: bool = False, problems: int = 1, **keys: object
) -> Case:
    """One file of text, or of what its name ends in."""
    source = "jsonl" if ".jsonl" in name else "text"
    made = files(**{name.replace(".", "__"): content})
    return text(*words, prepare=made, packs=packs, problems=problems, **{"source": source, "files": [name], **keys})


TEXTS = [
    text("data.files", "must name the files", prepare=nothing, source="text"),
    text("data.files", "'gone.txt'", prepare=nothing, source="text", files=["gone.txt"]),
    text("data.files", "'*.book'", "matches none", prepare=nothing, source="bytes", files=["*.book"]),
    text("data.files", "is no regular file", prepare=files(d___a=""), source="text", files=["d"]),
    text("data.valid_files", "'gone.txt'", prepare=nothing, source="text", files=["genome.fa"], valid_files=["gone.txt"]),
    text("data.valid_files", "genome.fa in both", prepare=nothing, source="text", files=["*.fa"], valid_files=["genome.fa"]),
    text("data.dataset", "must name a data set", prepare=nothing, source="hf"),
    corpus("", "at least one document", "got none"),
    corpus(" \n\n", "at least one document"),
    corpus(b"abc \xff def", "bad.txt", "UTF-8", "0xff at offset 4"),
    corpus("one document " * 99, "data.separator = '---'", "must stand in the text", separator="---"),
    corpus("short", "'train'; it has 0, of 1 documents", "'valid'; it has 6", packs=True, problems=2),
    corpus(gzip.compress(b"words " * 999)[:40], "bad.txt.gz", name="bad.txt.gz"),
    corpus(ROW + "\n{text: 1}\n", "bad.jsonl:2", "JSON object", name="bad.jsonl"),
    corpus(ROW + "\n\n[1, 2]\n", "bad.jsonl:3", "got list", name="bad.jsonl"),
    corpus(ROW + '\n{"body": "x"}\n', "bad.jsonl:2", "the field 'text'", "'body'", name="bad.jsonl"),
    corpus('{"text": 3}\n', "bad.jsonl:1", "got int", name="bad.jsonl"),
    corpus('{"text": "\\ud800"}\n', "bad.jsonl:1", "surrogate", name="bad.jsonl"),
    corpus(ROW.encode() + b'\n{"text": "\xff"}\n', "bad.jsonl:2", "0xff", name="bad.jsonl"),
    corpus(gzip.compress((ROW + "\nno\n").encode()), "bad.jsonl.gz:2", name="bad.jsonl.gz"),
]  # fmt: skip

TOKENIZERS = [
    corpus("a", "data.tokenizer", "gone.json", tokenizer="gone.json"),
    corpus("a", "data.tokenizer", "bad.txt", "tokenizer.json of the tokenizers library", tokenizer="bad.txt"),
    corpus(b"\xff", "data.tokenizer", "not UTF-8", tokenizer="bad.txt"),
    corpus(TOKENIZER, "data.tokenizer", "'</s>'", "Set data.tokenizer_end", tokenizer="bad.txt"),
    corpus(TOKENIZER, "data.tokenizer", "'<end>'", tokenizer="bad.txt", tokenizer_end="<end>"),
    corpus("a", "data.tokenizer = 'train' needs data.tokenizer_vocab", tokenizer="train"),
    corpus("a", "data.tokenizer_vocab: must be", tokenizer="train", tokenizer_vocab=200),
    corpus("a", "data.tokenizer_vocab is the size", tokenizer_vocab=300),
    corpus("a", "data.tokenizer_end is a token", tokenizer_end="</s>"),
    text("data.tokenizer = 'x' would not be read", prepare=nothing, source="bytes", files=["genome.fa"], tokenizer="x"),
    text("data.documents = 'separate'", prepare=nothing, source="synthetic", documents="separate"),
]

WORDS = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "[SEP]": 1, "z": 999}, "unk_token": "[UNK]"},
}


def mixture_without_a_mask() -> None:
    content = CONFIG.replace('fasta = "genome.fa"', 'source = "mixture"')
    content = content.replace("filter = { order = 8 }", 'vocab_size = 300\narch = "lm"\ncausal = false')
    files(
        bad__toml=content
        + '[[data.mix]]\nsource = "recall"\n[[data.mix]]\nsource = "bytes"\n'
        + 'files = ["genome.fa"]\nvalid_files = ["tiny.toml"]\n'
    )()


MODELS = [
    text("model.vocab_size = 12", "at least 258", prepare=nothing, vocab=12, source="bytes", files=["genome.fa"]),
    text("model.vocab_size = 8", "at least 12", prepare=nothing, vocab=8, fasta="genome.fa"),
    text("model.vocab_size = 20", "at least 21", "data.recall.vocab", prepare=nothing, vocab=20, source="recall"),
    text("model.vocab_size = 300 must be at least 1000", packs=True, source="text", files=["a.txt"], tokenizer="words.json",
         prepare=files(words__json=json.dumps(WORDS), a__txt="z " * 999)),
    train("data.source=recall", "data.seq_len=7", "train.batch_tokens=70", "model.vocab_size=30", "model.max_len=70",
          words=("data.seq_len = 7 must be even", "data.fasta would not be read"), problems=2),
    Case(("train", "bad.toml"), ("model.causal = false", "data.source = 'mixture' must have a token that hides others"),
         packs=True, prepare=mixture_without_a_mask),
    config(CONFIG.replace('fasta = "genome.fa"', 'source = "synthetic"\nsynthetic = { length = 100 }'),
           "data.synthetic.length = 100", "data.seq_len = 32"),
    config(CONFIG.replace('fasta = "genome.fa"', 'source = "synthetic"\nsynthetic = { length = 9000, lag = 9000 }'),
           "data.synthetic.lag = 9000 must be below"),
]  # fmt: skip

DATA = [*FASTA, *BED, *TEXTS, *TOKENIZERS, *MODELS]
