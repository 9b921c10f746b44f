"""Bad data: one message that names the file and the place, or the key; and nothing half-written in the cache."""

import gzip
import json
import re
import sys

import pytest

from seqengine.config.data import DataSection
from seqengine.data import packed_text
from seqengine.data.source import open_source
from seqengine.errors import InputError

GOOD = ("one document\n" * 9 + "\n\n") * 9
LINES = "".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(20))
WORDS = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}  # fmt: skip

TEXT = {"source": "text", "files": ["{}/a.txt"], "separator": "\n\n\n"}
JSONL = {"source": "jsonl", "files": ["{}/a.jsonl"]}
BYTES = {"source": "bytes", "files": ["{}/a.raw"]}
OWN = {**TEXT, "tokenizer": "{}/t.json"}

CASES = {
    "missing file": ({**TEXT, "files": ["{}/none.txt"]}, {}, r"data\.files: .*none\.txt', which does not exist"),
    "two missing files": ({**TEXT, "files": ["{}/n.txt", "{}/m.txt"]}, {}, r"(?s)n\.txt.*does not exist.*m\.txt.*exist"),
    "pattern without a match": ({**TEXT, "files": ["{}/*.text"]}, {}, r"data\.files: every pattern must match.*\*\.text"),
    "no files": ({"source": "text"}, {}, r"data\.files: must name the files to read; got none"),
    "a directory": ({**TEXT, "files": ["{}"]}, {}, r"data\.files: must be files; .* is no regular file"),
    "missing validation file": ({**TEXT, "valid_files": ["{}/v"]}, {}, r"data\.valid_files: .*does not exist"),
    "a file in both": ({**TEXT, "valid_files": ["{}/*.txt"]}, {}, r"data\.valid_files: must be other files.*a\.txt in both"),
    "cut gzip": (TEXT, {"a.txt": gzip.compress(GOOD.encode())[:-20]}, r"a\.txt: truncated gzip file"),
    "corrupt gzip": (TEXT, {"a.txt": gzip.compress(GOOD.encode())[:-8] + b"corrupt!"}, r"a\.txt: corrupt gzip file"),
    "gzip of nonsense": (TEXT, {"a.txt": b"\x1f\x8bnonsense" * 9}, r"a\.txt: corrupt gzip file"),
    "not UTF-8": (TEXT, {"a.txt": GOOD.encode() + b"a\xffb"}, rf"a\.txt: must be UTF-8.*0xff at offset {len(GOOD) + 1}"),
    "not UTF-8 in a gzip": (
        TEXT, {"a.txt": gzip.compress(b"ab\n\n\nc\xe9d")}, r"a\.txt: must be UTF-8 text; got the byte 0xe9 at offset 6",
    ),
    "UTF-8 cut at its end": (TEXT, {"a.txt": "aλ".encode()[:-1]}, r"a\.txt: must be UTF-8.*0xce at offset 1\."),
    "UTF-16": (TEXT, {"a.txt": GOOD.encode("utf-16")}, r"a\.txt: must be UTF-8 text.*0xff at offset 0.*'bytes'"),
    "empty file": (TEXT, {"a.txt": b""}, r"a: must hold at least one document that is not empty; got none"),
    "white space": (TEXT, {"a.txt": b" \n\n\n \n"}, r"must hold at least one document"),
    "empty raw file": (BYTES, {"a.raw": b""}, r"must hold at least one document"),
    "bad JSON": (JSONL, {"a.jsonl": LINES + "{'text': 1}\n"}, r"a\.jsonl:21: every line must be a JSON object; got: Expect"),
    "cut JSON": (JSONL, {"a.jsonl": LINES[:-9]}, r"a\.jsonl:20: every line must be a JSON object; got: Untermin"),
    "JSON array": (JSONL, {"a.jsonl": LINES + "[1]\n"}, r"a\.jsonl:21: every line must be a JSON object; got list"),
    "deep JSON": (JSONL, {"a.jsonl": "[" * 100_000}, r"a\.jsonl:1: every line must be a JSON object; got"),
    "no field": (JSONL, {"a.jsonl": '{"body": "a", "id": 1}'}, r"a\.jsonl:1: .*the field 'text'; got 'body', 'id'\. Set data"),
    "field of numbers": (JSONL, {"a.jsonl": LINES + '{"text": 7}'}, r"a\.jsonl:21: the field 'text' must hold text; got int"),
    "half a pair": (JSONL, {"a.jsonl": '{"text": "a\\ud834"}'}, r"a\.jsonl:1: .*half of a surrogate pair at position 1"),
    "JSON not UTF-8": (JSONL, {"a.jsonl": b'\n{"text": "\xff"}'}, r"a\.jsonl:2: must be UTF-8 text.*0xff at offset 10 of"),
    "no separator": ({**TEXT, "separator": "\\n\\n"}, {}, r"data\.separator = .* must stand in the text; got none in 1"),
    "no separating line": ({**TEXT, "separator": "document"}, {}, r"data\.separator = 'document': must stand in the text"),
    "empty lines": (JSONL, {"a.jsonl": "\n\n"}, r"must hold at least one document"),
    "no tokenizer": (OWN, {}, r"data\.tokenizer: must be 'bytes', 'train' or a readable tokenizer.json; got .*t\.json"),
    "damaged tokenizer": (OWN, {"t.json": json.dumps(WORDS)[:-9]}, r"data\.tokenizer = '.*t\.json': must be a tokenizer"),
    "other JSON": (OWN, {"t.json": '{"a": 1}'}, r"t\.json': must be a tokenizer\.json of the tokenizers library; got"),
    "binary tokenizer": (OWN, {"t.json": b"\xff\xfe"}, r"data\.tokenizer: .*t\.json, which is not UTF-8"),
    "no end": (OWN, {"t.json": json.dumps(WORDS)}, r"must have a token that ends a document, .*Set data\.tokenizer_end"),
    "another end": ({**OWN, "tokenizer_end": "<e>"}, {"t.json": json.dumps(WORDS)}, r"ends a document, '<e>'; got none"),
    "no size": ({**TEXT, "tokenizer": "train"}, {}, r"data\.tokenizer_vocab: must be given"),
    "empty for training": (
        {**TEXT, "tokenizer": "train", "tokenizer_vocab": 300}, {"a.txt": b"\n"}, "must hold at least one document",
    ),
    "in a mixture": (
        {"source": "mixture", "mix": [BYTES, {**TEXT, "files": ["{}/x"]}]}, {}, r"data\.mix\[1\]\.files: .*does not exist",
    ),
    "genome of a mixture": (
        {"source": "mixture", "mix": [{"source": "fasta", "fasta": "{}/x.fa"}]}, {}, r"data\.mix\[0\]\.fasta: must be",
    ),
}  # fmt: skip


