"""[data]: what cannot work is told before anything is read, and what the page shows is valid."""

import re
import tomllib
from pathlib import Path

import pytest

from seqengine.config.data import DataSection
from seqengine.config.data_checks import DATA_CHECKS
from seqengine.config.load import load
from seqengine.config.model import ModelConfig
from seqengine.config.sections import TrainSection
from seqengine.config.write import dump
from seqengine.errors import InputError

PAGE = Path(__file__).parent.parent.parent / "docs" / "data.md"
TEXT = {"source": "text", "files": ["a.txt"]}
MIX = {"source": "mixture", "mix": [{**TEXT, "weight": 2}, {"source": "synthetic"}]}


def problems(data, vocab_size=300, micro_batch="auto"):
    sections = {
        "data": DataSection.model_validate(data),
        "model": ModelConfig(vocab_size=vocab_size),
        "train": TrainSection(micro_batch=micro_batch),
    }
    return [p for needs, check in DATA_CHECKS for p in check(*(sections[name] for name in needs))]


GOOD = [
    {}, TEXT, MIX, {"source": "fasta", "fasta": "a.fa", "bed": "a.bed"}, {"source": "induction"},
    {**TEXT, "documents": "separate", "tokenizer": "train", "tokenizer_vocab": 300},
    {**TEXT, "tokenizer": "t.json", "tokenizer_end": "</s>", "valid_files": ["b"], "separator": "\n\n"},
    {"source": "hf", "dataset": "json", "files": ["a.jsonl"], "dataset_valid_split": "test"},
    {"source": "recall", "seq_len": 40, "stages": [{"seq_len": 6, "tokens": 600}, {"seq_len": 40}]},
]  # fmt: skip


@pytest.mark.parametrize("data", GOOD)
def test_what_works_is_let_through(data):
    assert problems(data) == []


BAD = [
    ({"source": "text", "fasta": "a.fa"}, {}, r"data\.fasta would not be read, because data\.source = 'text'"),
    ({"files": ["a"], "dataset": "x"}, {}, r"data\.files and data\.dataset would not be read, because .* 'fasta'; delete"),
    ({"source": "recall", "files": ["a"]}, {}, r"set data\.source = 'text' or 'jsonl' or 'hf' or 'bytes'"),
    ({**MIX, "files": ["a"]}, {}, r"data\.files would not be read, because data\.source = 'mixture'"),
    ({**TEXT, "mix": [TEXT]}, {}, r"data\.mix would not be read, because data\.source = 'text'"),
    ({"source": "mixture", "mix": [{**TEXT, "bed": "x"}]}, {}, r"data\.mix\[0\]\.bed would not be read"),
    ({"bed": "x.bed"}, {}, r"data\.bed = 'x\.bed' needs data\.fasta"),
    ({"source": "mixture"}, {}, r"data\.mix: a mixture needs its sources, got none"),
    ({"source": "mixture", "mix": [MIX["mix"][0], {"source": "mixture"}]}, {}, r"data\.mix\[1\]\.source = 'mixture': a mix"),
    ({**MIX, "mix": [{**TEXT, "weight": 1e-4}, TEXT]}, {}, r"data\.mix\[0\]\.weight = 0\.0001 must be at least 1/1000"),
    ({"source": "bytes", "tokenizer": "t.json"}, {}, r"data\.tokenizer = 't\.json' would not be read"),
    ({**TEXT, "tokenizer": "train"}, {}, r"data\.tokenizer = 'train' needs data\.tokenizer_vocab"),
    ({**TEXT, "tokenizer_vocab": 300}, {}, r"data\.tokenizer_vocab is the size of a tokenizer to be trained"),
    ({**TEXT, "tokenizer_end": "</s>"}, {}, r"data\.tokenizer_end is a token of a tokenizer\.json, got .* 'bytes'"),
    ({"documents": "separate"}, {}, r"data\.documents = 'separate' is for .* 'fasta', where a record is never"),
    ({"source": "recall", "documents": "separate"}, {}, r"data\.documents = 'separate' .* an example is a window"),
    ({**TEXT, "documents": "separate"}, {"micro_batch": 2}, r"train\.micro_batch = 2 must be 1 with documents = 'separate'"),
    ({"source": "recall", "seq_len": 7}, {}, r"data\.seq_len = 7 must be even and at least 6.*set it to 8"),
    ({**TEXT, "tokenizer": "bytes"}, {"vocab_size": 256}, r"model\.vocab_size = 256 must be at least 258"),
    ({}, {"vocab_size": 4}, r"model\.vocab_size = 4 must be at least 12, the symbols of the DNA alphabet"),
    ({"source": "recall", "recall": {"vocab": 40}}, {"vocab_size": 40}, r"must be at least 41, the symbols of the task"),
    ({**TEXT, "tokenizer": "train", "tokenizer_vocab": 400}, {}, r"must be at least 400, data\.tokenizer_vocab; set"),
    (MIX, {"vocab_size": 100}, r"model\.vocab_size = 100 must be at least 258"),
    ({"source": "synthetic", "synthetic": {"length": 5000}}, {}, r"data\.synthetic\.length = 5000 .* at least 20501"),
    ({"source": "synthetic", "synthetic": {"length": 99, "lag": 100}, "seq_len": 2}, {}, r"lag = 100 must be below"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "others", "message"), BAD)
