"""Packed text: tokens, documents and labels by a slow packer; tokenizers that give the text back."""

import gzip
import json
import logging
import random
from itertools import pairwise

import numpy as np
import pytest
import tokenizers

from seqengine.config.data import DataSection
from seqengine.data import packed_text
from seqengine.data.packed_text import num_valid
from seqengine.data.source import open_source
from seqengine.data.text_tokenizer import ByteTokenizer, FileTokenizer, read_tokenizer, train_tokenizer
from tests.seqengine.data.sources import SEPARATOR, documents, sections, write


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return write(folder / "files"), folder / "cache"


def slow_pack(texts, encode, end):
    """Tokens, and of each token the number of its document."""
    tokens, owner = [], []
    for number, text in enumerate(texts):
        ids = [*encode(text), end]
        tokens += ids
        owner += [number] * len(ids)
    return tokens, owner


def slow_windows(tokens, owner, seq_len, separate):
    """Inputs, labels and boundaries of every tile."""
    found = []
    for start in range(0, len(tokens) - seq_len, seq_len):
        inputs, labels = tokens[start : start + seq_len], tokens[start + 1 : start + seq_len + 1]
        whose = owner[start : start + seq_len + 1]
        bounds = None
        if separate:
            labels = [-100 if whose[t] != whose[t + 1] else labels[t] for t in range(seq_len)]
            bounds = (0, *(t for t in range(1, seq_len) if whose[t] != whose[t - 1]), seq_len)
        found.append((inputs, labels, bounds))
    return found


@pytest.mark.parametrize("seq_len", [1, 7, 32, 150])
@pytest.mark.parametrize("name", ["text", "separate", "trained", "trained apart", "jsonl", "bytes"])
def test_windows_are_those_of_a_slow_packer(places, name, seq_len):
    section = sections(*places)[name]
    source = open_source(section)
    texts, apart = documents(60), documents(9, seed=1)
    if name == "bytes":
        texts = [path.read_bytes() for path in sorted(places[0].glob("*.raw"))]
        encode, end = list, 256
    elif section.tokenizer == "train":
        json_file = tokenizers.Tokenizer.from_file(str(source.train.directory / "tokenizer.json"))
        encode, end = (lambda t: json_file.encode(t, add_special_tokens=False).ids), 0
    else:
        encode, end = (lambda t: list(t.encode())), 256
    if name != "trained apart":
        count = {"text": 12, "separate": 12, "trained": 12, "jsonl": 12, "bytes": 1}[name]
        texts, apart = texts[:-count], texts[-count:]
    for split, some in (("train", texts), ("valid", apart)):
        expected = slow_windows(*slow_pack(some, encode, end), seq_len, section.documents == "separate")
        windows = source.windows(seq_len, (split,))[split]
        assert len(windows) == len(expected)
        for index, (inputs, labels, bounds) in enumerate(expected):
            found = windows.read(index, 0, seq_len, seed=0, epoch=0, training=False)
            assert (found[0].tolist(), found[1].tolist(), found[2]) == (inputs, labels, bounds)


def test_moved_windows_are_tokens_at_another_place(places):
    windows = open_source(sections(*places)["separate"]).windows(32)["train"]
    owner = np.repeat(np.arange(60), np.diff(windows.packed.documents()))
    tokens = windows.packed.tokens()
    starts = set()
    for epoch in range(30):
        start = windows.start(5, seed=1, epoch=epoch, window="jitter")
        starts.add(start)
        found = windows.read(5, 0, 32, seed=1, epoch=epoch, training=True)
        [expected] = slow_windows(tokens[start : start + 33].tolist(), owner[start : start + 33].tolist(), 32, True)
        assert (found[0].tolist(), found[1].tolist(), found[2]) == expected
    assert len(starts) > 10


def test_validation_documents_are_the_last_and_at_least_one():
    assert [num_valid(n, 0.05) for n in (1, 2, 9, 10, 30, 100)] == [1, 1, 1, 1, 2, 5]
    assert num_valid(3, 0.99) == 3


def words(seed, count):
    pick = random.Random(seed)
    return [
        " ".join(pick.choice(["tree", "naïve", "λόγος", "7", "𝄞", "\n", "a b"]) for _ in range(40))
        for _ in range(count)
    ]


def test_every_tokenizer_gives_the_text_back(tmp_path):
    trained = train_tokenizer(iter(words(0, 30)), 400)
    file = tmp_path / "t.json"
    file.write_text(trained, encoding="utf-8")
    for tokenizer in (ByteTokenizer(), FileTokenizer(trained), read_tokenizer(file, "<|endoftext|>", "x")):
        texts = [*words(1, 5), "", " ", "\x00\x7f\u2028 unseen: 漢字", "<|endoftext|><|mask|>"]
        encoded = tokenizer.encode([t.encode() for t in texts])
        assert [tokenizer.decode(ids.tolist()) for ids in encoded] == texts
        used = {i for ids in encoded for i in ids.tolist()}
        assert not used & {tokenizer.end_id, tokenizer.mask_id}  # the names of special tokens are text
        assert used <= set(tokenizer.replacements)
        assert tokenizer.vocab_size <= 400
    assert FileTokenizer(trained).vocab_size > 280
    assert len(FileTokenizer(trained).encode([b"naive tree"])[0]) < 10


