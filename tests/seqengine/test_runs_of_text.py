"""Training on text, documents, tasks and mixtures: the same run on every mesh, and what such runs write."""

import pytest
import torch

from seqengine.codec import TOKENIZER, DnaCodec, codec_of
from seqengine.config.load import load
from seqengine.errors import InputError
from seqengine.launch.cli import main
from seqengine.rundir import RunDirectory
from tests.seqengine.data.sources import SEPARATOR, documents
from tests.seqengine.runs import losses, train_on

CONFIG = """
[model]
arch = "lm"
d_model = 16
n_layer = 2
max_len = 64
vocab_size = 320
pattern = ["hyena", "gla"]
embed_dropout = 0.0
mixers = { gla = { num_heads = 2 } }
[data]
source = "text"
separator = "\\n\\n\\n"
files = ["FOLDER/text.txt"]
valid_fraction = 0.2
seq_len = 64
[train]
steps = 6
batch_tokens = 512
[optim]
lr = 0.01
[eval]
windows = 4
[log]
every = 1
"""
SEPARATE = 'data.documents="separate"'
EXACT = "precision.params=fp64"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(SEPARATOR.join(documents(120)), encoding="utf-8")
    (tmp_path / "test.toml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return tmp_path


def run_in(folder, name, ranks, *settings):
    """Losses of a run of its own directory."""
    place = folder / name
    place.mkdir()
    (place / "test.toml").write_text((folder / "test.toml").read_text())
    results = train_on(ranks, place, *settings)
    return losses(place), results[0][0]


@pytest.mark.parametrize("how", [(), (SEPARATE,)], ids=["joined", "separate"])
def test_text_trains_the_same_run_on_every_mesh(folder, how):
    expected, valid = run_in(folder, "one", 1, EXACT, *how)
    for name, ranks, mesh in (
        ("replicas", 2, ()),
        ("sequence", 2, ("parallel.sequence=2",)),
        ("workers", 1, ("data.workers=4",)),
    ):
        found, found_valid = run_in(folder, name, ranks, EXACT, *how, *mesh)
        assert found == pytest.approx(expected, rel=1e-10), name
        assert found_valid == pytest.approx(valid, rel=1e-10), name
    assert expected[-1] < expected[0]


def test_documents_that_stand_apart_are_another_run(folder):
    assert run_in(folder, "joined", 1)[0] != run_in(folder, "apart", 1, SEPARATE)[0]


def test_documents_and_mixers_that_carry_over_them_do_not_begin(folder):
    with pytest.raises(InputError, match=r"data\.documents = 'separate': slstm cannot begin anew inside a window"):
        run_in(folder, "bad", 1, SEPARATE, 'model.pattern=["slstm"]')


def test_masked_text_trains(folder):
    found, _ = run_in(folder, "masked", 2, "model.causal=false", 'model.pattern=["attention"]', "parallel.sequence=2")
    assert found[-1] < found[0]


def test_a_run_of_text_writes_text_without_its_data(folder, capsys):
    place = folder / "run"
    run = place / "run"
    run_in(folder, "run", 1, 'data.tokenizer="train"', "data.tokenizer_vocab=300")
    assert (run / TOKENIZER).is_file()
    (folder / "text.txt").unlink()
    assert main(["generate", str(run), "--prompt", "the tree", "-n", "12", "--seed", "3"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("the tree")
    assert len(alone) > len("the tree\n")
    assert main(["generate", str(run), "--prompt", "the tree", "--prompt", "λ", "-n", "12", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("λ")
    assert main(["generate", str(run), "--prompt", "", "-n", "3"]) == 2
    assert "--prompt: must hold at least one token" in capsys.readouterr().err


def test_codecs_of_other_runs(tmp_path):
    data = load("demo", [], need_data=False).config.data
    codec = codec_of(tmp_path, data)
    assert isinstance(codec, DnaCodec)
    assert codec.decode(codec.encode("acgtn")) == "ACGTN"
    recall = load(
        "demo",
        ["data.source=recall", "model.vocab_size=32", "data.seq_len=40", "train.batch_tokens=400"],
        need_data=False,
    )
    with pytest.raises(InputError, match="a run of recall has no text"):
        codec_of(tmp_path, recall.config.data)


def test_averaged_weights_are_evaluated_saved_and_chosen(folder, capsys):
    settings = ("optim.ema=0.5", "optim.z_loss=0.001")
    whole, _ = run_in(folder, "whole", 1, *settings)
    place = folder / "cut"
    place.mkdir()
    (place / "test.toml").write_text((folder / "test.toml").read_text())
    train_on(1, place, *settings, stop_at=2)
    train_on(1, place, *settings)
    assert losses(place) == whole
    lines = [line for line in (place / "run" / "metrics.jsonl").read_text().splitlines() if "valid_ema" in line]
    assert len(lines) == 1
    outcomes = {}
    for flag in ((), ("--ema",)):
        assert main(["eval", str(place / "run"), *flag, "--json"]) == 0
        outcomes[flag] = capsys.readouterr().out
    assert f'"loss": {__import__("json").loads(lines[0])["loss"]:.4f}'[:14] in outcomes[("--ema",)]
    assert outcomes[()] != outcomes[("--ema",)]
    run_in(folder, "plain", 1)
    assert main(["eval", str(folder / "plain" / "run"), "--ema"]) == 2
    assert "must be a run with optim.ema" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks_train_the_same_run(folder, ranks):
    mesh = ("parallel.sequence=2",) if ranks == 2 else ()
    small = (EXACT, *mesh, "train.steps=2", "model.n_layer=1", 'model.pattern=["gla"]')
    expected, _ = run_in(folder, "plain", ranks, *small)
    found, _ = run_in(folder, "compiled", ranks, *small, "compile.enable=true", 'compile.backend="aot_eager"')
    assert found == pytest.approx(expected, rel=1e-10)


def test_muon_in_a_run_is_the_same_sharded_or_not(folder):
    expected, _ = run_in(folder, "one", 1, EXACT, "optim.name=muon")
    found, _ = run_in(folder, "two", 2, EXACT, "optim.name=muon", "parallel.backend=fsdp2")
    assert found == pytest.approx(expected, rel=1e-8)
    assert torch.tensor(found).isfinite().all()


def test_a_run_directory_reads_back(folder):
    run_in(folder, "back", 1)
    assert RunDirectory(folder / "back" / "run").read_config().config.data.source == "text"
