"""The stream of samples: a pure function of the sample number, whoever asks."""

import hashlib
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqengine.config.data import DataSection, SyntheticSection
from seqengine.data.order import permutation
from seqengine.data.packed import pack
from seqengine.data.stream import Stream, StreamState, read_windows, validation_indices
from seqengine.data.windows import Region, Windows
from seqengine.errors import InputError


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    section = DataSection(
        source="synthetic",
        synthetic=SyntheticSection(length=400, lag=11),
        cache=str(tmp_path_factory.mktemp("cache")),
    )
    return Windows(pack(section), [Region(0, 200), Region(210, 400)], 23)


def train_windows(windows, rc_prob, mode):
    return Windows(windows.genome, windows.regions, windows.seq_len, rc_prob=rc_prob, window=mode)


def test_an_epoch_reads_every_window_once(windows):
    stream = Stream(train_windows(windows, 0.5, "tile"), seed=1)
    count = len(windows)
    assert count == 8 + 8
    for epoch in range(4):
        drawn = [stream.window(n) for n in range(epoch * count, (epoch + 1) * count)]
        assert {e for e, _ in drawn} == {epoch}
        assert sorted(i for _, i in drawn) == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): tuple(permutation(seed, epoch, 50)) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 10**6)
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(permutation(1, 1, 50)) == orders[1, 1]
    assert permutation(1, 0, 8).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]  # a change of this would break every resume
    first = [int(permutation(seed, 0, 10)[0]) for seed in range(2000)]
    assert np.bincount(first, minlength=10).min() > 140


def test_the_samples_of_a_genome_never_change(windows):
    """Hashed when strand and shift were drawn by the stream; another value would break every resume."""
    found = hashlib.sha256()
    for rc_prob, mode, seed in ((0.5, "tile", 1), (0.5, "jitter", 2), (0.0, "jitter", 2**62), (1.0, "tile", 4)):
        batch = Stream(train_windows(windows, rc_prob, mode), seed=seed).batch(3, 50, begin=2, end=23)
        for part in (batch.ids, batch.labels):
            found.update(part.numpy().tobytes())
    assert found.hexdigest() == "41fd918511d78350664a8cee9f40d4860ec94d9a1e975b3d8cc9fefd5cf04cb5"


def test_labels_are_the_inputs_moved_by_one(windows):
    stream = Stream(train_windows(windows, 0.5, "jitter"), seed=3)
    inputs, labels, documents, *classes = stream.batch(0, 40, begin=0, end=23)
    assert documents is None
    assert classes == [None, None]
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (40, 23)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert torch.equal(inputs[:, 5:9], stream.batch(0, 40, begin=5, end=9)[0])


def test_rows_are_what_the_windows_say(windows):
    stream = Stream(train_windows(windows, 0.0, "tile"), seed=3)
    inputs, labels, *_ = stream.batch(5, 30, begin=2, end=20)  # over two epochs and more
    for row in range(30):
        _, index = stream.window(5 + row)
        expected, targets = windows.bases(index, 2, 20)
        assert inputs[row].tolist() == expected.tolist()
        assert labels[row].tolist() == targets.tolist()
    flipped = Stream(train_windows(windows, 1.0, "tile"), seed=3).batch(5, 30, begin=0, end=23)[0]
    forward, behind, *_ = stream.batch(5, 30, begin=0, end=23)
    assert torch.equal(flipped[:, 1:], (17 - forward).flip(1)[:, :-1])  # A7 T10, C8 G9
    assert torch.equal(flipped[:, 0], 17 - behind[:, -1])


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    first=st.integers(0, 100),
    rows=st.integers(0, 12),
    rc_prob=st.sampled_from([0.0, 0.5, 1.0]),
    mode=st.sampled_from(["tile", "jitter"]),
)
def test_every_cut_over_ranks_concatenates_to_the_one_rank_batch(windows, data, first, rows, rc_prob, mode):
    def cuts(most):
        inner = sorted(data.draw(st.lists(st.integers(0, most), max_size=4)))
        return list(zip([0, *inner], [*inner, most]))

    def stream():  # each rank has its own
        return Stream(train_windows(windows, rc_prob, mode), seed=9)

    whole = stream().batch(first, rows, begin=0, end=23)
    tokens = cuts(23)
    for part in (0, 1):
        lines = []
        for a, b in cuts(rows):
            ranks = [stream().batch(first + a, b - a, begin=t, end=u)[part] for t, u in tokens]
            lines.append(torch.cat(ranks, dim=1))
        assert torch.equal(torch.cat(lines), whole[part])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_and_pickled_streams_read_the_same(windows):
    stream = Stream(train_windows(windows, 0.5, "jitter"), seed=2)
    expected = stream.batch(0, 64, begin=0, end=23)[0].numpy()
    context = multiprocessing.get_context("fork")

    def child(queue):
        queue.put(stream.batch(0, 64, begin=0, end=23)[0].numpy())

    queue = context.SimpleQueue()
    processes = [context.Process(target=child, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in processes:
        assert np.array_equal(queue.get(), expected)
    for process in processes:
        process.join()
    queue.close()
    copy = pickle.loads(pickle.dumps(stream))
    assert np.array_equal(copy.batch(0, 64, begin=0, end=23)[0].numpy(), expected)


def test_state_goes_round_and_resumes(windows):
    stream = Stream(train_windows(windows, 0.5, "tile"), seed=2)
    state = stream.state(35)
    assert state == StreamState(seed=2, epoch=2, samples=35)
    assert state.to_dict() == {"seed": 2, "epoch": 2, "samples": 35}
    assert StreamState.from_dict(state.to_dict()) == state
    assert stream.resume(state) == 35


def test_a_state_of_another_run_is_refused(windows):
    stream = Stream(train_windows(windows, 0.5, "tile"), seed=2)
    with pytest.raises(
        InputError, match=r"same run\.seed and data; it is of seed 3 and epoch 2 after 35 samples, got seed 2"
    ):
        stream.resume(StreamState(3, 2, 35))
    with pytest.raises(InputError, match="got seed 2 and 16 windows"):
        stream.resume(StreamState(2, 3, 35))
    for bad in (
        {"seed": 1, "epoch": 0},
        {"seed": 1, "epoch": 0, "samples": -1},
        {"seed": 1, "epoch": 0, "samples": 1.0},
    ):
        with pytest.raises(InputError, match="whole numbers seed, epoch, samples and nothing else"):
            StreamState.from_dict(bad)


def test_no_windows_is_an_error(windows):
    with pytest.raises(ValueError, match="at least one window"):
        Stream(Windows(windows.genome, [], 5), seed=0)


def test_validation_windows_are_evenly_spaced(windows):
    assert validation_indices(5, "all") == [0, 1, 2, 3, 4]
    assert validation_indices(5, 9) == [0, 1, 2, 3, 4]
    assert validation_indices(100, 4) == [12, 37, 62, 87]
    assert validation_indices(0, 4) == []
    for count in range(1, 60):
        for wanted in range(1, count + 1):
            chosen = validation_indices(count, wanted)
            gaps = np.diff(chosen)
            assert len(chosen) == wanted
            assert chosen[0] >= 0
            assert chosen[-1] < count
            assert not gaps.size or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    inputs, labels, *_ = read_windows(train_windows(windows, 1.0, "jitter"), [3, 0], begin=1, end=4)
    assert inputs.tolist() == [windows.read(i, 1, 4)[0].tolist() for i in (3, 0)]
    assert labels.tolist() == [windows.read(i, 1, 4)[1].tolist() for i in (3, 0)]
    assert inputs.dtype == torch.int64