def filled(value, folder):
    if isinstance(value, dict):
        return {key: filled(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, folder) for item in value]
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "files"
    made.mkdir()
    (made / "a.txt").write_text(GOOD)
    (made / "a.jsonl").write_text(LINES)
    (made / "a.raw").write_bytes(bytes(range(256)) * 9)
    return made


def section(table, folder):
    return DataSection.model_validate({**filled(table, folder), "cache": str(folder.parent / "deep" / "cache")})


def refused(table, folder, message):
    with pytest.raises(InputError) as caught:
        open_source(section(table, folder))
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize(("table", "files", "message"), CASES.values(), ids=CASES.keys())
def test_is_told_and_leaves_nothing_behind(folder, table, files, message):
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    refused(table, folder, message)
    cache = folder.parent / "deep" / "cache"
    left = [p.name for p in cache.iterdir()] if cache.exists() else []
    # Of a mixture the sources before the bad one are packed; nothing is half-written.
    assert len(left) == (table.get("mix", [None])[0] is BYTES)
    assert not [name for name in left if name.startswith(".")]


def test_a_full_disk_is_told_and_leaves_nothing_behind(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_text.os, "fsync", full)
    refused(TEXT, folder, r"data\.cache: .*No space left on device.*Set data\.cache")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["files"]


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_text, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_source(section(TEXT, folder))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["files"]


@pytest.mark.parametrize(
    ("table", "seq_len", "split", "message"),
    [
        (
            TEXT,
            5000,
            "valid",
            r"needs 5001 tokens of split 'valid'; it has \d+, of 9 documents.*raise data\.valid_fraction",
        ),
        (TEXT, 5000, "train", r"split 'train'.*lower data\.seq_len to at most \d+; lower data\.valid_fraction"),
        (
            {**TEXT, "separator": ""},
            8,
            "train",
            r"'train'; it has 0, of 1 documents.*data\.separator.*data\.valid_files",
        ),
        (BYTES, 8, "train", r"'train'; it has 0, of 1 documents in all. Do one of: set data\.valid_files"),
        (TEXT, 8, "test", r"data\.source: 'text' has the splits train and valid; got 'test'"),
        ({"source": "recall"}, 8, "test", r"'recall' has the splits train and valid; got 'test'"),
        ({"source": "recall"}, 7, "train", r"data\.seq_len: RecallTask: .*length even"),
    ],
)
def test_a_split_without_a_window_says_what_to_change(folder, table, seq_len, split, message):
    source = open_source(section(table, folder))
    with pytest.raises(InputError, match=message):
        source.windows(seq_len, (split,))


HUB = {"source": "hf", "dataset": "json", "files": ["{}/a.jsonl"]}


def test_a_hub_data_set_needs_its_library_and_a_name(folder, monkeypatch):
    refused({"source": "hf"}, folder, r"data\.dataset: must name a data set when data\.source is 'hf'")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(HUB, folder, r"needs the datasets library; got none\. Run: pip install 'seqengine-train\[datasets\]'")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_data_set_is_read_and_its_mistakes_are_told(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found = open_source(section(HUB, folder))
    expected = open_source(section(JSONL, folder))
    assert found.content_hash == expected.content_hash
    assert [len(w) for w in found.windows(64).values()] == [len(w) for w in expected.windows(64).values()]
    refused(
        {**HUB, "field": "body"},
        folder,
        r"data\.dataset = 'json', split 'train': must have the field 'body'; got 'text'",
    )
    refused({**HUB, "dataset_split": "none"}, folder, r"split 'none': must be a data set that can be read; got")
