"""Runs that tell the class of sequences: the same on every mesh, pretrained on their own inputs, evaluated by accuracy."""

import json
import random
import re
from itertools import product

import pytest
import torch

from seqengine.checkpoint.restore import restore_model
from seqengine.data.recall import accuracy
from seqengine.data.source import open_source
from seqengine.data.stream import read_windows
from seqengine.data.tokenizer import encode
from seqengine.errors import InputError
from seqengine.interop import formats
from seqengine.launch.cli import main
from seqengine.metrics import read_metrics
from seqengine.model import build_model
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget
from tests.seqengine.runs import config, losses, train_on
from tests.seqengine.weights import tiny

CONFIG = """
[model]
arch = "lm"
d_model = 16
n_layer = 2
max_len = 32
vocab_size = 32
pattern = ["gla"]
num_classes = 10
pooling = "mean"
embed_dropout = 0.0
mixers = { gla = { num_heads = 2 } }
[data]
source = "listops"
seq_len = 32
listops = { min_length = 6, max_length = 32, max_depth = 3, max_args = 4, examples = 200, valid_examples = 24 }
[train]
steps = 6
batch_tokens = 256
[optim]
lr = 0.01
[eval]
windows = 24
[log]
every = 1
"""
EXACT = "precision.params=fp64"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test.toml").write_text(CONFIG)
    return tmp_path


def run_in(folder, name, ranks, *settings, **options):
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "test.toml").write_text(CONFIG)
    results = train_on(ranks, place, *settings, **options)
    return losses(place), results


def last(folder, name):
    return [line for line in read_metrics(folder / name / "run") if line.get("split") == "valid"][-1]


def test_every_mesh_tells_the_same_classes(folder):
    expected, _ = run_in(folder, "one", 1, EXACT)
    meshes = {
        "replicas": (2, ()),
        "sequence": (3, ("parallel.sequence=3",)),
        "fsdp2": (2, ("parallel.backend=fsdp2",)),
        "ddp": (2, ("parallel.backend=ddp", "train.micro_batch=2")),
    }
    for name, (ranks, mesh) in meshes.items():
        found, _ = run_in(folder, name, ranks, EXACT, *mesh)
        assert found == pytest.approx(expected, rel=1e-10), name
        assert last(folder, name)["accuracy"] == last(folder, "one")["accuracy"], name
    assert 0.0 <= last(folder, "one")["accuracy"] <= 1.0
    assert last(folder, "one")["windows"] == 24


def test_a_run_pretrained_on_its_own_inputs_gives_its_weights_to_one_with_classes(folder, capfd):
    run_in(folder, "before", 1, "model.num_classes=0")
    source = folder / "before" / "run"
    _, results = run_in(folder, "after", 2, f"train.init_from={source}", "train.steps=1", "optim.lr=1e-12")
    assert "begins with the weights of" in capfd.readouterr().out
    _, before = run_in(folder, "before", 1, "model.num_classes=0")
    after = results[0][1]
    assert torch.allclose(after["model.embedding.weight"], before[0][1]["model.embedding.weight"], atol=1e-6)
    # A second life goes on from its own checkpoint.
    run_in(folder, "after", 2, f"train.init_from={source}", "train.steps=2", "optim.lr=1e-12")
    assert "resumed at step 1" in capfd.readouterr().out


def test_weights_of_another_model_are_refused(folder):
    run_in(folder, "before", 1, "model.num_classes=0", "train.steps=1")
    source = folder / "before" / "run"
    with pytest.raises(AssertionError, match=r"train\.init_from: .* must be of the same \[model\] but for its head"):
        run_in(folder, "after", 1, f"train.init_from={source}", "model.d_model=8", "train.steps=1")
    with pytest.raises(AssertionError, match="must be a run's directory"):
        run_in(folder, "nowhere", 1, "train.init_from=nowhere", "train.steps=1")


