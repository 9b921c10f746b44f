"""The Markov baseline against a plain count in dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from seqengine.config.data import DataSection, SyntheticSection
from seqengine.data import markov
from seqengine.data.markov import markov_bits
from seqengine.data.packed import pack
from seqengine.data.synthetic import entropy_floor
from seqengine.data.windows import Region, Windows, split_windows


def plain_bits(text, train, starts, seq_len, order, symbols):
    joint, context = Counter(), Counter()
    for start, end in train:
        for t in range(start + order, end):
            joint[text[t - order : t + 1]] += 1
            context[text[t - order : t]] += 1
    bits = []
    for start in starts:
        for t in range(start + 1, start + 1 + seq_len):
            before = ("A" * order + text)[t : t + order]
            p = (joint[before + text[t]] + 1) / (context[before] + symbols)
            bits.append(-math.log2(p))
    return sum(bits) / len(bits)


@pytest.fixture
def make(tmp_path):
    def run(letters):
        text = "".join(np.random.default_rng(0).choice(list(letters), 3000))
        (tmp_path / "g.fa").write_text(f">a\n{text}\n")
        return text, pack(DataSection(fasta=tmp_path / "g.fa", cache=str(tmp_path / "cache")))

    return run


@pytest.mark.parametrize("order", [0, 1, 3, 5])
@pytest.mark.parametrize(("letters", "symbols"), [("AACGT", 4), ("ACGTTN", 5)])
def test_equals_a_plain_count(make, monkeypatch, order, letters, symbols):
    text, genome = make(letters)
    train = [Region(100, 1203), Region(1300, 2400), Region(2400, 2403)]
    windows = Windows(genome, [Region(0, 90), Region(2500, 3000)], 37)
    indices = range(len(windows))
    expected = plain_bits(text, train, [windows.start(i) for i in indices], 37, order, symbols)
    for chunk in (1 << 20, 50):
        monkeypatch.setattr(markov, "_CHUNK", chunk)
        assert markov_bits(train, windows, indices, order=order) == pytest.approx(expected, rel=1e-12)


def test_is_above_the_entropy_floor_and_below_two_bits(tmp_path):
    synthetic = SyntheticSection(length=200_000)
    section = DataSection(source="synthetic", synthetic=synthetic, cache=str(tmp_path))
    genome = pack(section)
    windows = split_windows(genome, section)
    cut = windows["valid"].start(0)
    indices = range(len(windows["valid"]))
    bits = markov_bits([Region(0, cut)], windows["valid"], indices)
    targets = np.concatenate([windows["valid"].start(i) + 1 + np.arange(section.seq_len) for i in indices])
    assert entropy_floor(genome.tokens(), synthetic, targets) + 0.5 < bits < 2.0


def test_refuses_nothing_to_score_and_absurd_orders(make):
    _, genome = make("ACGT")
    windows = Windows(genome, [Region(0, 90)], 37)
    with pytest.raises(ValueError, match="needs at least one window"):
        markov_bits([Region(0, 90)], windows, [])
    for order in (-1, 40):
        with pytest.raises(ValueError, match=rf"order must be in 0\.\.12; got {order}"):
            markov_bits([Region(0, 90)], windows, [0], order=order)
