"""The benchmarks refuse what is wrong, pair their ratios, and write what they found. Tiny sizes: nothing is measured here."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmarks as their own scripts see them."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def conv():
    import conv

    return conv


@pytest.fixture
def opponents():
    import opponents

    return opponents


@pytest.fixture
def measure():
    import measure

    return measure


CPU = torch.device("cpu")


def race(measure, opponents, case, mine, theirs=("fft",)):
    inputs, dy = opponents.draw_inputs(case, CPU)
    others = [opponents.opponent(name, case) for name in theirs]
    return measure.race(mine, others, opponents.fft, inputs, dy, opponents.few, 3)


def test_a_wrong_output_is_not_timed(measure, opponents):
    case = opponents.Case(2, 4, 40, 40, "float32")
    wrong = measure.Contender("wrong", lambda x: opponents.fft(x) * 1.001, 2e-5)
    found = race(measure, opponents, case, [wrong, opponents.our_contender("auto", "auto", case)])
    assert found.refused["wrong"].startswith("wrong: error 1")
    assert [c.ours for c in found.comparisons] == ["auto"]


@pytest.mark.parametrize("name", ["u", "k", "skip", "pre_gate", "post_gate"])
def test_a_wrong_gradient_is_not_timed(measure, opponents, name):
    def scaled(x):
        leaf = x[name]
        return opponents.fft({**x, name: leaf.detach() + (leaf - leaf.detach()) * 1.001})

    case = opponents.Case(2, 4, 40, 7, "float32", gated=True)
    found = race(measure, opponents, case, [measure.Contender("wrong", scaled, 2e-5)])
    assert found.comparisons == []
    assert found.refused["wrong"].startswith("wrong")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_timed(measure, opponents, value):
    case = opponents.Case(1, 4, 16, 4, "bfloat16")
    bad = measure.Contender("bad", lambda x: opponents.fft(x) + value, 1e9)
    assert "error inf" in race(measure, opponents, case, [bad]).refused["bad"]


def test_who_raises_is_refused_and_the_others_go_on(measure, opponents):
    def broken(x):
        raise KeyError("no such kernel")

    case = opponents.Case(1, 4, 16, 4, "float32")
    mine = [measure.Contender("broken", broken, 1.0), opponents.our_contender("torch", "auto", case)]
    found = race(measure, opponents, case, mine)
    assert "KeyError" in found.refused["broken"]
    assert len(found.comparisons) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ours_and_the_opponents_of_a_cpu_are_right(measure, opponents, gated, bidirectional, dtype):
    case = opponents.Case(3, 4, 50, 9, dtype, gated, bidirectional)
    theirs = [name for name in opponents.NAMES if opponents.unfit(name, case, CPU) is None]
    assert theirs == (["fft"] if bidirectional else ["fft", "fft-blocked", "conv1d"])
    found = race(measure, opponents, case, [opponents.our_contender("auto", "auto", case)], theirs)
    assert found.refused == {}
    assert [c.opponent for c in found.comparisons] == theirs


def test_ratios_are_paired_within_a_repetition(measure):
    forward = {"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 16.0]}
    c = measure._compared("a", "b", forward, forward, {"a": 0, "b": 1}, {"a": 0.0, "b": 0.0})
    assert (c.forward_ratio, c.forward_ratio_spread) == (3.0, (2.5, 3.5))
    assert (c.ours_both_ms, c.opponent_both_ms) == (2000.0, 6000.0)


def test_contenders_take_turns(measure):
    order = []
    calls = {name: lambda i, name=name: order.append(name) for name in "ab"}
    found = measure.in_turns(calls, CPU, 3)
    assert "".join(order) == "ab" + "ababab"
    assert [len(times) for times in found.values()] == [3, 3]


def test_saved_bytes_leave_the_inputs_out(measure):
    x = {"x": torch.ones(1000, requires_grad=True)}
    assert measure.saved_bytes(lambda x: x["x"] * 2, x) == 0
    assert measure.saved_bytes(lambda x: x["x"].exp().exp(), x) == 8000


def test_what_does_not_fit_is_skipped_with_its_reason(monkeypatch, measure, opponents, conv):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    case = opponents.Case(1, 4, 64, 4, "float32")
    found = conv.measure_case(case, [("auto", "auto")], ["fft"], CPU, 1, False)
    assert found.comparisons == []
    assert all("GiB" in why for why in found.refused.values())
    assert set(found.refused) == {"auto", "fft"}


def test_memory_that_is_free_is_known(measure):
    assert measure.available_bytes(CPU) > 1 << 20


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("conv1d", {"taps": 513}, "more than 512 taps"),
        ("flash-fft-conv", {"length": 1000}, "no transform of 2000 points"),
        ("flash-fft-conv", {"dtype": "float32"}, "no float32"),
        ("causal-conv1d", {"taps": 5}, "2 to 4 taps only"),
        ("causal-conv1d", {"taps": 4}, None),
        ("flash-fft-conv", {}, None),
        ("fft", {"taps": 10**6}, None),
    ],
)
def test_opponents_say_why_they_do_not_fit(opponents, name, fields, why):
    case = opponents.Case(**{"batch": 1, "channels": 2, "length": 4096, "taps": 64, "dtype": "bfloat16", **fields})
    assert opponents.unfit(name, case, torch.device("cuda")) == why
    if name in opponents.MODULES:
        assert opponents.unfit(name, case, CPU) == "CUDA only"


@pytest.mark.parametrize(
    ("text", "lengths"), [("2^8:2^11", [256, 512, 1024, 2048]), ("100:350", [100, 200]), ("2^4", [16]), ("7", [7])]
)
def test_lengths(conv, text, lengths):
    assert conv.parse_lengths(text) == lengths


def test_taps_are_shares_or_numbers_and_cases_come_once(conv):
    assert [conv.parse_taps(t, 100) for t in ("T", "T/8", "128", "3")] == [100, 12, 100, 3]
    given = argparse.Namespace(
        lengths=[[16, 64]], taps=["T", "32"], batch=[1, 2], channels=8, most_elements=256, dtype="float32",
        gated=False, bidirectional=False,
    )  # fmt: skip
    sizes = [(c.batch, c.channels, c.length, c.taps) for c in conv.cases(given)]
    assert sizes == [(1, 8, 16, 16), (2, 8, 16, 16), (1, 4, 64, 64), (2, 2, 64, 64), (1, 4, 64, 32), (2, 2, 64, 32)]


def test_the_command_writes_its_record_and_picture(conv, tmp_path, capsys):
    arguments = [
        "--lengths",
        "2^5:2^6",
        "33",
        "--taps",
        "T",
        "4",
        "--batch",
        "1",
        "--channels",
        "3",
        "--repetitions",
        "2",
    ]
    assert conv.main([*arguments, "--backend", "auto", "torch", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "conv.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["device"] == "cpu"
    assert record["threads"] >= 1
    assert set(record) >= {"triton", "device_name", "commit", "date", "results", "skipped"}
    assert len(record["results"]) == 6 * 2 * 3
    first = record["results"][0]
    assert (first["length"], first["taps"], first["ours"], first["opponent"]) == (32, 32, "auto", "fft")
    assert first["both_ratio"] > 0
    assert (tmp_path / "conv.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert printed.count(" vs fft: ") == 12
    assert "causal-conv1d: not installed" in printed


def test_the_command_fails_if_ours_is_wrong(conv, opponents, monkeypatch, capsys):
    monkeypatch.setattr(opponents, "ours", lambda backend, precision: lambda x: opponents.fft(x) * 1.1)
    assert conv.main(["--lengths", "32", "--taps", "T", "--batch", "1", "--channels", "2", "--opponents", "fft"]) == 1
    out, error = capsys.readouterr()
    assert "auto skipped: wrong" in out
    assert "ours is wrong" in error


def test_without_matplotlib_a_line_is_printed(measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "is_installed", lambda module: False)
    measure.draw([], str, tmp_path / "conv.png", "title")
    assert "conv.png: not drawn, matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "conv.png").exists()


def test_the_short_convolution_has_a_benchmark(tmp_path):
    import short_conv

    arguments = ["--lengths", "33", "--taps", "1", "4", "--channels", "3", "--repetitions", "2", "--out", str(tmp_path)]
    assert short_conv.main(arguments) == 0
    record = json.loads((tmp_path / "short_conv.json").read_text())
    assert [(r["taps"], r["opponent"]) for r in record["results"]] == [(1, "conv1d"), (4, "conv1d")]
