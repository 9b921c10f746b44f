"""Bad labelled data: one message that names the file, the line or the key; and nothing half-written in the cache."""

import re
import shutil

import pytest

from seqengine.config.data import DataSection
from seqengine.config.data_checks import DATA_CHECKS
from seqengine.config.load import load
from seqengine.config.model import ModelConfig
from seqengine.config.sections import TrainSection
from seqengine.data import packed_sequences
from seqengine.data.source import open_source
from seqengine.errors import InputError
from tests.seqengine.data.sources import write

REVIEWS = {"source": "class_folders", "folder": "{}/reviews", "classes": ["neg", "pos"]}
DNA = {"source": "class_folders", "folder": "{}/genomic", "alphabet": "dna"}
CIFAR = {"source": "cifar10", "folder": "{}/cifar"}
AAN = {"source": "aan", "folder": "{}/papers"}
LINE = b"1.0\t7\t8\tone text\tanother\n"
TRAIN = "papers/new_aan_pairs.train.tsv"

CASES = {
    "no folder named": ({"source": "aan"}, {}, r"data\.folder: must name the folder .* 'aan'; got nothing\. Set it"),
    "no folder": ({**REVIEWS, "folder": "{}/x"}, {}, r"data\.folder: must be a folder; got '.*/x', which does not exist"),
    "a file": ({**CIFAR, "folder": "{}/a.txt"}, {}, r"data\.folder: must be a folder; got '.*/a\.txt', which is no folder"),
    "no splits": ({**REVIEWS, "folder": "{}/papers"}, {}, r"must hold a folder train, .*; its folders are: none\."),
    "no validation": ({**REVIEWS}, {"reviews/test": None}, r"must hold a folder valid or test, .* folders are: train\."),
    "other classes": ({**REVIEWS, "classes": []}, {}, r"train has neg, pos, unsup; test has neg, pos\. Name .* data\.classes"),
    "unknown class": ({**REVIEWS, "classes": ["neg", "po"]}, {}, r"data\.classes: .*train must hold .* and not po\."),
    "one class": ({**REVIEWS, "classes": ["neg"]}, {}, r"must hold at least two folders of classes; got neg\."),
    "class without files": (
        REVIEWS, {"reviews/test/neg": None, "reviews/test/neg/.hidden": b"x"}, r"test/neg: the folder .* hold its sequences",
    ),
    "a folder in a class": (DNA, {"genomic/train/coding/more/1.txt": b"ACGT"}, r"coding: .* hold files only, .* got 'more'"),
    "empty file": (REVIEWS, {"reviews/train/pos/2_7.txt": b""}, r"pos/2_7\.txt: must hold a sequence; got an empty file"),
    "white space of DNA": (DNA, {"genomic/valid/coding/2.txt": b" \n"}, r"coding/2\.txt: must hold a sequence; got an empty"),
    "protein": (
        DNA, {"genomic/train/coding/2.txt": b"\nACGTRYNEACGT\n"}, r"2\.txt: every letter .* got 'E' at position 8\. Mend the",
    ),
    "FASTA": (DNA, {"genomic/train/coding/2.txt": b">chr1\nACGT\n"}, r"got '>' at position 1"),
    "missing batches": (
        CIFAR, {"cifar/data_batch_2.bin": None, "cifar/data_batch_5.bin": None}, r"missing: data_batch_2\.bin, data_batch_5",
    ),
    "missing validation batch": ({**CIFAR, "valid_files": ["x.bin"]}, {}, r"data\.valid_files: .* missing: x\.bin"),
    "all is validation": (
        {**CIFAR, "valid_files": [f"data_batch_{i}.bin" for i in range(1, 6)]}, {}, r"data\.valid_files: must leave a file",
    ),
    "wrong size": (CIFAR, {"cifar/data_batch_3.bin": b"\1" * 3072}, r"data_batch_3\.bin: .* pictures of 3073 bytes.*got 3072"),
    "empty batch": (CIFAR, {"cifar/data_batch_3.bin": b""}, r"data_batch_3\.bin: .* got 0 bytes"),
    "wrong class": (
        CIFAR, {"cifar/data_batch_4.bin": bytes(3073) + b"\x0b" + bytes(3072)}, r"_4\.bin: every .* got 11 for picture 1\.",
    ),
    "few columns": (AAN, {TRAIN: LINE * 3 + b"1.0\t7\t8\tone text\n" + LINE}, r"train\.tsv:4: a line must have 5 col.*got 4"),
    "a tab in a text": (AAN, {TRAIN: LINE + b"0\t1\t2\ta\tb\tc\n"}, r"train\.tsv:2: .* got 6\. Mend the line"),
    "empty line": (AAN, {TRAIN: LINE + b"\n" + LINE}, r"train\.tsv:2: .* got 1\. Mend the line"),
    "other label": (AAN, {TRAIN: b"label\tid1\tid2\ttext1\ttext2\n" + LINE}, r"train\.tsv:1: the label must be 0 or 1; got"),
    "empty pairs": (AAN, {"papers/new_aan_pairs.eval.tsv": b""}, r"eval\.tsv: must hold lines .*; got an empty file"),
    "missing pairs": (AAN, {"papers/new_aan_pairs.eval.tsv": None}, r"missing: new_aan_pairs\.eval\.tsv"),
    "out of reach": ({"source": "listops", "listops": {"max_depth": 2}}, {}, r"data\.listops: ListOps: needs 4 <= min_length"),
    "in a mixture": (
        {"source": "mixture", "mix": [{"source": "recall"}, AAN]}, {}, r"data\.mix\[1\]\.source: a mixture must not hold",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "files")


def filled(value, folder):
    if isinstance(value, dict):
        return {key: filled(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, folder) for item in value]
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


def section(table, folder, **more):
    return DataSection.model_validate({**filled(table, folder), "cache": str(folder.parent / "deep" / "cache"), **more})


@pytest.mark.parametrize(("table", "files", "message"), CASES.values(), ids=CASES.keys())
def test_is_told_and_nothing_is_half_written(good, tmp_path, table, files, message):
    folder = tmp_path / "files"
    shutil.copytree(good, folder)
    for name, data in files.items():
        path = folder / name
        if data is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_source(section(table, folder))
    assert re.search(message, str(caught.value)), caught.value
    cache = tmp_path / "deep" / "cache"
    left = [p.name for p in cache.iterdir()] if cache.exists() else []
    assert not [name for name in left if name.startswith(".")]
    assert len(left) <= 1  # the training split, whole, where validation is bad


def test_a_full_disk_is_told_and_leaves_nothing_behind(good, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "files"
    shutil.copytree(good, folder)
    monkeypatch.setattr(packed_sequences.os, "fsync", full)
    with pytest.raises(InputError, match=r"data\.cache: .*No space left on device.*Set data\.cache"):
        open_source(section(REVIEWS, folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files"]


@pytest.mark.parametrize(
    ("table", "seq_len", "split", "message"),
    [
        (CIFAR, 1023, "train", r"data\.seq_len = 1023 must be at least 1024"),
        (AAN, 2, "train", r"data\.seq_len = 2 must be at least 3"),
        (
            {"source": "listops"},
            1999,
            "valid",
            r"data\.seq_len = 1999 must be at least 2000, the longest example of 'listops'",
        ),
        (
            {"source": "pathfinder"},
            1000,
            "train",
            r"at least 1024, the longest example of 'pathfinder'.*data\.pathfinder",
        ),
        ({"source": "pathfinder"}, 1024, "dev", r"'pathfinder' has the splits train, valid, test; got 'dev'"),
        (REVIEWS, 8, "dev", r"the splits are train, valid and test; got 'dev'"),
    ],
)
def test_windows_that_cannot_be_say_what_to_change(good, tmp_path, table, seq_len, split, message):
    source = open_source(section(table, good, cache=str(tmp_path)))
    with pytest.raises(InputError, match=message):
        source.windows(seq_len, (split,))


def problems(data, **model):
    sections = {"data": DataSection.model_validate(data), "train": TrainSection()}
    sections["model"] = ModelConfig.model_validate({"arch": "lm", "vocab_size": 300, **model})
    return [p for needs, check in DATA_CHECKS for p in check(*(sections[name] for name in needs))]


LONG = {"seq_len": 2048}
CONFIGS = [
    ({"source": "text", "folder": "a"}, {}, r"data\.folder would not be read, because .*set data\.source = 'class_folders' or"),
    ({**CIFAR, **LONG, "alphabet": "dna"}, {}, r"data\.alphabet would not be read, because data\.source = 'cifar10'"),
    ({**AAN, **LONG, "classes": ["a"]}, {}, r"data\.classes would not be read"),
    ({**REVIEWS, "valid_files": ["a"]}, {}, r"data\.valid_files would not be read.* or 'cifar10'"),
    ({**REVIEWS, "documents": "separate"}, {}, r"data\.documents = 'separate' is for .*'class_folders', where an example"),
    ({"source": "listops", "seq_len": 1024}, {}, r"data\.seq_len = 1024 must be at least 2000.* or change data\.listops\.max"),
    ({"source": "listops", "listops": {"min_length": 3}, **LONG}, {}, r"min_length = 3 must be from 4 to .*max_length = 2000"),
    ({"source": "pathfinder", "pathfinder": {"size": 64}}, {}, r"must be at least 4096.* or change data\.pathfinder\.size"),
    ({**CIFAR, "seq_len": 512}, {}, r"data\.seq_len = 512 must be at least 1024, the tokens of a whole sequence of 'cifar10'"),
    (
        {**CIFAR, **LONG, "stages": [{"seq_len": 512, "tokens": 512}, {"seq_len": 2048}]}, {},
        r"data\.stages\[0\]\.seq_len = 512 must be at least 1024",
    ),
    ({"source": "listops", **LONG}, {"vocab_size": 16}, r"vocab_size = 16 must be at least 17, digits, operators, the padding"),
    ({**AAN, **LONG}, {"vocab_size": 258}, r"must be at least 259, 256 bytes, the separator of two texts"),
    (REVIEWS, {"vocab_size": 257}, r"must be at least 258, 256 bytes or gray levels, the padding and the mask"),
    (DNA, {"vocab_size": 11}, r"must be at least 12, the symbols of the DNA alphabet"),
    ({"source": "listops", **LONG}, {"num_classes": 2}, r"model\.num_classes = 2 must be 10, the classes of 'listops'"),
    ({**AAN, **LONG}, {"num_classes": 10}, r"model\.num_classes = 10 must be 2, the classes of 'aan'"),
    ({"source": "recall"}, {"num_classes": 2}, r"num_classes = 2 needs .*'recall'; set data\.source to one of listops, path"),
    ({"source": "mixture", "mix": [{"source": "recall"}, REVIEWS]}, {}, r"data\.mix\[1\]\.source = 'class_folders': a mixture"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "model", "message"), CONFIGS)
def test_what_cannot_work_is_told_by_its_key(data, model, message):
    found = problems(data, **model)
    assert len(found) == 1
    assert re.search(message, found[0].text), found[0].text


@pytest.mark.parametrize(
    ("data", "model"),
    [
        ({"source": "listops", **LONG}, {"vocab_size": 17, "num_classes": 10}),
        ({"source": "listops", **LONG}, {"vocab_size": 17}),
        ({"source": "pathfinder"}, {"vocab_size": 258, "num_classes": 2}),
        ({**CIFAR, "valid_files": ["data_batch_5.bin"]}, {"num_classes": 10}),
        ({**AAN, **LONG}, {"vocab_size": 259, "num_classes": 2}),
        (REVIEWS, {"vocab_size": 258, "num_classes": 2}),
        (DNA, {"vocab_size": 12, "num_classes": 3}),
    ],
)
def test_what_works_is_let_through(data, model):
    assert problems(data, **model) == []
    assert DataSection.model_validate(data).is_given
    assert "folder" not in data or not DataSection.model_validate({"source": data["source"]}).is_given


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.alphabet=rna", r"data\.alphabet: must be 'bytes' or 'dna'"),
        ("data.listops.max_args=1", r"data\.listops\.max_args: must be a whole number of at least 2"),
        ("data.pathfinder.size=8", r"data\.pathfinder\.size: must be a whole number of at least 16"),
        ("data.listops.lenght=8", r"data\.listops\.lenght: unknown key; "),
    ],
)
def test_a_wrong_value_is_told(tmp_path, override, message):
    (tmp_path / "run.toml").write_text("train.steps = 1\n")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "run.toml", [override], need_data=False)
