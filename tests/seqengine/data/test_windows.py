"""Windows: which bases each split and each window holds, at any length, shift and strand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqengine.config.data import DataSection
from seqengine.data.bed import Interval
from seqengine.data.packed import PackedRecord, pack
from seqengine.data.tiles import mix
from seqengine.data.tokenizer import decode
from seqengine.data.windows import Region, Windows, is_reverse, regions, split_windows
from seqengine.errors import InputError


class Genome:
    """A packed genome in memory."""

    def __init__(self, lengths, seed=0):
        self.records, offset = (), 0
        for i, length in enumerate(lengths):
            self.records += (PackedRecord(f"r{i}", offset, length),)
            offset += length
        self.num_tokens = offset
        self.bases = np.random.default_rng(seed).integers(7, 12, offset).astype(np.uint8)
        self.bases.setflags(write=False)

    def tokens(self):
        return self.bases


def intervals(text):
    rows = [line.split() for line in text.strip().splitlines()]
    return [Interval(r[0], int(r[1]), int(r[2]), r[3], i) for i, r in enumerate(rows)]


def test_without_a_bed_the_end_of_the_file_is_validation():
    genome = Genome([100, 0, 60, 40])
    found = regions(genome, DataSection(valid_fraction=0.25))
    assert found == {"train": [(0, 100), (100, 150)], "valid": [(150, 160), (160, 200)], "test": []}
    found = regions(genome, DataSection(valid_fraction=0.5))
    assert found == {"train": [(0, 100)], "valid": [(100, 160), (160, 200)], "test": []}
    found = regions(genome, DataSection(valid_fraction=0.001))
    assert found["valid"] == []


def test_intervals_that_overlap_or_touch_are_one_region():
    genome = Genome([1000, 500])
    bed = intervals(
        """
        r1 0 100 train
        r0 200 300 train
        r0 100 200 train
        r0 120 150 train
        r0 400 500 train
        r0 300 350 valid
        r0 900 1000 test
        """
    )
    found = regions(genome, DataSection(), bed)
    assert found == {
        "train": [(100, 300), (400, 500), (1000, 1100)],
        "valid": [(300, 350)],
        "test": [(900, 1000)],
    }


def test_joining_takes_the_gap_unless_another_split_stands_in_it():
    genome = Genome([1000, 500])
    bed = intervals(
        """
        r0 0 100 train
        r0 200 300 train
        r0 310 320 valid
        r0 330 400 train
        r0 500 600 valid
        r0 700 800 valid
        r1 0 100 valid
        r1 200 300 valid
        """
    )
    assert regions(genome, DataSection(bed_join=True), bed) == {
        "train": [(0, 300), (330, 400)],
        "valid": [(310, 320), (500, 800), (1000, 1300)],
        "test": [],
    }


def held(windows, **how):
    """The set of bases that any window of these holds."""
    found = set()
    for i in range(len(windows)):
        start = windows.start(i, **how)
        found |= set(range(start, start + windows.seq_len + 1))
    return found


LENGTHS = st.lists(st.integers(0, 80), min_size=1, max_size=5).filter(any)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    fraction=st.floats(0.001, 0.999),
    seq_len=st.integers(1, 40),
    other_len=st.integers(1, 40),
    mode=st.sampled_from(["tile", "jitter"]),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_train_and_validation_never_share_a_base(lengths, fraction, seq_len, other_len, mode, seed, epoch):
    genome = Genome(lengths)
    found = regions(genome, DataSection(valid_fraction=fraction))
    train, valid = Windows(genome, found["train"], seq_len), Windows(genome, found["valid"], other_len)
    mine = held(train, seed=seed, epoch=epoch, window=mode)
    assert not mine & held(valid, seed=seed, epoch=epoch, window=mode)
    assert sum(r.end - r.start for split in found.values() for r in split) == genome.num_tokens
    for i in range(len(train)):  # nor do windows cross records
        start = train.start(i, seed=seed, epoch=epoch, window=mode)
        assert any(r.offset <= start and start + seq_len + 1 <= r.offset + r.length for r in genome.records)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    join=st.booleans(),
    seq_len=st.integers(1, 30),
    epoch=st.integers(0, 9),
)
def test_splits_of_a_bed_never_share_a_base(data, join, seq_len, epoch):
    cuts = sorted(data.draw(st.sets(st.integers(0, 200), min_size=4, max_size=20)))
    bed = [
        Interval(f"r{i % 2}", a, b, data.draw(st.sampled_from(["train", "valid", "test"])), i)
        for i, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=False))
    ]
    genome = Genome([200, 200])
    found = regions(genome, DataSection(bed_join=join), bed)
    kept = [
        held(Windows(genome, found[split], seq_len), seed=3, epoch=epoch, window="jitter")
        for split in ("train", "valid", "test")
    ]
    assert len(set.union(*kept)) == sum(map(len, kept))


def test_tiles_stand_end_to_end_and_predict_each_base_once():
    windows = Windows(Genome([100]), [Region(0, 31), Region(31, 42), Region(50, 60), Region(60, 71)], 10)
    assert len(windows) == 3 + 1 + 0 + 1
    assert [windows.start(i) for i in range(5)] == [0, 10, 20, 31, 60]
    predicted = Counter(windows.start(i) + 1 + t for i in range(3) for t in range(10))
    assert predicted == Counter(range(1, 31))
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"index must be in 0\.\.4"):
            windows.start(index)


@pytest.mark.parametrize("seq_len", [1, 7, 8])
def test_jitter_is_even_within_half_a_window(seq_len):
    windows = Windows(Genome([1000]), [Region(0, 1000)], seq_len)
    middle = len(windows) // 2
    tile = windows.start(middle)
    half = seq_len // 2
    shifts = Counter(windows.start(middle, seed=5, epoch=e, window="jitter") - tile for e in range(9000))
    assert set(shifts) == set(range(-half, half + 1))
    assert max(shifts.values()) < 1.25 * 9000 / (2 * half + 1)


def test_jitter_stays_inside_its_region_and_is_a_function_of_seed_epoch_and_index():
    windows = Windows(Genome([100]), [Region(20, 51)], 10)
    seen = {windows.start(i, seed=1, epoch=e, window="jitter") for i in range(3) for e in range(300)}
    assert seen == set(range(20, 41))
    how = {"seed": 1, "epoch": 4, "window": "jitter"}
    assert windows.start(1, **how) == windows.start(1, **how)
    draws = [
        tuple(windows.start(i, seed=s, epoch=e, window="jitter") for i in range(3)) for s in (1, 2) for e in (0, 1)
    ]
    assert len(set(draws)) > 1


def test_the_strand_coin_has_the_asked_probability_and_no_bond_to_the_shift():
    coins = [is_reverse(i, seed=7, epoch=e, rc_prob=0.3) for i in range(100) for e in range(100)]
    assert 0.28 < sum(coins) / len(coins) < 0.32
    assert not any(is_reverse(i, seed=7, epoch=0, rc_prob=0.0) for i in range(1000))
    assert all(is_reverse(i, seed=7, epoch=0, rc_prob=1.0) for i in range(1000))
    windows = Windows(Genome([100_000]), [Region(0, 100_000)], 10)
    pairs = Counter(
        (is_reverse(i, seed=7, epoch=0, rc_prob=0.5), windows.start(i, seed=7, window="jitter") > windows.start(i))
        for i in range(1, 9000)
    )
    assert pairs[True, True] / (pairs[True, True] + pairs[True, False]) == pytest.approx(5 / 11, abs=0.03)


def test_mix_is_splitmix64():
    """The first word of the published generator seeded with 0, and a bit flips half of the bits."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317
    flips = [(mix(3, i) ^ mix(3, i ^ (1 << bit))).bit_count() for i in range(50) for bit in range(64)]
    assert 31 < sum(flips) / len(flips) < 33
    assert mix(1, 2) != mix(2, 1)


COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 30), rc=st.booleans(), mode=st.sampled_from(["tile", "jitter"]))
def test_shards_concatenate_to_the_window(data, seq_len, rc, mode):
    genome = Genome([97])
    windows = Windows(genome, [Region(3, 95)], seq_len)
    index = data.draw(st.integers(0, len(windows) - 1))
    how = {"rc": rc, "seed": 11, "epoch": data.draw(st.integers(0, 5)), "window": mode}
    cuts = sorted(data.draw(st.lists(st.integers(0, seq_len), max_size=4)))
    parts = [windows.bases(index, a, b, **how) for a, b in zip([0, *cuts], [*cuts, seq_len])]
    inputs, targets = (np.concatenate(p) for p in zip(*parts))
    start = windows.start(index, seed=11, epoch=how["epoch"], window=mode)
    text = decode(genome.bases[start : start + seq_len + 1])
    if rc:
        text = "".join(COMPLEMENT[x] for x in reversed(text))
    assert decode(inputs) == text[:-1]
    assert decode(targets) == text[1:]
    assert inputs.dtype == targets.dtype == np.uint8


def test_a_shard_touches_no_other_base():
    genome = Genome([64])
    windows = Windows(genome, [Region(0, 64)], 21)
    whole = {rc: windows.bases(1, 5, 9, rc=rc) for rc in (False, True)}
    for rc, needed in ((False, range(26, 31)), (True, range(42 - 9, 42 - 5 + 1))):
        damaged = Genome([64])
        damaged.bases = np.full(64, 255, dtype=np.uint8)  # no token: complementing it would raise
        damaged.bases[needed] = genome.bases[needed]
        for got, expected in zip(Windows(damaged, [Region(0, 64)], 21).bases(1, 5, 9, rc=rc), whole[rc], strict=True):
            assert np.array_equal(got, expected)


