"""Sequences with classes: classes and lengths of a batch, padding, cuts, splits; what the files say is what is read."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from seqengine.config.data import DataSection
from seqengine.data.contract import Labelled
from seqengine.data.listops import evaluate
from seqengine.data.source import check_classes, open_source
from seqengine.data.stream import Stream, read_windows
from seqengine.data.tokenizer import encode, reverse_complement
from seqengine.errors import InputError
from tests.seqengine.data.sources import LABELLED, sections, write

CLASSES = {"listops": 10, "pathfinder": 2, "reviews": 2, "genomic": 3, "pictures": 10, "papers": 2}
COUNTS = {
    "listops": (60, 20), "pathfinder": (40, 10), "reviews": (24, 8), "genomic": (24, 24), "pictures": (27, 3),
    "papers": (20, 20),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    return write(folder / "files"), folder / "cache"


def opened(places, name, **changes):
    section = sections(*places)[name]
    return open_source(section.model_copy(update=changes)), section.seq_len


def whole(windows, index):
    """The sequence of a window, without its padding."""
    return windows.read(index, 0, windows.seq_len, seed=0, epoch=0, training=False)[0][: windows.length(index)]


@pytest.mark.parametrize("name", LABELLED)
def test_windows_are_sequences_with_classes_padded_on_the_right(places, name):
    source, T = opened(places, name)
    assert source.num_classes == CLASSES[name]
    found = source.windows(T)
    assert tuple(len(found[split]) for split in ("train", "valid")) == COUNTS[name]
    for windows in found.values():
        assert isinstance(windows, Labelled)
        assert windows.num_classes == CLASSES[name]
        for index in range(len(windows)):
            assert 0 <= windows.label(index) < CLASSES[name]
            length = windows.length(index)
            assert 1 <= length <= T
            ids, labels, bounds = windows.read(index, 0, T, seed=0, epoch=1, training=True)
            assert bounds is None
            assert (ids[length:] == source.pad_id).all()
            assert (ids[:length] != source.pad_id).all()
            assert (ids != source.mask_id).all()
            assert np.array_equal(labels[: length - 1], ids[1:length])
            asked = (
                length if length < T else T - 1
            )  # the end too, but of a window that is full, which may have been cut
            assert (labels[length - 1 : asked] == source.pad_id).all()
            assert (labels[asked:] == -100).all()
            assert set(ids[:length]) <= set(source.replacements) | {256 if name == "papers" else source.vocab_size - 1}
        for index in (-1, len(windows)):
            for ask in (windows.label, windows.length):
                with pytest.raises(IndexError, match="index must be in"):
                    ask(index)
    assert source.pad_id < source.vocab_size
    check_classes(source, CLASSES[name])
    check_classes(source, 0)  # pre-training on the inputs
    with pytest.raises(InputError, match=f"model.num_classes = 7 must be {CLASSES[name]}, the classes of the data"):
        check_classes(source, 7)


@pytest.mark.parametrize("name", LABELLED)
def test_every_rank_has_all_classes_and_lengths_whatever_tokens_it_reads(places, name):
    source, T = opened(places, name)
    windows = source.windows(T)
    stream = Stream(windows["train"], seed=3)
    batch = stream.batch(7, 5, begin=0, end=T)
    assert batch.classes.dtype == batch.lengths.dtype == torch.int64
    indices = [stream.window(7 + row)[1] for row in range(5)]
    assert batch.classes.tolist() == [windows["train"].label(i) for i in indices]
    assert batch.lengths.tolist() == [windows["train"].length(i) for i in indices]
    cuts = [0, 1, T // 3, T // 3, T]
    parts = [stream.batch(7, 5, begin=a, end=b) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat([part.ids for part in parts], dim=1), batch.ids)
    assert torch.equal(torch.cat([part.labels for part in parts], dim=1), batch.labels)
    rows = [stream.batch(7 + row, 1, begin=0, end=T) for row in range(5)]
    for part in (*parts, pickle.loads(pickle.dumps(stream)).batch(7, 5, begin=2, end=3)):
        assert torch.equal(part.classes, batch.classes)
        assert torch.equal(part.lengths, batch.lengths)
    assert torch.equal(torch.cat([row.classes for row in rows]), batch.classes)
    none = stream.batch(7, 0, begin=0, end=T)
    assert none.classes.shape == none.lengths.shape == (0,)
    assert none.lengths.dtype == torch.int64
    valid = read_windows(windows["valid"], [2, 0], begin=1, end=4)
    assert valid.classes.tolist() == [windows["valid"].label(2), windows["valid"].label(0)]
    assert valid.lengths.tolist() == [windows["valid"].length(2), windows["valid"].length(0)]


def test_other_windows_have_no_classes(places):
    for name in ("synthetic", "text", "recall", "mixture"):
        source, T = opened(places, name)
        batch = Stream(source.windows(T)["train"], seed=0).batch(0, 1, begin=0, end=T)
        assert source.num_classes is batch.classes is batch.lengths is None
        check_classes(source, 0)
        with pytest.raises(
            InputError, match=r"num_classes = 2 needs sequences with classes, of data.source = listops, path"
        ):
            check_classes(source, 2)


def test_generated_examples_have_the_class_that_their_tokens_say_and_splits_share_none(places):
    source, T = opened(places, "listops")
    found = source.windows(T, ("train", "valid", "test"))
    drawn = {split: [whole(windows, i).tolist() for i in range(len(windows))] for split, windows in found.items()}
    assert all(
        evaluate(ids) == found[split].label(i) for split, all_ids in drawn.items() for i, ids in enumerate(all_ids)
    )
    texts = [tuple(ids) for all_ids in drawn.values() for ids in all_ids]
    assert len(set(texts)) > 0.95 * len(texts)  # some are short enough to be drawn twice
    # The same in every epoch.
    read = [found["train"].read(3, 0, T, seed=s, epoch=e, training=True)[0].tolist() for s, e in ((0, 0), (1, 5))]
    assert read[0] == read[1]
    source, T = opened(places, "pathfinder")
    train, test = (source.windows(T, ("train", "test"))[split] for split in ("train", "test"))
    assert not np.array_equal(whole(train, 0), whole(test, 0))
    assert len(whole(train, 0)) == 256
    assert sum(train.label(i) for i in range(40)) == 20


def test_reviews_are_the_bytes_of_their_files_cut_at_the_end(places):
    source, T = opened(places, "reviews")
    windows = source.windows(T)
    for split, name in (("train", "train"), ("valid", "test")):
        paths = [p for c in ("neg", "pos") for p in sorted((places[0] / "reviews" / name / c).iterdir())]
        assert [windows[split].label(i) for i in range(len(paths))] == [int(p.parent.name == "pos") for p in paths]
        for i, path in enumerate(paths):
            assert bytes(whole(windows[split], i).tolist()) == path.read_bytes()[:T]
    assert {windows["train"].length(i) for i in range(24)} >= {20, 32}
    longer = source.windows(100)["train"]
    assert max(longer.length(i) for i in range(24)) == 60
    # Without a folder `valid` the test is both.
    assert whole(source.windows(T, ("test",))["test"], 3).tolist() == whole(windows["valid"], 3).tolist()


def test_dna_is_read_on_both_strands_in_training_alone(places):
    source, T = opened(places, "genomic")
    windows = source.windows(T)
    train = windows["train"]
    paths = [
        p for c in ("coding", "intergenic", "promoter") for p in sorted((places[0] / "genomic/train" / c).iterdir())
    ]
    strands = set()
    for i, path in enumerate(paths):
        forward = encode(path.read_text().strip())[:T]
        assert np.array_equal(whole(train, i), forward)
        for epoch in range(4):
            read = train.read(i, 0, T, seed=1, epoch=epoch, training=True)[0][: len(forward)]
            is_forward = np.array_equal(read, forward)
            strands.add(is_forward)
            assert is_forward or np.array_equal(read, reverse_complement(forward))
    assert strands == {True, False}
    one, _ = opened(places, "genomic", rc_prob=0.0)
    read = one.windows(T)["train"].read(0, 0, T, seed=1, epoch=0, training=True)[0]
    assert np.array_equal(read[: train.length(0)], whole(train, 0))
    hidden, _ = opened(places, "genomic", soft_mask="unk")
    assert (hidden.windows(T)["train"].read(0, 0, T, seed=0, epoch=0, training=False)[0] == 6).any()
    assert hidden.content_hash != source.content_hash
    assert not np.array_equal(whole(windows["valid"], 0), whole(source.windows(T, ("test",))["test"], 0))


def test_pictures_are_luma_and_the_last_tenth_or_named_files_are_validation(places):
    source, T = opened(places, "pictures")
    windows = source.windows(T, ("train", "valid", "test"))
    folder = places[0] / "cifar"
    records = [
        np.frombuffer((folder / f"data_batch_{i}.bin").read_bytes(), np.uint8).reshape(-1, 3073) for i in range(1, 6)
    ]
    all_records = np.concatenate(records)
    for split, first in (("train", 0), ("valid", 27)):
        for i in range(len(windows[split])):
            red, green, blue = all_records[first + i, 1:].reshape(3, -1).astype(float)
            luma = 0.299 * red + 0.587 * green + 0.114 * blue
            assert np.abs(whole(windows[split], i) - luma).max() <= 0.5 + 1e-9
            assert windows[split].label(i) == all_records[first + i, 0]
    assert len(windows["test"]) == 6
    named, _ = opened(places, "pictures", valid_files=("data_batch_2.bin", str(folder / "test_batch.bin")))
    found = named.windows(T)
    assert (len(found["train"]), len(found["valid"])) == (24, 12)
    assert [found["valid"].label(i) for i in range(6)] == records[1][:, 0].tolist()
    assert [found["train"].label(6 + i) for i in range(6)] == records[2][:, 0].tolist()
    assert named.content_hash != source.content_hash
    padded = source.windows(1030)["valid"]
    assert padded.length(0) == 1024


def test_pairs_are_both_texts_each_cut_to_half(places):
    source, T = opened(places, "papers")
    for split, name in (("train", "train"), ("valid", "eval"), ("test", "test")):
        lines = (places[0] / "papers" / f"new_aan_pairs.{name}.tsv").read_bytes().splitlines()
        for seq_len, half in ((T, 15), (31, 15), (3, 1), (200, 99)):
            windows = source.windows(seq_len, (split,))[split]
            for i, line in enumerate(lines):
                label, _, _, first, second = line.split(b"\t")
                assert whole(windows, i).tolist() == [*first[:half], 256, *second[:half]]
                assert windows.label(i) == int(float(label))


@pytest.mark.parametrize("name", ["reviews", "pictures", "papers"])
def test_a_damaged_pack_is_packed_again_and_changed_files_make_another(tmp_path, name):
    folder = write(tmp_path / "files")
    section = sections(folder, tmp_path / "cache")[name]
    expected = open_source(section).content_hash
    entries = sorted((tmp_path / "cache").iterdir())
    (entries[0] / "classes.bin").write_bytes(b"")
    assert open_source(section).content_hash == expected
    assert sorted((tmp_path / "cache").iterdir()) == entries
    (entries[0] / "index.json").unlink()
    assert open_source(section).content_hash == expected
    changed = {
        "reviews": folder / "reviews/train/pos/1_7.txt", "pictures": folder / "cifar/data_batch_3.bin",
        "papers": folder / "papers/new_aan_pairs.train.tsv",
    }[name]  # fmt: skip
    data = bytearray(changed.read_bytes())
    data[-1 if name != "papers" else -3] ^= 64
    Path(changed).write_bytes(bytes(data))
    assert open_source(section).content_hash != expected


def test_settings_of_generated_data_are_their_hash(places):
    base = sections(*places)["listops"]
    hashes = [open_source(base).content_hash]
    for change in ({"seed": 2}, {"examples": 61}, {"max_depth": 5}):
        hashes.append(
            open_source(
                DataSection.model_validate(base.model_dump() | {"listops": base.listops.model_dump() | change})
            ).content_hash
        )
    assert len(set(hashes)) == 4