def test_what_cannot_work_is_told_by_its_key(data, others, message):
    found = problems(data, **others)
    assert len(found) == 1
    assert re.search(message, found[0].text), found[0].text
    assert all(key.split(".")[0] in ("data", "model", "train") for key in found[0].keys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=txt", r"data\.source: must be 'fasta', 'synthetic', 'text', 'jsonl', 'hf', 'bytes', 'recall'"),
        ("data.workers=-1", r"data\.workers: must be a whole number of at least 0, got -1"),
        ("data.tokenizer_vocab=100", r"data\.tokenizer_vocab: must be a whole number of at least 258"),
        ("data.recall.vocab=5", r"data\.recall\.vocab"),
        ("data.files='a.txt'", r"data\.files: must be an array of text in quotes, got 'a\.txt'"),
        ("data.mix=[{source='text', weight=0}]", r"data\.mix\[0\]\.weight: must be a number above 0, got 0"),
        ("data.mix=[{seq_len=8}]", r"data\.mix\[0\]\.seq_len: unknown key; did you mean 'data\.seq_len'"),
        ("data.stages=[{seq_len=8}, {seq_len=16}]", r"data\.stages\[0\]\.tokens: missing"),
    ],
)
def test_a_wrong_key_or_value_is_told(tmp_path, override, message):
    (tmp_path / "run.toml").write_text("train.steps = 1\n")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "run.toml", [override], need_data=False)
    assert re.search(message, str(caught.value)), caught.value


def test_data_may_be_left_to_the_command_line():
    given = [{"fasta": "a"}, {"source": "synthetic"}, TEXT, MIX, {"source": "hf", "dataset": "x"}, {"source": "recall"}]
    missing = [{}, {"source": "text"}, {"source": "hf"}, {"source": "mixture"}, {**MIX, "mix": [TEXT, {}]}]
    assert all(DataSection.model_validate(table).is_given for table in given)
    assert not any(DataSection.model_validate(table).is_given for table in missing)
    assert DataSection.model_validate({**MIX, "mix": [{**TEXT, "documents": "separate"}]}).has_documents
    assert not DataSection.model_validate(MIX).has_documents


BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_what_the_page_shows_is_valid_and_reads_back(tmp_path, block):
    assert len(BLOCKS) >= 4
    (tmp_path / "run.toml").write_text(block)
    loaded = load(tmp_path / "run.toml", [], need_data=False)
    vocab = tomllib.loads(block).get("model", {}).get("vocab_size", 12)
    assert problems(tomllib.loads(block)["data"], vocab_size=vocab) == []
    (tmp_path / "again.toml").write_text(dump(loaded))
    assert load(tmp_path / "again.toml", [], need_data=False).config == loaded.config
