"""The training loop: every mesh the same run, exact resume, guards, metrics."""

import json
import math

import pytest
import torch

from seqengine.data.source import Batch, open_source
from seqengine.data.stream import Stream
from seqengine.metrics import read_metrics
from seqengine.parallel.mesh import Mesh
from seqengine.preemption import StopRequest
from seqengine.train import Trainer
from tests.ranks import run_ranks
from tests.seqengine.runs import config, is_same, losses, train_on


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses and gradient norms of a run in one process, in float64."""
    folder = tmp_path_factory.mktemp("one")
    final, _ = train_on(1, folder, "precision.params=fp64", "data.rc_prob=0.5")[0]
    return losses(folder), losses(folder, "grad_norm"), final


@pytest.mark.parametrize(("replicate", "sequence"), [(1, 2), (2, 1), (1, 3), (2, 2), (1, 4), (4, 1)])
def test_every_mesh_trains_the_same_run(tmp_path, one_process, replicate, sequence):
    final, _ = train_on(
        replicate * sequence, tmp_path, "precision.params=fp64", "data.rc_prob=0.5", f"parallel.sequence={sequence}"
    )[0]
    expected_losses, expected_norms, expected_final = one_process
    assert losses(tmp_path) == pytest.approx(expected_losses, rel=1e-10)
    assert losses(tmp_path, "grad_norm") == pytest.approx(expected_norms, rel=1e-9)
    assert final == pytest.approx(expected_final, rel=1e-10)


def test_micro_batches_do_not_change_the_run(tmp_path, one_process):
    train_on(1, tmp_path, "precision.params=fp64", "data.rc_prob=0.5", "train.micro_batch=2")
    assert losses(tmp_path) == pytest.approx(one_process[0], rel=1e-10)


def test_dropout_does_not_depend_on_the_mesh_or_on_micro_batches(tmp_path):
    runs = {}
    for name, ranks, more in (("a", 1, []), ("b", 4, ["parallel.sequence=2"]), ("c", 1, ["train.micro_batch=1"])):
        folder = tmp_path / name
        folder.mkdir()
        train_on(ranks, folder, "precision.params=fp64", "model.embed_dropout=0.3", "model.resid_dropout=0.2", *more)
        runs[name] = losses(folder)
    assert runs["b"] == pytest.approx(runs["a"], rel=1e-10)
    assert runs["c"] == pytest.approx(runs["a"], rel=1e-10)


def test_ranks_hold_the_same_weights_bit_for_bit(tmp_path):
    results = train_on(4, tmp_path, "parallel.sequence=2")
    assert all(is_same(weights, results[0][1]) for _, weights in results)


def test_resume_on_the_same_mesh_is_bitwise(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = train_on(2, tmp_path / "whole", "parallel.sequence=2", "model.embed_dropout=0.1")
    common = ["parallel.sequence=2", "model.embed_dropout=0.1", "ckpt.every=4"]
    # The schedule is that of six steps in both lives: the first is killed after its checkpoint of step 4.
    train_on(2, tmp_path / "cut", *common)
    last = tmp_path / "cut" / "run" / "ckpt" / "step-00000006"
    assert last.is_dir()
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    cut = train_on(2, tmp_path / "cut", *common)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for (loss_a, weights_a), (loss_b, weights_b) in zip(whole, cut, strict=True):
        assert loss_a == loss_b
        assert is_same(weights_a, weights_b)


def test_resume_on_another_mesh_reads_the_same_samples_and_goes_on_with_the_same_losses(tmp_path, one_process):
    common = ["precision.params=fp64", "data.rc_prob=0.5"]
    train_on(2, tmp_path, *common, "parallel.sequence=2", "ckpt.every=3")
    for step in (6,):
        directory = tmp_path / "run" / "ckpt" / f"step-{step:08d}"
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    final, _ = train_on(4, tmp_path, *common, "parallel.sequence=1")[0]
    assert losses(tmp_path) == pytest.approx(one_process[0], rel=1e-10)
    assert final == pytest.approx(one_process[2], rel=1e-10)


def test_ranks_of_any_mesh_together_read_each_sample_once(tmp_path, monkeypatch):
    loaded = config(tmp_path, "data.workers=0")  # no thread reads on after the step
    source = open_source(loaded.config.data)
    read = []

    def batch(self, first, rows, *, begin, end):
        read.extend((sample, token) for sample in range(first, first + rows) for token in range(begin, end))
        nothing = torch.zeros(rows, end - begin, dtype=torch.int64)
        return Batch(nothing, nothing, None)

    monkeypatch.setattr(Stream, "batch", batch)
    for replica in range(2):
        mesh = Mesh(replica, 2, replica, 2, None, None, torch.device("cpu"))
        trainer = Trainer(loaded, source, mesh, StopRequest((), None))
        trainer.progress.samples = 24
        trainer.step()
    assert sorted(read) == [(sample, token) for sample in range(24, 32) for token in range(32)]


def test_running_a_finished_run_again_trains_nothing(tmp_path, capfd):
    train_on(1, tmp_path)
    before = losses(tmp_path)
    checkpoint = (tmp_path / "run" / "ckpt" / "step-00000006" / "MANIFEST.sha256").read_bytes()
    train_on(1, tmp_path)
    assert losses(tmp_path) == before
    assert (tmp_path / "run" / "ckpt" / "step-00000006" / "MANIFEST.sha256").read_bytes() == checkpoint
    assert "the run is complete at step 6" in capfd.readouterr().out


def test_metrics_lines_hold_what_they_promise(tmp_path):
    train_on(2, tmp_path, "parallel.sequence=2", "eval.every=3")
    lines = read_metrics(tmp_path / "run")
    training = [line for line in lines if "split" not in line]
    keys = "step tokens loss bits_per_token lr grad_norm tokens_per_second peak_memory_bytes seconds"
    assert all(set(keys.split()) <= set(line) for line in training)
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in training] == [256 * step for step in range(1, 7)]
    assert training[0]["loss"] == pytest.approx(math.log(16), rel=0.05)
    assert all(line["bits_per_token"] == pytest.approx(line["loss"] / math.log(2)) for line in lines)
    valid = [line for line in lines if line.get("split") == "valid"]
    assert [line["step"] for line in valid] == [3, 6]
    assert all(line["windows"] == 6 for line in valid)


def test_run_directory_holds_the_config_with_origins_and_the_environment(tmp_path):
    train_on(1, tmp_path, "optim.lr=0.02")
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "lr = 0.02  # command line" in text
    assert f"d_model = 8  # {tmp_path}/test.toml:3" in text
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"seqengine", "torch", "python"} <= set(environment["versions"])
    assert len(environment["data_hash"]) == 64


def test_changed_keys_are_refused_on_resume_unless_allowed(tmp_path):
    train_on(1, tmp_path)
    with pytest.raises(AssertionError, match=r"optim\.lr: .* was started with 0\.01, got 0\.5 \(command line\)"):
        train_on(1, tmp_path, "optim.lr=0.5", "train.steps=8")
    train_on(1, tmp_path, "optim.lr=0.5", "train.steps=8", allow_changes=("optim.lr",))
    assert len(losses(tmp_path)) == 8


def test_other_data_are_refused_on_resume(tmp_path):
    train_on(1, tmp_path)
    with pytest.raises(AssertionError, match="was trained on other data"):
        train_on(1, tmp_path, "data.synthetic.seed=7", "train.steps=8", allow_changes=("data.synthetic",))


def test_a_loss_that_is_not_finite_stops_every_rank_with_the_weights_of_the_step_before(tmp_path):
    with pytest.raises(AssertionError, match=r"TrainingError: step 2: loss nan"):
        train_on(2, tmp_path, "parallel.sequence=2", "optim.lr=1e30", "train.clip=0")
    assert not (tmp_path / "run" / "ckpt").exists()


def test_steps_that_are_not_finite_can_be_skipped(tmp_path, capfd):
    train_on(
        2, tmp_path, "parallel.sequence=2", "optim.lr=1e30", "train.clip=0", "train.nonfinite=skip", "train.steps=3"
    )
    assert "skipped a step that is not finite: step 2" in capfd.readouterr().out


def test_training_learns_the_lag_of_the_synthetic_genome(tmp_path):
    final, _ = train_on(
        1, tmp_path, "model.d_model=32", "train.steps=150", "train.batch_tokens=2048", "log.every=50", "data.rc_prob=0"
    )[0]
    assert final < 1.25, "nats per base; an order-2 Markov chain alone is at 1.33"


def _ranks_with_different_configs(group, folder):
    loaded = config(folder, "parallel.sequence=2", *(["optim.lr=0.5"] if group.rank() == 1 else []))
    mesh = Mesh.create(1, 2, torch.device("cpu"))
    try:
        Trainer(loaded, open_source(loaded.config.data), mesh, StopRequest((), None))
    except ValueError as error:
        return str(error)
    return "nothing was said"


def test_ranks_with_different_configs_do_not_begin(tmp_path):
    open_source(config(tmp_path).config.data)
    for said in run_ranks(2, _ranks_with_different_configs, tmp_path):
        assert "the config must be the same on every rank; got rank 1" in said
        assert '"lr": 0.5' in said


def _mixer_without_context(group, folder):
    loaded = config(folder, "parallel.sequence=2")
    trainer = Trainer(
        loaded, open_source(loaded.config.data), Mesh.create(1, 2, torch.device("cpu")), StopRequest((), None)
    )
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer \(Hyena\): a sequence mixer must get the SequenceContext"):
        trainer.model(torch.zeros(1, 4, dtype=torch.int64))


def test_a_model_of_several_sequence_ranks_refuses_to_run_on_a_shard_alone(tmp_path):
    open_source(config(tmp_path).config.data)
    run_ranks(2, _mixer_without_context, tmp_path)
