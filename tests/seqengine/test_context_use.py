"""Loss by position and by context length: sums that agree with the whole, on every mesh."""

import json

import pytest
import torch

from seqengine.context_use import by_context, by_position
from seqengine.data.source import open_source
from seqengine.errors import InputError
from seqengine.evaluate import evaluate
from seqengine.launch.cli import main
from seqengine.model import build_model
from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.seqengine.runs import config, train_on

CPU = torch.device("cpu")
SETTINGS = ("precision.params=fp64", "data.seq_len=32", "eval.windows=6")


def made(folder, *more):
    loaded = config(folder, *SETTINGS, *more)
    source = open_source(loaded.config.data)
    model = build_model(loaded.config.model, seed=0, params="fp64", device=CPU).eval()
    return model, source, source.windows(32, ("valid",))["valid"], loaded.config


def test_positions_add_up_to_the_whole_loss(tmp_path):
    model, source, windows, settings = made(tmp_path)
    mesh = Mesh.single(CPU)
    parts = by_position(model, windows, settings, mesh)
    assert [(p.begin, p.end) for p in parts] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    whole = evaluate(model, windows, settings, mesh, source)
    assert sum(p.tokens for p in parts) == whole.tokens == 6 * 32
    assert sum(p.loss * p.tokens for p in parts) / whole.tokens == pytest.approx(whole.loss, rel=1e-12)


def test_the_last_tokens_of_whole_windows_are_those_of_the_positions(tmp_path, monkeypatch):
    monkeypatch.setattr("seqengine.context_use.LAST_TOKENS", 16)
    model, _, windows, settings = made(tmp_path)
    mesh = Mesh.single(CPU)
    parts = by_context(model, windows, settings, mesh)
    assert [(p.begin, p.end) for p in parts] == [(0, 16), (16, 32)]
    assert parts[-1].loss == pytest.approx(by_position(model, windows, settings, mesh)[-1].loss, rel=1e-12)
    # With less context, the same tokens alone: read them as a sequence of their own.
    nats = 0.0
    for index in range(6):
        from seqengine.data.stream import validation_indices

        chosen = validation_indices(len(windows), 6)[index]
        ids, labels, _ = windows.read(chosen, 16, 32, seed=0, epoch=0, training=False)
        with torch.no_grad():
            ids, labels = (torch.tensor(x.astype("int64"))[None] for x in (ids, labels))
            nats += float(model.loss(ids, labels)[0])
    assert parts[0].loss == pytest.approx(nats / (6 * 16), rel=1e-12)


def _on(group, folder, sequence):
    model, _, windows, settings = made(folder, f"parallel.sequence={sequence}")
    mesh = Mesh.create(group.size() // sequence, sequence, CPU)
    return by_position(model, windows, settings, mesh), by_context(model, windows, settings, mesh)


@pytest.mark.parametrize("sequence", [1, 3])
def test_every_mesh_tells_the_same(tmp_path, monkeypatch, sequence):
    monkeypatch.setattr("seqengine.context_use.LAST_TOKENS", 8)
    model, _, windows, settings = made(tmp_path)
    mesh = Mesh.single(CPU)
    expected = by_position(model, windows, settings, mesh), by_context(model, windows, settings, mesh)
    for found in run_ranks(3, _on, tmp_path, sequence):
        for ours, theirs in zip(expected, found, strict=True):
            assert [p.loss for p in theirs] == pytest.approx([p.loss for p in ours], rel=1e-10)
            assert [p.tokens for p in theirs] == [p.tokens for p in ours]


def test_the_command_prints_and_draws_them(tmp_path, capsys):
    train_on(1, tmp_path, "train.steps=2")
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", run, "--positions", "--contexts", "--json", "--plot", str(tmp_path / "a.svg")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["end"] for p in told["by_position"]] == [1, 2, 4, 8, 16, 32]
    assert [p["end"] for p in told["by_context"]] == [32]
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert main(["eval", run, "--plot", str(tmp_path / "b.svg")]) == 2
    assert "add --positions or --contexts" in capsys.readouterr().err
    assert main(["eval", run, "--positions", "--plot", str(tmp_path / "b.doc")]) == 2
    assert "--plot" in capsys.readouterr().err
    assert not (tmp_path / "b.doc").exists()


def test_models_that_tell_something_else_are_refused(tmp_path):
    loaded = config(tmp_path, "data.seq_len=32").config
    other = loaded.model.model_copy(update={"causal": False})
    with pytest.raises(InputError, match=r"model\.causal = false"):
        by_position(None, None, loaded.model_copy(update={"model": other}), Mesh.single(CPU))
