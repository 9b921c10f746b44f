"""The synthetic genome: fixed for ever, as its own rule says, and its entropy floor."""

import hashlib
import math

import numpy as np
import pytest

from seqengine.config.data import SyntheticSection
from seqengine.data import synthetic
from seqengine.data.synthetic import chain, entropy_floor, generate, surprise, write_fasta
from seqengine.data.tokenizer import encode

SMALL = SyntheticSection(length=100_000, lag=40, repeat=0.7, seed=1)


def test_is_the_same_on_every_machine():
    assert hashlib.sha256(generate(SMALL)).hexdigest() == (
        "94e07739d59e3091b045e4048036393603c4c1408a28937022a2273074f2f4c0"
    )
    assert generate(SMALL)[:70] == generate(SyntheticSection(length=70, seed=1))


def test_blocks_do_not_show(monkeypatch):
    section = SyntheticSection(length=5000, lag=7, seed=3)
    whole = generate(section)
    monkeypatch.setattr(synthetic, "_BLOCK", 13)
    assert generate(section) == whole


def test_seed_changes_rows_and_genome():
    other = SyntheticSection(length=100_000, lag=40, repeat=0.7, seed=2)
    assert not np.array_equal(chain(SMALL), chain(other))
    assert generate(SMALL) != generate(other)


def test_rows_are_moderately_skewed_distributions():
    for seed in range(20):
        rows = chain(SyntheticSection(seed=seed))
        np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-15)
        assert rows.min() >= 1 / 25
        assert 1.4 < -(rows * np.log2(rows)).sum(axis=1).mean() < 1.95


def test_frequencies_follow_the_rule():
    text = generate(SMALL).decode()
    same = sum(text[t] == text[t - 40] for t in range(40, len(text))) / (len(text) - 40)
    assert 0.7 < same < 0.85  # 0.7, and the draws that happen to agree
    rows = chain(SMALL)
    only_chain = generate(SyntheticSection(length=100_000, repeat=0.0, seed=1)).decode()
    seen = np.zeros((16, 4))
    for t in range(2, len(only_chain)):
        a, b, c = ("ACGT".index(x) for x in only_chain[t - 2 : t + 1])
        seen[4 * a + b, c] += 1
    np.testing.assert_allclose(seen / seen.sum(axis=1, keepdims=True), rows, atol=0.04)


@pytest.mark.parametrize(("lag", "repeat"), [(1, 0.5), (2, 0.9), (40, 0.7), (40, 0.0), (40, 1.0), (600, 0.3)])
def test_surprise_is_the_conditional_probability(lag, repeat):
    section = SyntheticSection(length=500, lag=lag, repeat=repeat, seed=5)
    text, rows = generate(section).decode(), chain(section)
    bits = surprise(encode(text), section)
    padded = "AA" + text
    for t, letter in enumerate(text):
        context = 4 * "ACGT".index(padded[t]) + "ACGT".index(padded[t + 1])
        p = rows[context, "ACGT".index(letter)]
        if t >= lag:
            p = repeat * (letter == text[t - lag]) + (1 - repeat) * p
        assert math.isclose(bits[t], -math.log2(p), rel_tol=1e-12, abs_tol=1e-12)


def test_the_floor_is_the_entropy_of_the_rule():
    """Its expectation, summed over what the next base may be, is the entropy of that distribution."""
    text = generate(SMALL)
    ids = encode(text).astype(np.int64) - 7
    rows, t = chain(SMALL), np.arange(40, len(text))
    p = 0.3 * rows[4 * ids[t - 2] + ids[t - 1]]
    p[np.arange(len(t)), ids[t - 40]] += 0.7
    expected = -(p * np.log2(p)).sum(axis=1).mean()
    assert entropy_floor(encode(text), SMALL, t) == pytest.approx(expected, abs=0.02)
    assert entropy_floor(encode(text), SMALL, [50, 60]) == surprise(encode(text), SMALL)[[50, 60]].mean()


def test_surprise_refuses_another_genome():
    with pytest.raises(ValueError, match="holds only A, C, G and T"):
        surprise(encode("ACGN"), SMALL)
    with pytest.raises(ValueError, match="cannot produce"):
        surprise(encode("ACGT"), SyntheticSection(length=4, lag=2, repeat=1.0))


def test_fasta_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    section = SyntheticSection(length=143, seed=9)
    path = tmp_path / "s.fa"
    write_fasta(path, section)
    header, *lines = path.read_text().splitlines()
    assert header == ">synthetic length=143 lag=40 repeat=0.7 seed=9"
    assert [len(s) for s in lines] == [70, 70, 3]
    assert "".join(lines).encode() == generate(section)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_fasta(tmp_path / "t.fa", section)
    assert [p.name for p in tmp_path.iterdir()] == ["s.fa"]