def test_evaluation_tells_the_accuracy(folder, capsys):
    run_in(folder, "run", 1)
    capsys.readouterr()
    assert main(["eval", str(folder / "run" / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == last(folder, "run")["accuracy"]
    assert main(["eval", str(folder / "run" / "run"), "--positions"]) == 2
    assert "classes" in capsys.readouterr().err


def test_classes_need_data_with_classes(folder):
    with pytest.raises(InputError, match=r"model\.num_classes"):
        config(folder, "data.source=synthetic", "data.synthetic={ length = 9000 }")
    with pytest.raises(InputError, match=r"model\.num_classes"):
        config(folder, "model.num_classes=3")


TASK = """
[model]
arch = "lm"
d_model = 16
n_layer = 1
max_len = 16
vocab_size = 32
pattern = ["gla"]
embed_dropout = 0.0
mixers = { gla = { num_heads = 2 } }
[data]
source = "induction"
seq_len = 16
recall = { vocab = 8, examples = 64, valid_examples = 20 }
[train]
steps = 2
batch_tokens = 128
[eval]
windows = 20
"""


@pytest.mark.parametrize(("ranks", "mesh"), [(1, ()), (2, ("parallel.sequence=2",))])
def test_tasks_are_evaluated_by_their_answers(tmp_path, ranks, mesh):
    (tmp_path / "test.toml").write_text(TASK)
    train_on(ranks, tmp_path, EXACT, *mesh)
    (line,) = (x for x in read_metrics(tmp_path / "run") if x.get("split") == "valid")
    assert line["evaluated_tokens"] == 20, "only answers count"
    settings = config(tmp_path, EXACT).config
    model, _ = restore_model(CheckpointTarget.find(tmp_path / "run"), settings, Mesh.single(torch.device("cpu")))
    batch = read_windows(open_source(settings.data).windows(16)["valid"], range(20), begin=0, end=16)
    with torch.no_grad():
        assert line["accuracy"] == accuracy(model.eval()(batch.ids), batch.labels)


DNA = """
[model]
arch = "lm"
d_model = 8
n_layer = 2
max_len = 64
num_classes = 3
embed_dropout = 0.0
mixers = { hyena = { filter = { order = 8 } } }
[data]
source = "class_folders"
alphabet = "dna"
seq_len = 24
[train]
steps = 3
batch_tokens = 96
[optim]
lr = 0.05
[eval]
windows = "all"
"""
FROZEN = 'optim.groups=[{ match = "head.*" }, { match = "*", lr_scale = 0 }]'


@pytest.fixture
def dna(tmp_path, monkeypatch):
    """A config of three classes of DNA, `sequences` of 5 to 30 bases, and runs/imported of published weights."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    for split, name in product(("train", "test"), ("exon", "intron", "promoter")):
        place = tmp_path / "sequences" / split / name
        place.mkdir(parents=True)
        for i in range(5):
            (place / f"{i}.txt").write_text("".join(draw.choices("ACGT", k=draw.randint(5, 30))) + "\n")
    (tmp_path / "test.toml").write_text(DNA)
    formats.save(tiny("hyenadna"), tmp_path / "published", "hyenadna")
    assert main(["ckpt", "import", "published", "runs/imported"]) == 0
    return tmp_path


def test_a_head_of_classes_on_published_hidden_states_tells_the_accuracy_of_sequences_one_by_one(dna, capsys):
    """Only the head is trained; evaluation pads and batches, the published model here reads each sequence alone."""
    settings = ("data.folder=sequences", "train.init_from=runs/imported", FROZEN)
    ((loss, weights),) = train_on(1, dna, *settings)
    published = tiny("hyenadna")
    kept = {name.removeprefix("model."): value for name, value in weights.items() if not name.startswith("model.head.")}
    assert kept.keys() == published.state_dict().keys()
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in kept.items())
    model, _ = restore_model(
        CheckpointTarget.find(dna / "run"), config(dna, *settings).config, Mesh.single(torch.device("cpu"))
    )
    told, nats = [], []
    for label, name in enumerate(("exon", "intron", "promoter")):
        for path in sorted((dna / "sequences/test" / name).iterdir()):
            ids = torch.from_numpy(encode(path.read_text().strip()[:24]))[None].long()
            with torch.no_grad():
                hidden = published.hidden(ids)
                assert torch.equal(model.eval().hidden(ids), hidden)
                logits = hidden.mean(dim=1) @ weights["model.head.weight"].T + weights["model.head.bias"]
            told.append(logits.argmax().item() == label)
            nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    assert loss == pytest.approx(sum(nats) / 15, rel=1e-5)
    capsys.readouterr()
    assert main(["eval", str(dna / "run"), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert (evaluation["accuracy"], evaluation["windows"]) == (sum(told) / 15, 15)
    new = build_model(model.config, seed=2222, params="fp32", device=torch.device("cpu")).head.weight
    assert float((weights["model.head.weight"] - new.detach()).abs().max()) > 0.02, (
        "the head learns, at a rate up to 0.05"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.max_len=62", r"functions of t / 64; got t / 62\. Set model\.max_len = 64"),
        ("model.mixers.hyena.filter.shift=0", r"has model\.mixers\.hyena\.filter\.shift = 0\.05, which .*; got 0\.0\. Set it"),
        ("model.norm_eps=1e-6", r"has model\.norm_eps = 1e-05, which the weights were trained with; got 1e-06"),
    ],
)  # fmt: skip
def test_weights_of_the_same_shapes_that_meant_something_else_are_refused(dna, setting, message, capsys):
    settings = ("data.folder=sequences", "train.init_from=runs/imported", setting)
    assert main(["check", "test.toml", *settings]) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(AssertionError, match=message):
        train_on(1, dna, *settings)
