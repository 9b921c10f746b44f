"""Mixtures: exact shares, a pure function of the sample number, and each source read as it would be alone."""

from collections import Counter

import numpy as np
import pytest

from seqengine.config.data import DataSection
from seqengine.data.mixture import PERIOD, MixedOrder, MixedWindows, MixtureSource, shares
from seqengine.data.order import Shuffle
from seqengine.data.source import open_source
from seqengine.data.stream import Stream
from seqengine.errors import InputError
from tests.seqengine.data.sources import sections, write


class Numbers:
    """Windows of one source: each reads as (source, index, epoch, seed)."""

    seq_len = 4

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def read(self, index, begin, end, *, seed, epoch, training):
        assert 0 <= index < self.count
        ids = np.array([self.name, index, epoch, seed])[begin:end]
        return ids, ids, None


def mixed(counts, weights):
    return MixedWindows([Numbers(i, count) for i, count in enumerate(counts)], shares(weights))


def test_shares_are_the_nearest_slots():
    assert shares([1.0]) == (1000,)
    assert shares([0.7, 0.2, 0.1]) == (700, 200, 100)
    assert shares([1.0, 1.0, 1.0]) == (334, 333, 333)
    assert shares([3.0, 1.0]) == (750, 250)
    assert shares([1.0, 1e-9, 1.0]) == (500, 1, 499)
    assert shares([1.0] * PERIOD) == (1,) * PERIOD
    random = np.random.default_rng(0)
    for _ in range(300):
        weights = random.exponential(size=random.integers(1, 20)) + 0.02
        slots = shares(list(weights))
        assert sum(slots) == PERIOD
        assert np.abs(np.array(slots) - weights / weights.sum() * PERIOD).max() < 1 + 1e-9
    for bad in ([], [1.0, 0.0], [1.0] * (PERIOD + 1)):
        with pytest.raises(ValueError, match="needs 1 to 1000 weights above 0"):
            shares(bad)


def test_every_period_has_exactly_the_shares_in_an_order_of_its_own():
    order = mixed([5, 50, 500], [0.5, 0.3, 0.2]).order(3)
    drawn = [[order.place(p * PERIOD + i)[0] for i in range(PERIOD)] for p in range(4)]
    assert all(Counter(d) == {0: 500, 1: 300, 2: 200} for d in drawn)
    assert len({tuple(d) for d in drawn}) == 4
    # Not in runs: any hundred samples are near the shares too.
    counts = [d[i : i + 100].count(0) for d in drawn for i in range(0, PERIOD, 100)]
    assert min(counts) > 25
    assert max(counts) < 75


def test_each_source_is_read_as_it_would_be_alone():
    """The samples of a source, in their order, are the numbers 0, 1, 2, .. of its own shuffle."""
    windows = mixed([7, 50, 3], [0.5, 0.3, 0.2])
    order = windows.order(3)
    found = {0: [], 1: [], 2: []}
    for sample in range(3 * PERIOD):
        source, number = order.place(sample)
        assert number == len(found[source])
        epoch, index = order.window(sample)
        assert windows.source_of(index) == source
        found[source].append((epoch, index - windows.first_index[source]))
    for source, drawn in found.items():
        count = len(windows.parts[source])
        for epoch in range(len(drawn) // count):
            part = drawn[epoch * count : (epoch + 1) * count]
            assert {e for e, _ in part} == {epoch}
            assert sorted(i for _, i in part) == list(range(count))
    assert len({tuple(part[:50]) for part in found.values()}) == 3


def test_a_sample_is_a_function_of_its_number_and_the_seed():
    windows = mixed([7, 50, 3], [0.5, 0.3, 0.2])
    one = [windows.order(3).window(n) for n in range(0, 5000, 37)]
    order = windows.order(3)
    assert [order.window(n) for n in range(0, 5000, 37)][::-1] == [order.window(n) for n in range(0, 5000, 37)[::-1]]
    assert [order.window(n) for n in range(0, 5000, 37)] == one
    assert [windows.order(4).window(n) for n in range(0, 5000, 37)] != one
    assert [windows.order(3).window(n) for n in range(8)] == FIRST  # a change of this would break every resume
    owners = MixedOrder([Shuffle(4, 0)] * 2, shares([1.0, 1.0]), (0, 4, 8), 2**63 - 1)
    assert owners.place(10**12)[1] <= 5 * 10**11 + 500


FIRST = [(0, 5), (0, 15), (0, 0), (0, 37), (0, 59), (0, 6), (0, 57), (0, 2)]


def test_a_stream_of_a_mixture_goes_on_from_any_sample():
    windows = mixed([7, 50, 3], [0.5, 0.3, 0.2])
    whole = Stream(windows, seed=3).batch(0, 2500, begin=0, end=4).ids
    stream = Stream(windows, seed=3)
    for first in (2040, 999, 1000, 0):
        state = Stream(windows, seed=3).state(first)
        assert stream.resume(state) == first
        assert stream.batch(first, 60, begin=0, end=4).ids.tolist() == whole[first : first + 60].tolist()
    assert stream.batch(998, 5, begin=1, end=3).ids.tolist() == whole[998:1003, 1:3].tolist()
    assert set(whole[:, 3].tolist()) == {3}


def test_equal_sources_are_read_differently():
    order = mixed([100, 100], [1.0, 1.0]).order(3)
    found = ([], [])
    for sample in range(400):
        source, _ = order.place(sample)
        found[source].append(order.window(sample)[1] % 100)
    assert found[0][:50] != found[1][:50]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return write(folder / "files"), folder / "cache"


def test_ids_hashes_and_windows_of_real_sources(places):
    section = sections(*places)["mixture"]
    source = open_source(section)
    assert isinstance(source, MixtureSource)
    assert source.vocab_size == 258
    assert source.mask_id is None
    parts = [part.windows(32) for part in source.sources]
    for split in ("train", "valid"):
        windows = source.windows(32)[split]
        assert len(windows) == sum(len(part[split]) for part in parts)
        at = windows.first_index[1] + 2
        found = windows.read(at, 3, 9, seed=1, epoch=2, training=True)
        expected = parts[1][split].read(2, 3, 9, seed=1, epoch=2, training=True)
        assert [f.tolist() for f in found[:2]] == [e.tolist() for e in expected[:2]]
    first, *rest = section.mix
    other = section.model_copy(update={"mix": (first.model_copy(update={"weight": 0.6}), *rest)})
    assert open_source(other).content_hash != source.content_hash
    tiny = section.model_copy(update={"mix": (first.model_copy(update={"weight": 0.50001}), *rest)})
    assert open_source(tiny).content_hash == source.content_hash
    same = section.model_copy(update={"mix": section.mix[:1] * 2})
    assert open_source(same).mask_id == 257


def test_a_split_without_a_window_names_its_source(places):
    section = sections(*places)["mixture"]
    with pytest.raises(InputError, match=r"(?s)5000 tokens.*split 'valid'.*data\.mix\[0\]\.valid_fraction"):
        open_source(section).windows(5000)
    nested = DataSection.model_construct(source="mixture", mix=(), cache=str(places[1]))
    with pytest.raises(InputError, match=r"data\.mix: must hold the sources"):
        open_source(nested)
