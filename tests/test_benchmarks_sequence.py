"""Benchmarks of recurrences, attention, the loss and recall refuse what is wrong, write what they found. No timing counts."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmarks as their own scripts see them."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def recurrence():
    import recurrence

    return recurrence


@pytest.fixture
def attention():
    import attention

    return attention


@pytest.fixture
def loss():
    import loss

    return loss


@pytest.fixture
def synthetics():
    import synthetics

    return synthetics


@pytest.fixture
def listops():
    import listops

    return listops


RECURRENT = ("gla", "simple_gla", "delta_rule", "slstm", "lstm", "gru", "elman")
ATTENTIONS = ("full", "causal", "window", "documents", "grouped")


def recurrent_case(recurrence, operator, heads=2, length=70, dtype="float32", checked=70):
    return recurrence.Case(operator, 2, heads, 4, length, dtype, checked)


def attention_case(attention, variant, length=60, dtype="float32"):
    options = {"window": {"window": 9}, "documents": {"documents": 3}}.get(variant, {})
    return attention.Case(variant, 1, 4, 2 if variant == "grouped" else 4, 8, length, dtype, **options)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("operator", RECURRENT)
def test_recurrences_and_their_opponents_of_a_cpu_are_right(recurrence, operator, heads):
    case = recurrent_case(recurrence, operator, heads)
    found = recurrence.measure_case(case, ["auto", "torch"], list(recurrence.NAMES), CPU, 1, 70)
    theirs = ["loop", "torch.nn"] if heads == 1 and operator in recurrence.TORCH_CELLS else ["loop"]
    assert [(c.ours, c.opponent) for c in found.comparisons] == [(o, t) for o in ("auto", "torch") for t in theirs]
    assert set(found.refused) == set(recurrence.NAMES) - set(theirs)
    assert {t.name for t in found.timings} == {"auto", "torch", *theirs}


@pytest.mark.parametrize("operator", ["gla", "delta_rule", "slstm"])
def test_recurrences_are_right_in_16_bits(recurrence, operator):
    case = recurrent_case(recurrence, operator, dtype="bfloat16")
    found = recurrence.measure_case(case, ["auto"], ["loop"], CPU, 1, 70)
    assert found.refused == {}


@pytest.mark.parametrize("variant", ATTENTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_its_opponents_of_a_cpu_are_right(attention, monkeypatch, variant, dtype):
    monkeypatch.setattr(attention, "CHECKED_QUERIES", 7)
    case = attention_case(attention, variant, dtype=dtype)
    found = attention.measure_case(case, ["auto", "torch"], list(attention.NAMES), CPU, 1, 60)
    assert set(found.refused) == {"flash_attn"}
    theirs = ("torch-sdpa", "scores")
    assert [(c.ours, c.opponent) for c in found.comparisons] == [(o, t) for o in ("auto", "torch") for t in theirs]


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_a_wrong_gradient_of_a_recurrence_is_not_timed(recurrence, monkeypatch, name):
    right = recurrence.ours

    def wrong(case, backend):
        def scaled(x):
            return right(case, backend)({**x, name: x[name].detach() + (x[name] - x[name].detach()) * 1.001})

        return scaled

    monkeypatch.setattr(recurrence, "ours", wrong)
    found = recurrence.measure_case(recurrent_case(recurrence, "gla"), ["auto"], ["loop"], CPU, 1, 70)
    assert found.comparisons == []
    assert found.refused["auto"].startswith("wrong")


def test_a_wrong_group_of_heads_is_not_timed(attention, monkeypatch):
    right = attention.ours

    def interleaved(case, backend):
        return lambda x: right(case, backend)({**x, "k": x["k"].flip(2)})

    monkeypatch.setattr(attention, "ours", interleaved)
    found = attention.measure_case(attention_case(attention, "grouped"), ["auto"], ["scores"], CPU, 1, 60)
    assert found.refused["auto"].startswith("wrong")


@pytest.mark.parametrize("module", ["recurrence", "attention", "loss"])
def test_the_command_fails_if_ours_is_wrong(request, monkeypatch, capsys, module):
    benchmark = request.getfixturevalue(module)
    right = benchmark.ours
    if module == "loss":
        monkeypatch.setitem(benchmark.CONTENDERS, "ours", lambda labels: lambda x: right(labels)(x) * 1.1)
        arguments = ["--vocabulary", "50", "--no-memory"]
    else:
        monkeypatch.setattr(benchmark, "ours", lambda case, backend: lambda x: right(case, backend)(x) * 1.1)
        arguments = ["--operators", "gla"] if module == "recurrence" else ["--variants", "causal", "--heads", "2"]
    assert benchmark.main([*arguments, "--lengths", "20", "--width", "4", "--repetitions", "1"]) == 1
    out, error = capsys.readouterr()
    assert "skipped: wrong" in out
    assert "ours is wrong" in error


def test_the_loop_is_measured_at_a_shorter_length_and_that_is_said(recurrence, tmp_path, capsys):
    arguments = ["--operators", "gla", "slstm", "--lengths", "40", "--loop-most", "20", "--check-most", "10"]
    sizes = ["--heads", "1", "--width", "4", "--repetitions", "2", "--out", str(tmp_path)]
    assert recurrence.main([*arguments, *sizes]) == 0
    record = json.loads((tmp_path / "recurrence.json").read_text())
    compared = [(r["operator"], r["length"], r["opponent"]) for r in record["results"]]
    assert compared == [("gla", 20, "loop"), ("slstm", 20, "loop")]
    timed = [(r["operator"], r["length"], r["name"]) for r in record["timings"]]
    each = [(20, "auto"), (20, "loop"), (40, "auto")]
    assert timed == [(operator, *what) for operator in ("gla", "slstm") for what in each]
    assert {r["checked"] for r in record["timings"]} == {10}
    printed = capsys.readouterr().out
    assert "T      40 float32 (checked on 10 tokens): loop skipped: measured up to T = 20 (--loop-most)" in printed
    assert printed.count("us a token forward") == 6
    assert (tmp_path / "recurrence.png").exists() == recurrence.measure.is_installed("matplotlib")


@pytest.mark.parametrize("operator", ["gla", "slstm", "gru"])
def test_the_check_of_few_tokens_cuts_tokens_only(recurrence, operator):
    case = recurrent_case(recurrence, operator, heads=1 if operator == "gru" else 2, checked=30)
    inputs, dy = recurrence.draw_inputs(case, CPU)
    few = recurrence.few(case)
    cut = {name: few(t) for name, t in inputs.items()}
    assert few(dy).shape[1] == 30
    for name, t in cut.items():
        assert t.shape[1:] == inputs[name].shape[1:] if name in ("recurrent", "weight") else t.shape[1] == 30
    assert recurrence.ours(case, "auto")(cut).shape == few(dy).shape


@pytest.mark.parametrize(
    ("name", "operator", "heads", "device", "why"),
    [
        ("loop", "gla", 2, "cpu", "measured up to T = 64 (--loop-most)"),
        ("torch.nn", "slstm", 1, "cpu", "lstm, gru and elman of one head only"),
        ("torch.nn", "lstm", 1, "cpu", None),
        ("fla", "lstm", 1, "cuda", "linear recurrences only"),
        ("fla", "gla", 2, "cpu", "CUDA only"),
        ("fla", "gla", 2, "cuda", None),
    ],
)
def test_opponents_of_recurrences_say_why_they_do_not_fit(recurrence, name, operator, heads, device, why):
    case = recurrent_case(recurrence, operator, heads)
    assert recurrence.unfit(name, case, torch.device(device), 64) == why


def test_opponents_of_attention_say_why_they_do_not_fit(attention):
    cases = {variant: attention_case(attention, variant) for variant in ATTENTIONS}
    long = "all pairs of more than 59 tokens (--scores-most)"
    assert attention.unfit("scores", cases["causal"], CPU, 59) == long
    assert attention.unfit("torch-sdpa", cases["window"], CPU, 59) == long
    assert attention.unfit("torch-sdpa", cases["causal"], CPU, 59) is None
    assert attention.unfit("flash_attn", cases["causal"], CPU, 59) == "CUDA only"
    assert attention.unfit("flash_attn", cases["causal"], torch.device("cuda"), 59) == "no float32"
    assert attention.our_unfit("sdpa", cases["documents"]) == "no window, no documents"


def test_documents_cover_all_tokens_and_differ_in_length(attention):
    assert attention.bounds(attention_case(attention, "documents")) == [0, 10, 30, 60]
    assert attention.bounds(attention_case(attention, "causal")) == [0, 60]


def test_attention_writes_its_record(attention, tmp_path):
    arguments = ["--lengths", "20", "--heads", "2", "--groups", "1", "--width", "4", "--window", "5"]
    assert attention.main([*arguments, "--repetitions", "1", "--documents", "2", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "attention.json").read_text())
    assert [r["variant"] for r in record["results"]] == [v for v in ATTENTIONS for _ in range(2)]
    assert len(record["timings"]) == 3 * len(ATTENTIONS)


def test_the_loss_writes_the_share_of_memory_where_no_opponent_fits(loss, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loss, "measure_memory", lambda name, case, device: loss.Memory(name, 7_200_000, 0.1, 1.0))
    arguments = ["--lengths", "2000", "--plain-most", "100", "--width", "8", "--vocabulary", "9000"]
    assert loss.main([*arguments, "--opponents", "liger", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "loss.json").read_text())
    assert record["results"] == []
    (found,) = record["memory"]
    assert (found["name"], found["length"], found["logits_bytes"]) == ("ours", 2000, 2000 * 9000 * 4)
    printed = capsys.readouterr().out
    assert "peak memory 6.866 MiB, 10.0% of the 68.66 MiB of all logits" in printed
    assert "loss.png: not drawn" in printed


def test_the_peak_of_whole_logits_is_seen_from_a_new_process(loss):
    """Logits, log-softmax and gradient: nothing of what this process holds."""
    mine = torch.ones(1 << 26)
    case = loss.Case(1000, 8, 10_000, "float32")
    found = loss.measure_memory("plain", case, CPU)
    assert 2 < found.share < 4
    assert found.extra_bytes < mine.nbytes


def test_the_plain_loss_is_measured_at_a_shorter_length(loss, capsys):
    arguments = ["--lengths", "50", "--plain-most", "30", "--width", "8", "--vocabulary", "60", "--no-memory"]
    assert loss.main([*arguments, "--repetitions", "1"]) == 0
    printed = capsys.readouterr().out
    assert "T      30 D 8 V 60 float32: ours vs plain" in printed
    assert "T      50 D 8 V 60 float32: plain skipped: measured up to T = 30" in printed


def test_recall_is_learnt_and_written(synthetics, tmp_path, capsys):
    short = ["--tasks", "recall", "--length", "8", "--vocab", "4", "--width", "16", "--batch", "32", "--steps", "400"]
    assert synthetics.main(["--patterns", "h3,attention", *short, "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "synthetics.json").read_text())["results"]
    assert found["accuracy"] > found["goal"] == 0.97
    assert found["steps"] % 100 == 0
    assert found["examples"] == 32 * found["steps"]
    assert found["recipe"] == {"width": 16, "lr": 4e-3, "batch": 32, "steps": 400}
    assert found["settings"] == {"h3": synthetics.SETTINGS["h3"]}
    assert f"goal 97% after {found['steps']} steps" in capsys.readouterr().out


def test_a_missed_goal_of_recall_fails_the_command(synthetics):
    assert synthetics.main(["--patterns", "attention", "--tasks", "induction", "--steps", "1"]) == 0
    assert synthetics.main(["--patterns", "hyena", "--tasks", "induction", "--steps", "1"]) == 1


def test_models_of_recall_begin_with_unit_gain_and_their_own_filters(synthetics):
    task = synthetics.RecallTask("recall")
    model = synthetics.build(["hyena", "h3"], task, 32, 0)
    for layer in (model.embedding, model.blocks[0].mixer.in_proj, model.blocks[1].mlp.fc2):
        assert float(layer.weight.detach().std()) * layer.weight.shape[1] ** 0.5 == pytest.approx(1.0, rel=0.1)
    assert float(model.blocks[0].mixer.filter.output.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_listops_compares_runs_of_the_same_budget_and_reports_them(tmp_path, listops, capsys):
    small = ["train.steps=2", "data.listops.examples=100", "data.listops.valid_examples=20", "eval.windows=20"]
    out = tmp_path / "out"
    assert listops.main(["--runs", str(tmp_path), "--seeds", "5", "--out", str(out), *small]) == 0
    record = json.loads((out / "listops.json").read_text())
    assert [(r["run"], r["seed"], r["begins"], r["step"]) for r in record["results"]] == [
        ("scratch-5", 5, "scratch", 2),
        ("tuned-5", 5, "own inputs", 2),
    ]
    assert "mean accuracy" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").exists()
    with pytest.raises(SystemExit, match="2"):
        listops.main(["--runs", str(tmp_path), "train.no_such_key=1"])
