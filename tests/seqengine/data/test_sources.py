"""What every source keeps: whole windows from any cut, the same in every process, cache and number of threads."""

import multiprocessing
import pickle
import random
import shutil
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from seqengine.data.contract import Labelled
from seqengine.data.masking import mask_tokens
from seqengine.data.prefetch import AHEAD, Reader, Request
from seqengine.data.source import check_vocabulary, open_source
from seqengine.data.stream import Stream, read_windows
from seqengine.errors import InputError
from tests.seqengine.data.sources import LABELLED, sections, write

NAMES = (
    "synthetic", "text", "separate", "trained", "trained apart", "jsonl", "bytes", "recall", "induction", "mixture", *LABELLED,
)  # fmt: skip
T = 32


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return write(folder / "files"), folder / "cache"


@pytest.fixture(params=NAMES)
def section(places, request):
    return sections(*places)[request.param]


def equal(a, b):
    """Windows as they are read, or batches."""
    arrays = [i for i in range(len(a)) if i != 2]
    return len(a) == len(b) and a[2] == b[2] and all(np.array_equal(a[i], b[i]) for i in arrays)


def test_any_cut_of_a_window_put_together_is_the_window(section):
    source, T = open_source(section), section.seq_len
    pick = random.Random(1)
    for windows in source.windows(T).values():
        assert windows.seq_len == T
        assert len(windows) > 0
        for index in {0, len(windows) - 1, *(pick.randrange(len(windows)) for _ in range(20))}:
            for training in (True, False):
                how = {"seed": 3, "epoch": 2, "training": training}
                whole = windows.read(index, 0, T, **how)
                assert equal(whole, windows.read(index, 0, T, **how))
                assert whole[0].shape == whole[1].shape == (T,)
                assert 0 <= whole[0].min() <= whole[0].max() < source.vocab_size
                asked = whole[1][whole[1] != -100]
                assert all(asked >= 0)
                assert all(asked < source.vocab_size)
                cuts = [0, *sorted(pick.randint(0, T) for _ in range(3)), T]
                parts = [windows.read(index, a, b, **how) for a, b in pairwise(cuts)]
                joined = *(np.concatenate([part[i] for part in parts]) for i in (0, 1)), parts[0][2]
                assert equal(joined, whole)
                assert {part[2] for part in parts} == {whole[2]}
        for index in (-1, len(windows)):
            with pytest.raises(IndexError, match="index must be in"):
                windows.read(index, 0, T, seed=0, epoch=0, training=True)
        with pytest.raises(ValueError, match="needs 0 <= begin <= end"):
            windows.read(0, 0, T + 1, seed=0, epoch=0, training=True)


def test_a_label_is_the_next_input_unless_nothing_is_asked(section):
    T = section.seq_len
    for windows in open_source(section).windows(T).values():
        for index in range(len(windows)):
            inputs, labels, bounds = windows.read(index, 0, T, seed=0, epoch=0, training=False)
            if section.source in ("recall", "induction", "mixture"):
                continue
            moved = labels[:-1] == inputs[1:]
            ends = np.zeros(T, dtype=bool)
            if bounds is not None:
                assert bounds[0] == 0
                assert bounds[-1] == T
                assert list(bounds) == sorted(set(bounds))
                ends[np.array(bounds[1:-1], dtype=int) - 1] = True
            if isinstance(windows, Labelled):
                ends[windows.length(index) :] = True  # the first padding stands for the end
                assert labels[-1] == -100
            assert np.array_equal(moved, ~ends[:-1])
            assert all(labels[:-1][ends[:-1]] == -100)


def test_the_same_from_the_cache_from_a_pickle_and_from_elsewhere(places, section, tmp_path):
    first, T = open_source(section), section.seq_len
    again = open_source(section)
    folder = tmp_path / "moved"
    shutil.copytree(places[0], folder)
    name = next(n for n, s in sections(*places).items() if s == section)
    moved = open_source(sections(folder, tmp_path / "cache")[name])
    assert first.content_hash == again.content_hash == moved.content_hash
    assert len(first.content_hash) == 64
    streams = [Stream(s.windows(T)["train"], seed=7) for s in (first, again, moved)]
    streams.append(pickle.loads(pickle.dumps(streams[0])))
    for sample in range(0, 150, 7):
        batches = [stream.batch(sample, 1, begin=0, end=T) for stream in streams]
        assert all(equal(batches[0], other) for other in batches[1:])
        assert batches[0].ids.dtype == batches[0].labels.dtype == torch.int64
    valid = [read_windows(s.windows(T)["valid"], [1], begin=3, end=9) for s in (first, moved)]
    assert equal(*valid)


