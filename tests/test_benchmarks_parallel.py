"""The benchmark of sequences over ranks refuses what is wrong and counts every byte. Nothing is measured."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqengine.parallel.context import SequenceContext

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
T, H, K = 48, 2, 4
SIZES = ["--length", str(T), "--heads", str(H), "--width", str(K), "--repetitions", "2"]

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),  # processes are forked
]


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module. Its name is that of a folder, so it is loaded by its path."""
    sys.path.insert(0, str(BENCHMARKS))
    specification = importlib.util.spec_from_file_location("benchmark_of_ranks", BENCHMARKS / "parallel.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    for name in ("short_conv", "gla"):  # what torch imports at first use is then there in all processes to come
        module.measure_case(module.Case(name, 1, 1, 1, 4, 16, 4, 0), None, 1)
    yield module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def record(benchmark, tmp_path_factory):
    """Of all operators on two ranks."""
    folder = tmp_path_factory.mktemp("results")
    assert benchmark.main([*SIZES, "--ranks", "2", "--out", str(folder)]) == 0
    assert (folder / "parallel.png").exists() == benchmark.measure.is_installed("matplotlib")
    return json.loads((folder / "parallel.json").read_text())


def sent(record, operator, contender):
    """Forward and backward bytes by rank."""
    (line,) = (r for r in record["results"] if (r["operator"], r["contender"]) == (operator, contender))
    return line["sent"]["forward_bytes"], line["sent"]["backward_bytes"]


def test_every_twin_is_right_and_so_is_every_peer(benchmark, record):
    assert record["skipped"] == []
    assert record["threads"] == 1
    assert record["cores"] == len(os.sched_getaffinity(0))
    by_operator = {}
    for r in record["results"]:
        by_operator.setdefault(r["operator"], []).append(r["contender"])
    assert list(by_operator) == list(benchmark.OPERATORS)
    for contenders in by_operator.values():
        assert contenders[0] == "ours"
        assert "gather all" in contenders
    for name in ("modal_conv", "gla", "simple_gla", "delta_rule"):
        assert {"ours, log", "serial", "fold"} < set(by_operator[name])
    assert {"ours, ring", "ours, ulysses", "ours, gather", "plain ring"} < set(by_operator["attention"])
    assert "four tensors" in by_operator["long_conv_transpose"]


def test_a_line_of_the_record_has_bytes_messages_times_and_errors(record):
    for line in record["results"]:
        assert (line["ranks"], line["length"], line["heads"], line["width"]) == (2, T, H, K)
        assert all(len(column) == 2 for column in line["sent"].values())
        assert max(line["sent"]["messages"]) > 0
        assert max(line["sent"]["calls"]) > 0
        assert min(line["both_ms"], line["plain_ms"], line["speed_up"]["median"]) > 0
        low, high = line["speed_up"]["spread"]
        assert low <= line["speed_up"]["median"] <= high
        assert line["is_ours"] == line["contender"].startswith("ours")
        assert (line["ours_faster"] is None) == (line["contender"] == "ours")
        assert 0 <= line["float64_error"] <= 1e-10
        assert line["error"] <= 2e-5


def test_bytes_are_those_of_the_shapes(record):
    """Of float32; part: a rank's part of a tensor of D channels."""
    D = H * K
    part = 4 * D * T // 2
    taps = next(r["taps"] for r in record["results"] if r["operator"] == "long_conv_halo")
    halo = 4 * D * (taps - 1)
    assert sent(record, "long_conv_halo", "ours") == ([halo, 0], [0, halo])
    assert sent(record, "long_conv_halo", "gather tails") == ([halo] * 2, [halo] * 2)
    assert sent(record, "long_conv_transpose", "ours") == ([part] * 2, [part] * 2)  # half of two tensors
    assert sent(record, "long_conv_transpose", "four tensors") == ([2 * part] * 2, [2 * part] * 2)
    states = 4 * D * 16
    assert sent(record, "modal_conv", "serial") == ([states, 0], [0, states])
    assert sent(record, "modal_conv", "fold") == ([states] * 2, [states] * 2)
    assert sent(record, "modal_conv", "gather all") == ([part] * 2, [part] * 2)
    assert sent(record, "attention", "gather all") == ([3 * part] * 2, [3 * part] * 2)
    labels = 8 * T // 2
    assert sent(record, "linear_cross_entropy", "gather all") == ([part + labels] * 2, [0, 0])


def test_one_rank_sends_nothing_and_has_no_peers(benchmark, capsys, tmp_path):
    operators = ["--operators", "gla", "attention"]
    assert benchmark.main([*SIZES, *operators, "--ranks", "1", "--out", str(tmp_path), "--no-picture"]) == 0
    lines = json.loads((tmp_path / "parallel.json").read_text())["results"]
    assert [(r["operator"], r["contender"], r["sent"]["forward_bytes"]) for r in lines] == [
        ("gla", "ours", [0]),
        ("attention", "ours", [0]),
    ]
    assert "share" in capsys.readouterr().out
    assert not (tmp_path / "parallel.png").exists()


def changed(benchmark, monkeypatch, name, wrong, mine=False, operator="short_conv"):
    """The contender's call passes through `wrong`."""
    right = benchmark.OPERATORS[operator]

    def make(case):
        made = right.make(case)
        contenders = made.ours if mine else made.peers
        return replace(made, **{"ours" if mine else "peers": {**contenders, name: wrong(contenders[name])}})

    monkeypatch.setitem(benchmark.OPERATORS, operator, replace(right, make=make))


def slightly_more(run):
    return lambda x, ctx: run(x, ctx) * (1 + 1e-8)  # float32 does not see it


def whole_gradients(run):
    """Every rank has the whole gradient of the parameter, whose sum is P times too large."""

    def call(x, ctx):
        bias = x["bias"].detach() + ctx.size * (x["bias"] - x["bias"].detach())
        return run({**x, "bias": bias}, ctx)

    return call


def no_neighbour(run):
    def call(x, ctx):
        return run(x, SequenceContext.single(ctx.local_tokens))

    return call


@pytest.mark.parametrize("wrong", [slightly_more, whole_gradients, no_neighbour])
def test_the_command_fails_if_ours_is_wrong(benchmark, monkeypatch, capsys, wrong):
    changed(benchmark, monkeypatch, "ours", wrong, mine=True)
    assert benchmark.main([*SIZES, "--operators", "short_conv", "--ranks", "2"]) == 1
    out, error = capsys.readouterr()
    assert "ours skipped: wrong: error" in out
    assert "gather tails " in out
    assert "short_conv P 2: ours is wrong" in error


def test_a_wrong_peer_is_not_timed(benchmark, monkeypatch, capsys, tmp_path):
    changed(benchmark, monkeypatch, "gather all", slightly_more)
    arguments = [*SIZES, "--operators", "short_conv", "--ranks", "2", "--out", str(tmp_path), "--no-picture"]
    assert benchmark.main(arguments) == 0
    record = json.loads((tmp_path / "parallel.json").read_text())
    assert [r["contender"] for r in record["results"]] == ["ours", "gather tails"]
    (skipped,) = record["skipped"]
    assert (skipped["case"], skipped["contender"]) == ("short_conv P 2", "gather all")
    assert skipped["reason"].startswith("wrong: error")
    assert skipped["reason"].endswith("in float64, not timed")


def test_what_is_refused_on_all_ranks_is_said(benchmark, monkeypatch, capsys):
    def refuse(run):
        def call(x, ctx):
            raise ValueError("cannot do this")

        return call

    changed(benchmark, monkeypatch, "ours", refuse, mine=True)
    assert benchmark.main([*SIZES, "--operators", "short_conv", "--ranks", "2"]) == 1
    assert "ours skipped: raised ValueError: ['cannot do this']" in capsys.readouterr().out


def test_a_process_that_dies_ends_the_run(benchmark, monkeypatch, capfd):
    def die(run):
        def call(x, ctx):
            os._exit(3) if ctx.rank == 1 else None
            return run(x, ctx)

        return call

    changed(benchmark, monkeypatch, "ours", die, mine=True)
    assert benchmark.main([*SIZES, "--operators", "short_conv", "--ranks", "2"]) == 1
    assert "P 2: a process failed" in capfd.readouterr().err


def test_ratios_are_paired_within_a_turn(benchmark):
    ratio = benchmark.Ratio.of([2.0, 6.0, 16.0], [1.0, 2.0, 4.0])
    assert (ratio.median, ratio.spread) == (3.0, (2.5, 3.5))
    assert str(ratio) == "3.00x (2.50..3.50)"


def test_contenders_take_turns_and_the_plain_kernel_runs_once(benchmark):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("plain", "a", "b")}
    found = benchmark.in_turns(calls, 2, SequenceContext.single(4))
    assert order == ["plain", "a", "b"] * 2
    assert [len(seconds) for seconds in found.values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "5"], "T must be a multiple of P, and 4 P or more; got 48 for P = 5"),
        (["--ranks", "16"], "T must be a multiple of P, and 4 P or more; got 48 for P = 16"),
        (["--ranks", "0"], "--ranks must be at least 1; got 0"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.main([*SIZES, *arguments])
    assert message in capsys.readouterr().err
    assert torch.get_num_threads() == 1
