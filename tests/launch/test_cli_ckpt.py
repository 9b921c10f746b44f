"""`seqengine ckpt import` and `export`: runs from published weights and back, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqengine.checkpoint.state import Record
from seqengine.interop import files, formats
from seqengine.launch.cli import main
from tests.launch.test_cli_bad_input import fasta
from tests.launch.test_cli_runs import seqengine
from tests.seqengine.weights import MODELS, tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments: str) -> str:
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def written(name: str = "hyenadna") -> Path:
    path = Path(f"published-{name}")
    formats.save(tiny(name), path, name)
    return path


def generated(capsys, target: str) -> str:
    return run(capsys, "generate", target, "--prompt", "GATTACA", "-n", "40", "--seed", "1", "--temperature", "0.5")


def test_every_format_goes_round_and_writes_the_same_text(folder, capsys):
    texts = []
    for name in MODELS:
        source = written(name)
        run(capsys, "ckpt", "import", str(source), f"runs/{name}")
        run(capsys, "ckpt", "export", f"runs/{name}", f"out/{name}", "--format", name)
        run(capsys, "ckpt", "import", f"out/{name}", f"runs/{name}-again", "--format", name)
        run(capsys, "ckpt", "export", f"runs/{name}-again/ckpt/step-00000000", f"out/{name}-again", "--format", name)
        one, two, three = (files.read_folder(p) for p in (source, Path(f"out/{name}"), Path(f"out/{name}-again")))
        for tensors, config in (two, three):
            assert config == one[1]
            assert tensors.keys() == one[0].keys()
            assert all(torch.equal(tensors[key], one[0][key]) for key in tensors)
        texts.append(generated(capsys, f"runs/{name}"))
        assert generated(capsys, f"runs/{name}-again") == texts[-1]
    assert len(set(texts)) == len(texts), "the texts must depend on the weights"


def test_an_imported_run_trains_evaluates_and_goes_out_again(folder, capsys):
    Path("genome.fa").write_text(fasta())
    out = run(
        capsys, "ckpt", "import", str(written()), "runs/a", "train.steps=2", "--format", "hyenadna", "optim.lr=0.01"
    )
    assert "AdamW starts anew" in out
    assert "train and eval need data.fasta" in out
    record = Record.read(Path("runs/a/ckpt/step-00000000"))
    assert (record.progress.step, record.progress.tokens, record.data_hash) == (0, 0, "")
    text = Path("runs/a/config.toml").read_text()
    assert "lr = 0.01  # command line" in text
    assert "d_model = 8  # published-hyenadna" in text
    assert "weight_decay = 0.1  # default" in text
    out = seqengine(folder, "train", "runs/a/config.toml", "data.fasta=genome.fa")
    assert "resumed at step 0" in out
    assert json.loads(seqengine(folder, "eval", "runs/a", "--json"))["step"] == 2
    run(capsys, "ckpt", "export", "runs/a", "out", "--format", "hyenadna")
    trained, published = (load_file(f"{path}/{files.WEIGHTS}") for path in ("out", "published-hyenadna"))
    moved = {key for key in trained if not torch.equal(trained[key], published[key])}
    assert {key for key in trained if key.endswith((".z", ".t", ".deltas"))}.isdisjoint(moved)
    assert len(moved) > 40
    furthest = max(float((trained[key] - published[key]).abs().max()) for key in moved)
    assert furthest < 2.1 * 0.01, "AdamW moves a weight by the learning rate a step: it went on from the published ones"
    # From now on the run knows its data.
    Path("genome.fa").write_text(fasta("ACGT" * 1500))
    message = seqengine(folder, "train", "runs/a/config.toml", "data.fasta=genome.fa", "train.steps=3", code=2)
    assert "was trained on other data" in message


def test_data_given_at_the_import_are_those_of_the_run(folder, capsys):
    Path("genome.fa").write_text(fasta())
    out = run(capsys, "ckpt", "import", str(written("gla")), "runs/a", "data.fasta=genome.fa", "train.tokens=4k")
    assert "need data.fasta" not in out
    assert "ids, A 7 to N 11" in out
    assert len(Record.read(Path("runs/a/ckpt/step-00000000")).data_hash) == 64


def test_float64_weights_make_a_float64_run(folder, capsys):
    formats.save(tiny("h3").double(), Path("wide"), "h3")
    run(capsys, "ckpt", "import", "wide", "runs/a")
    assert 'params = "fp64"' in Path("runs/a/config.toml").read_text()
    run(capsys, "ckpt", "export", "runs/a", "out", "--format", "h3")
    a, b = (load_file(f"{path}/{files.WEIGHTS}") for path in ("wide", "out"))
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_features_rounded_otherwise_are_told_and_computed(folder, capsys):
    change_features(written(), 1e-6)
    out = run(capsys, "ckpt", "import", "published-hyenadna", "runs/a", "model.filter.shift=0.0")
    assert "features are computed; those of the file differ by at most 1.0e-06" in out
    assert "shift = 0.0  # command line" in Path("runs/a/config.toml").read_text()


def damage_weights(path: Path) -> None:
    (path / files.WEIGHTS).write_bytes((path / files.WEIGHTS).read_bytes()[:-9])


def change_features(path: Path, by: float = 0.1) -> None:
    tensors = load_file(path / files.WEIGHTS)
    key = "hyena.backbone.layers.0.mixer.filter_fn.pos_emb.z"
    tensors[key] += by
    files.write_folder(path, tensors, {"config.json": files.read_json(path / "config.json")}, replace=True)


def narrow_vocabulary(path: Path) -> None:
    shutil.rmtree(path)
    formats.save(tiny("gla", vocab_size=10, pad_vocab_multiple=1), path, "gla")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["--format", "hyena"], "format: must be one of evo2, gla, h3, hyenadna; got 'hyena'. Did you mean 'hyenadna'?"),
        (None, ["--format", "gla"], "must hold gla weights; its keys are those of hyenadna"),
        (shutil.rmtree, [], "published-hyenadna: must be a folder with config.json and weights"),
        (damage_weights, [], "published-hyenadna/model.safetensors: must be a whole safetensors file"),
        (change_features, [], "blocks.0.mixer.filter.z was trained, and a run computes it"),
        (narrow_vocabulary, [], "model.vocab_size = 10 must be at least 12"),
        (None, ["model.d_model=16"], "model.d_model: must be 8, which the weights have; got 16"),
        (None, ["optim.lrr=1"], "optim.lrr: unknown key; did you mean 'optim.lr'? (command line)"),
        (None, ["data.seq_len=100", "train.batch_tokens=100"], "data.seq_len = 100 must be at most model.max_len = 62"),
        (None, ["data.fasta=nowhere.fa"], "data.fasta: no such file: 'nowhere.fa'"),
        (None, ["run.dir=elsewhere"], "run.dir: must be runs/a, the directory of the import; got elsewhere"),
        (lambda _: Path("runs/a").mkdir(parents=True), [], "runs/a: exists; an import makes a new run"),
        (lambda _: Path("runs").touch(), [], "runs/a: cannot be written: Not a directory"),
    ],
)  # fmt: skip
def test_imports_that_cannot_be_leave_nothing_behind(folder, capsys, prepare, arguments, message):
    source = written()
    if prepare is not None:
        prepare(source)
    before = set(folder.rglob("*"))
    assert main(["ckpt", "import", str(source), "runs/a", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert "import.toml" not in told
    assert set(folder.rglob("*")) == before


def test_exports_that_cannot_be_leave_nothing_behind(folder, capsys):
    run(capsys, "ckpt", "import", str(written()), "runs/a")
    run(capsys, "ckpt", "export", "runs/a", "out", "--format", "hyenadna")
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").touch()
    before = set(folder.rglob("*"))

    def refused(*arguments: str) -> str:
        assert main(["ckpt", "export", *arguments]) == 2
        assert set(folder.rglob("*")) == before
        return capsys.readouterr().err

    assert "got 'onnx'" in refused("runs/a", "new", "--format", "onnx")
    assert "must be a run's directory" in refused("runs", "new", "--format", "gla")
    assert "gla: needs model.arch = 'lm' with mixers of gla" in refused("runs/a", "new", "--format", "gla")
    assert "out: exists; name another folder, or give --force" in refused("runs/a", "out", "--format", "hyenadna")
    assert "this folder also holds a.txt" in refused("runs/a", "notes", "--format", "hyenadna", "--force")
    run(capsys, "ckpt", "export", "runs/a", "out", "--format", "hyenadna", "--force")
    file = folder / "runs/a/ckpt/step-00000000/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert "__0_0.distcp does not have the contents" in refused("runs/a", "new", "--format", "hyenadna")


def test_words_that_are_no_settings_are_refused(folder, capsys):
    for arguments in (["import", "a", "b", "--format", "gla", "c"], ["import", "a", "b", "--fromat=gla"], ["merge"]):
        with pytest.raises(SystemExit) as raised:
            main(["ckpt", *arguments])
        assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