def test_an_empty_slice_is_empty_and_a_wrong_one_an_error():
    windows = Windows(Genome([64]), [Region(0, 64)], 21)
    for rc in (False, True):
        for at in (0, 7, 21):
            inputs, targets = windows.bases(0, at, at, rc=rc)
            assert inputs.shape == targets.shape == (0,)
            assert inputs.dtype == np.uint8
    for begin, end in ((-1, 3), (4, 3), (0, 22)):
        with pytest.raises(ValueError, match="needs 0 <= begin <= end <= 21"):
            windows.bases(0, begin, end)
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        Windows(Genome([64]), [], 0)


@pytest.fixture
def section(tmp_path):
    (tmp_path / "g.fa").write_text(">a\n" + "ACGTTGCAAC\n" * 10 + ">b\n" + "GGGTTGCAAC\n" * 5)
    return DataSection(fasta=tmp_path / "g.fa", cache=str(tmp_path / "cache"), seq_len=20, valid_fraction=0.3)


def test_split_windows_of_a_file(section, tmp_path):
    windows = split_windows(pack(section), section)
    assert {split: len(w) for split, w in windows.items()} == {"train": 4, "valid": 2}
    inputs, _, documents = windows["valid"].read(0, 0, 20)
    assert documents is None
    assert windows["valid"].start(0) == 105
    assert decode(inputs) == "GCAACGGGTTGCAACGGGTT"
    bed = tmp_path / "i.bed"
    bed.write_text("a 0 41 train\na 41 62 valid\nb 0 50 test\n")
    windows = split_windows(pack(section), section.model_copy(update={"bed": bed}), ("train", "valid", "test"))
    assert {split: len(w) for split, w in windows.items()} == {"train": 2, "valid": 1, "test": 2}
    bed.write_text("a 0 101 train\n")
    with pytest.raises(InputError, match="line 1: the interval must end within 'a', which has 100 bases"):
        split_windows(pack(section), section.model_copy(update={"bed": bed}))


def test_a_split_without_a_window_says_what_to_change(section, tmp_path):
    genome = pack(section)

    def refuse(message, **changes):
        with pytest.raises(InputError, match=message) as caught:
            split_windows(genome, section.model_copy(update=changes))
        return caught.value.problems

    problems = refuse(
        "a window of 60 tokens needs 61 bases of one region of split 'valid'; its longest of 1 regions has 45. "
        r"Do one of: lower data\.seq_len to at most 44; raise data\.valid_fraction \(now 0\.3\)",
        seq_len=60,
    )
    assert len(problems) == 1
    assert len(refuse(r"'train'.*lower data\.seq_len to at most 99; lower data\.valid_fraction", seq_len=200)) == 2
    refuse("'valid'; its longest of 0 regions has 0. Do one of: raise", valid_fraction=0.001)
    bed = tmp_path / "i.bed"
    bed.write_text("a 0 15 train\na 20 35 train\na 40 80 valid\n")
    refuse(
        r"'train'; its longest of 2 regions has 15.*give train longer intervals in .*i\.bed; set data\.bed_join",
        bed=bed,
    )
    assert len(split_windows(genome, section.model_copy(update={"bed": bed, "bed_join": True}))["train"]) == 1
    with pytest.raises(InputError, match=r"set data\.bed, without which there is no test split"):
        split_windows(genome, section, ("test",))