def test_a_trained_tokenizer_follows_from_the_texts_alone():
    first = train_tokenizer(iter(words(0, 30)), 400)
    assert train_tokenizer(iter(words(0, 30)), 400) == first
    # The order of the words is another, their counts are the same.
    assert train_tokenizer(iter(words(0, 30)[::-1]), 400) == first
    assert train_tokenizer(iter(words(1, 30)), 400) != first


def test_a_tokenizer_is_trained_on_the_training_split_alone(tmp_path):
    texts = ["aaaa bbbb " * 20] * 9 + ["xyzxyzxyz " * 50]
    (tmp_path / "a.txt").write_text(SEPARATOR.join(texts))
    section = DataSection(
        source="text", files=(str(tmp_path / "a.txt"),), separator=SEPARATOR, tokenizer="train", tokenizer_vocab=300,
        cache=str(tmp_path / "cache"), valid_fraction=0.1,
    )  # fmt: skip
    source = open_source(section)
    vocabulary = json.loads((source.train.directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert "aaaa" in vocabulary
    assert not [word for word in vocabulary if len(word) > 1 and "y" in word]


@pytest.mark.parametrize(("size", "dtype"), [(65534, "<u2"), (65535, "<u4")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, size, dtype):
    vocabulary = {"</s>": 0, "zz": 1, **{f"w{i}": i for i in range(2, size + 1)}, "last": size + 1}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="zz")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("w2 w77 last w9999")
    section = DataSection(
        source="text", files=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "t.json"), cache=str(tmp_path / "c"),
    )  # fmt: skip
    source = open_source(section)
    assert source.vocab_size == size + 2
    assert source.train.dtype == dtype
    assert source.train.tokens().tolist() == [2, 77, size + 1, 9999, 0]
    assert source.mask_id is None


DAMAGE = {
    "tokens cut": lambda d: (d / "tokens.bin").write_bytes(b"\7" * 24),
    "documents cut": lambda d: (d / "documents.bin").write_bytes(b"\0" * 24),
    "documents other": lambda d: (d / "documents.bin").write_bytes(b"\1" + (d / "documents.bin").read_bytes()[1:]),
    "index gone": lambda d: (d / "index.json").unlink(),
    "index cut": lambda d: (d / "index.json").write_text((d / "index.json").read_text()[:-9]),
    "tokenizer gone": lambda d: (d / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_pack_is_made_anew(places, tmp_path, caplog, damage):
    section = sections(places[0], tmp_path / "cache")["trained"]
    good = open_source(section)
    tokens = good.train.tokens().tolist()
    damage(good.train.directory)
    with caplog.at_level(logging.WARNING):
        again = open_source(section)
    assert "is damaged; packing" in caplog.text
    assert again.content_hash == good.content_hash
    assert again.train.tokens().tolist() == tokens


def test_is_made_once_and_anew_when_a_file_changes(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two")
    section = DataSection(source="text", files=(str(tmp_path / "*.txt"),), cache=str(tmp_path / "cache"))
    first = open_source(section)
    monkeypatch.setattr(packed_text, "_write", None)
    assert open_source(section).content_hash == first.content_hash
    monkeypatch.undo()
    (tmp_path / "b.txt").write_text("three")
    assert open_source(section).train.num_documents == 2


def test_validation_files_need_no_separator(tmp_path):
    (tmp_path / "a.txt").write_text("one\n--\ntwo\n--\n")
    (tmp_path / "b.txt").write_text("three")
    section = DataSection(
        source="text", files=(str(tmp_path / "a.txt"),), valid_files=(str(tmp_path / "b.txt"),), separator="--",
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    source = open_source(section)
    assert (source.train.num_documents, source.valid.num_documents) == (2, 1)
    assert ByteTokenizer().decode(source.train.tokens().tolist()) == "one\ntwo\n"


def test_real_text_goes_round(real_data, tmp_path):
    section = DataSection(
        source="text", files=(str(real_data / "wikitext2_valid.txt.gz"),), separator=" \n \n", tokenizer="train",
        tokenizer_vocab=1000, cache=str(tmp_path), documents="separate",
    )  # fmt: skip
    source = open_source(section)
    bounds, tokens = source.train.documents(), source.train.tokens()
    text = [source.tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in pairwise(bounds[:51])]
    whole = gzip.decompress((real_data / "wikitext2_valid.txt.gz").read_bytes()).decode()
    expected = [document for document in whole.split(" \n \n") if document.strip()]
    assert text == expected[:50]
    assert source.train.num_documents == len(expected)
    assert len(tokens) < 0.45 * sum(len(d.encode()) for d in expected)