def test_hashes_of_different_data_differ(places):
    found = {name: open_source(section).content_hash for name, section in sections(*places).items()}
    # What documents and validation mean is of the config, and the same documents may lie in files of two kinds.
    assert found.pop("separate") == found["text"]
    assert found.pop("jsonl") == found["text"]
    assert len(set(found.values())) == len(found)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", ["separate", "trained apart"])
def test_processes_that_open_at_the_same_time_pack_once(places, tmp_path, name):
    cache = tmp_path / "cache"
    section = sections(places[0], cache)[name]
    expected = open_source(sections(*places)[name]).content_hash
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.SimpleQueue()

    def child():
        barrier.wait()
        source = open_source(section)
        queue.put((source.content_hash, [len(w) for w in source.windows(T).values()]))

    processes = [context.Process(target=child) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    queue.close()
    assert found == [found[0]] * 3
    assert found[0][0] == expected
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def requests(count, rows=1):
    return (Request(first=rows * i, rows=rows, begin=4, end=20) for i in range(count))


@pytest.mark.parametrize("name", ["synthetic", "separate", "mixture"])
def test_any_number_of_workers_reads_the_same_batches(places, name):
    windows = open_source(sections(*places)[name]).windows(T)["train"]
    expected = None
    for workers in (0, 1, 4):
        with Reader(Stream(windows, seed=5), workers=workers) as reader:
            # Over several epochs, whose orders the threads share; in two parts, as before and after an evaluation.
            found = [*reader.batches(requests(120)), *reader.batches(requests(250))]
        expected = expected or found
        assert len(found) == 370
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not [t for t in threading.enumerate() if t.name.startswith("seqengine-data")]


class Broken:
    """A stream whose sample 5 cannot be read."""

    def batch(self, first, rows, *, begin, end):
        if first == 5:
            raise InputError("sample 5")
        return first


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_error_comes_at_its_turn(workers):
    def failing():
        yield from requests(3)
        raise KeyError("asking")

    for what, error, count in ((requests(9), InputError, 5), (failing(), KeyError, 3)):
        found = []
        with Reader(Broken(), workers=workers) as reader, pytest.raises(error):  # noqa: PT012
            for batch in reader.batches(what):
                found.append(batch)
        assert found == list(range(count))


def test_reading_ahead_has_a_bound_and_an_end():
    asked = []

    def endless():
        for request in requests(10**9):
            asked.append(request.first)
            yield Request(request.first + 6, 1, 0, 1)

    reader = Reader(Broken(), workers=3)
    batches = reader.batches(endless())
    assert [next(batches) for _ in range(4)] == [6, 7, 8, 9]
    assert len(asked) == 4 + AHEAD * 3
    batches.close()
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        next(reader.batches(endless()))
    with pytest.raises(ValueError, match="workers must be at least 0"):
        Reader(Broken(), workers=-1)


def test_windows_with_documents_come_one_at_a_time(places):
    stream = Stream(open_source(sections(*places)["separate"]).windows(T)["train"], seed=0)
    with pytest.raises(ValueError, match="read one at a time; got 2 rows"):
        stream.batch(0, 2, begin=0, end=T)
    assert stream.batch(0, 0, begin=0, end=T).documents is None


def test_masks_hide_tokens_of_every_source_that_has_one(places):
    for name, section in sections(*places).items():
        source = open_source(section)
        assert (source.mask_id is None) == (source.replacements is None)
        if source.mask_id is None:
            assert name in ("recall", "induction", "mixture")
            continue
        assert source.mask_id < source.vocab_size
        assert max(source.replacements) < source.vocab_size
        T = section.seq_len
        batch = Stream(source.windows(T)["train"], seed=0).batch(0, 1, begin=0, end=T)
        inputs, labels = mask_tokens(
            batch.ids, torch.tensor([3]), torch.arange(T), 0.9, mask_id=source.mask_id, replacements=source.replacements
        )
        assert torch.equal(torch.where(labels == -100, inputs, labels), batch.ids)
        assert bool((inputs == source.mask_id).any())


def test_a_model_with_too_few_ids_is_refused(places):
    source = open_source(sections(*places)["jsonl"])
    check_vocabulary(source, 258)
    with pytest.raises(InputError, match=r"model\.vocab_size = 257 must be at least 258.*set model\.vocab_size = 258"):
        check_vocabulary(source, 257)


def test_examples_are_new_in_every_epoch_and_apart_from_validation(places):
    windows = open_source(sections(*places)["recall"]).windows(T)
    train, valid = windows["train"], windows["valid"]

    def read(part, epoch, training=True):
        return {part.read(i, 0, T, seed=0, epoch=epoch, training=training)[0].tobytes() for i in range(len(part))}

    drawn = [read(train, 0), read(train, 1), read(valid, 0), read(train, 2)]
    assert len(set.union(*drawn)) == 40 + 40 + 5 + 40
    assert read(valid, 0) == read(valid, 3) == read(valid, 0, training=False)
