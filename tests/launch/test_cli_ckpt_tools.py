"""`seqengine ckpt ls`, `verify`, `diff` and `consolidate`: what they print, their exit codes, and nothing half-written."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqengine.checkpoint.state import Progress, Record, model_tensors
from seqengine.checkpoint.store import CheckpointStore
from seqengine.config.load import load
from seqengine.launch import cli, cli_ckpt
from seqengine.launch.cli import main
from seqengine.model import build_model
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CONFIG, RunDirectory

CPU = torch.device("cpu")
TEXT = """
[run]
seed = {seed}
[model]
d_model = 8
n_layer = 1
max_len = 16
filter = {{ order = 8 }}
[data]
source = "synthetic"
seq_len = 16
synthetic = {{ length = 2000, lag = 6 }}
[train]
steps = 6
batch_tokens = 64
"""


def make_run(name: str, seed: int = 0, steps: tuple[int, ...] = (2, 4), *, ema: bool = False) -> None:
    """A run's directory as training leaves it: weights of step n are those of the start plus n thousandths."""
    Path(f"{name}.toml").write_text(TEXT.format(seed=seed))
    loaded = load(Path(f"{name}.toml"), [f"run.dir={name}", "data.cache=cache"])
    mesh = Mesh.single(CPU)
    run = RunDirectory(Path(name))
    run.write(loaded, "", mesh.axes)
    model = build_model(loaded.config.model, seed=seed, params="fp32", device=CPU)
    store = CheckpointStore(run.checkpoints, mesh, keep=9)
    for step in steps:
        tensors = {key: t + step / 1000 if t.is_floating_point() else t for key, t in model_tensors(model).items()}
        if ema:
            averaged = {key.removeprefix("model."): t for key, t in tensors.items() if key.endswith("weight")}
            tensors |= {f"ema.{key}": t - 5 for key, t in averaged.items()}
        store.save(tensors, Record(Progress(step, step * 1000), {"seed": seed}, mesh.axes, "d" * 64))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs a (two checkpoints), b (another seed, with averaged weights), c (none), in a folder that tests leave as it is."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_run("a")
        make_run("b", seed=1, steps=(4,), ema=True)
        make_run("c", steps=())
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A run whose newest checkpoint is damaged."""
    monkeypatch.chdir(tmp_path)
    make_run("a")
    (tmp_path / "a/ckpt/step-00000004/engine.json").write_text("{}")
    return tmp_path


def told(capsys, *words: str, code: int = 0) -> str:
    assert main(["ckpt", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def test_ls_tells_step_tokens_date_bytes_and_mesh(here, capsys):
    head, *rows = told(capsys, "ls", "a").splitlines()
    assert head.split() == ["checkpoint", "step", "tokens", "date", "bytes", "mesh"]
    size = sum(p.stat().st_size for p in (here / "a/ckpt/step-00000004").iterdir())
    assert [row.split()[:3] for row in rows] == [["step-00000002", "2", "2,000"], ["step-00000004", "4", "4,000"]]
    assert re.search(rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ +{size:,} +replicate=1 shard=1 sequence=1$", rows[1])
    assert [row.split()[-1] for row in told(capsys, "ls", "a", "--verify").splitlines()] == ["state", "whole", "whole"]
    assert told(capsys, "ls", "c") == "c has no checkpoints yet\n"


def test_damage_is_listed_and_named(broken, capsys):
    lines = told(capsys, "ls", "a").splitlines()
    assert lines[2].split()[:3] == ["step-00000004", "?", "?"]
    message = "damaged: engine.json does not have the contents that were saved"
    lines = told(capsys, "ls", "a", "--verify", code=1).splitlines()
    assert lines[1].endswith("whole")
    assert lines[2].endswith(message)
    good, bad = told(capsys, "verify", "a", code=1).splitlines()
    assert good == "a/ckpt/step-00000002: whole"
    assert bad == f"a/ckpt/step-00000004: {message}"
    assert told(capsys, "verify", "a/ckpt/step-00000002") == f"{good}\n"
    assert told(capsys, "verify", "a/ckpt/step-00000004", code=1) == f"{bad}\n"
    assert "engine.json does not" in told(capsys, "diff", "a", "a/ckpt/step-00000004", code=2)
    assert "a/ckpt/step-00000002 (verified), step 2" in told(capsys, "consolidate", "a", "out.pt")


def test_diff_of_two_steps_tells_the_record_and_the_largest_differences_first(here, capsys):
    found = json.loads(told(capsys, "diff", "a/ckpt/step-00000002", "a", "--json"))
    assert found["checkpoints"] == ["a/ckpt/step-00000002", "a/ckpt/step-00000004"]
    assert found["record"] == {"progress.step": [2, 4], "progress.tokens": [2000, 4000]}
    assert found["config"] == found["shapes"] == found["dtypes"] == {}
    assert found["only_in_first"] == found["only_in_second"] == []
    gaps = list(found["max_abs_difference"].values())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps == pytest.approx([0.002] * len(gaps), rel=1e-2)
    assert len(gaps) > 5
    same = json.loads(told(capsys, "diff", "a", "a/ckpt/step-00000004", "--json"))
    assert (same["record"], same["max_abs_difference"], same["same"]) == ({}, {}, len(gaps) + found["same"])


def test_diff_of_two_runs_tells_config_and_missing_tensors(here, capsys):
    found = json.loads(told(capsys, "diff", "a", "b", "--json"))
    assert found["config"]["run.seed"] == [0, 1]
    assert found["record"] == {"stream.seed": [0, 1]}
    assert found["only_in_first"] == []
    assert all(name.startswith("ema.") for name in found["only_in_second"])
    words = told(capsys, "diff", "a", "b")
    assert "config   run.seed: 0 -> 1" in words
    assert "only B   ema.embedding.weight" in words
    assert words.splitlines()[-1].endswith(f"{len(found['max_abs_difference'])} differ")


def test_diff_tells_shapes_dtypes_and_numbers_that_are_none(here, tmp_path, capsys, monkeypatch):
    mesh = Mesh.single(CPU)
    left = {"model.a": torch.zeros(2), "model.b": torch.zeros(3), "model.n": torch.tensor([float("nan"), 1.0])}
    right = {"model.a": torch.zeros(4), "model.b": torch.ones(3).double(), "model.n": torch.tensor([float("nan")] * 2)}
    monkeypatch.chdir(tmp_path)
    for name, tensors in (("x", left), ("y", right)):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_bytes((here / "a" / CONFIG).read_bytes())
        store = CheckpointStore(tmp_path / name / "ckpt", mesh)
        store.save(tensors, Record(Progress(1), {}, mesh.axes, ""))
    found = json.loads(told(capsys, "diff", "x", "y", "--json"))
    assert found["shapes"] == {"model.a": [[2], [4]]}
    assert found["dtypes"] == {"model.b": ["torch.float32", "torch.float64"]}
    assert found["max_abs_difference"] == {"model.n": float("inf"), "model.b": 1.0}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_consolidated_weights_are_those_of_the_checkpoint(here, tmp_path, capsys, suffix):
    def read(file):
        return load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)

    config = load(here / "b.toml", [], need_data=False).config
    model = build_model(config.model, seed=1, params="fp32", device=CPU)
    expected = {key: t + 4 / 1000 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    file, averaged = tmp_path / f"new/one{suffix}", tmp_path / f"ema{suffix}"
    told(capsys, "consolidate", "b/ckpt/step-00000004", str(file))
    tensors = read(file)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    model.load_state_dict(tensors)
    told(capsys, "consolidate", "b", str(averaged), "--ema")
    tensors = read(averaged)
    assert all(
        torch.equal(tensors[key], expected[key] - 5 if key.endswith("weight") else expected[key]) for key in expected
    )
    assert "give --force" in told(capsys, "consolidate", "b", str(file), code=2)
    told(capsys, "consolidate", "b", str(file), "--force")
    assert {p.name for p in tmp_path.iterdir()} == {"new", averaged.name}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "nowhere"], "nowhere: must be a run's directory"),
        (["ls", "a/ckpt/step-00000002"], "must be a run's directory; it is a checkpoint. Give a."),
        (["verify", "c"], "c: must hold a checkpoint; it has none yet"),
        (["verify", "a/ckpt/step-00000003"], "a/ckpt/step-00000003: must be"),
        (["diff", "a", "nowhere"], "nowhere: must be a run's directory"),
        (["diff", "c", "a"], "c: must hold a checkpoint; it has none yet"),
        (["consolidate", "a", "out.bin"], "out.bin: must end in .safetensors or .pt; got '.bin'"),
        (["consolidate", "a", "out.pt", "--ema"], "holds no averaged weights; leave --ema out"),
        (["consolidate", "c", "out.pt"], "c: must hold a checkpoint"),
        (["consolidate", "a", "a.toml/out.pt"], "a.toml/out.pt: cannot be written: "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(here, capsys, words, message):
    before = set(here.rglob("*"))
    error = told(capsys, *words, code=2)
    assert message in error
    assert len(error.splitlines()) == 1
    assert set(here.rglob("*")) == before


def test_the_words_are_known_without_importing_what_runs(capsys):
    for module in (cli, cli_ckpt):
        assert "torch" not in vars(module)
    with pytest.raises(SystemExit):
        main(["ckpt", "--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("ls", "verify", "diff", "consolidate", "import", "export"))
