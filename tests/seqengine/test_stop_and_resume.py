"""A run that is stopped goes on as if it had not been, on the same ranks or on others."""

import json
import os
import signal

import pytest

from seqengine.train import Preempted, Trainer
from tests.seqengine.runs import is_same, losses, train_on

COMMON = ("train.steps=12", "log.samples=true", "ckpt.keep=20")


def samples(folder, num_ranks):
    """{step: sorted (sample, epoch, window) that the ranks read}, each as often as it was read."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for rank in range(num_ranks):
        for text in (folder / "run" / "samples" / f"rank-{rank}.jsonl").read_text().splitlines():
            line = json.loads(text)
            read = [(s, *w) for s, w in zip(line["samples"], line["windows"], strict=True)]
            found.setdefault(line["step"], []).extend(read)
    return {step: sorted(read) for step, read in found.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    results = train_on(2, folder, *COMMON)
    return folder, results


def test_two_one_three_two_ranks_read_exactly_the_samples_of_an_uninterrupted_run(tmp_path, uninterrupted):
    folder, _ = uninterrupted
    expected = samples(folder, 2)
    lives = [(2, 3, ()), (1, 6, ()), (3, 9, ("parallel.sequence=3",)), (2, None, ())]
    history = {}
    for num_ranks, stop_at, mesh in lives:
        results = train_on(num_ranks, tmp_path, *COMMON, *mesh, stop_at=stop_at)
        assert all((loss is None) == (stop_at is not None) for loss, _ in results)
        for step, read in samples(tmp_path, num_ranks).items():
            # Ranks that split a window all read the sample; replicas read different ones.
            history[step] = sorted(set(read)) if mesh else read
        for file in (tmp_path / "run" / "samples").iterdir():
            file.unlink()  # the next life has other ranks
    assert history == expected
    assert losses(tmp_path) == pytest.approx(losses(folder), rel=1e-6)


def test_all_ranks_save_the_step_at_which_one_was_asked_and_the_run_goes_on_bit_for_bit(tmp_path, uninterrupted):
    folder, whole = uninterrupted
    train_on(2, tmp_path, *COMMON, stop_at=5)
    # Asked during step 6's messages, or before: the ranks agree at the end of the next step.
    assert [p.name for p in (tmp_path / "run" / "ckpt").glob("step-*")] == ["step-00000006"]
    cut = train_on(2, tmp_path, *COMMON)
    assert losses(tmp_path) == losses(folder)
    assert all(is_same(a, b) for (_, a), (_, b) in zip(whole, cut, strict=True))


@pytest.mark.parametrize("where", ["step", "evaluate", "save"])
def test_a_signal_to_one_rank_wherever_it_is_stops_all_at_the_same_step(tmp_path, monkeypatch, where, capfd):
    plain = getattr(Trainer, where)

    def interrupted(self, *arguments):
        if self.mesh.rank == 1 and self.progress.step >= 3 and not getattr(self, "signalled", False):
            self.signalled = True
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain(self, *arguments)

    monkeypatch.setattr(Trainer, where, interrupted)
    results = train_on(2, tmp_path, *COMMON, "eval.every=2", "ckpt.every=4")
    assert [loss for loss, _ in results] == [None, None]
    newest = sorted((tmp_path / "run" / "ckpt").glob("step-????????"))[-1]
    assert newest.name in ("step-00000004", "step-00000005")
    monkeypatch.undo()
    results = train_on(2, tmp_path, *COMMON, "eval.every=2", "ckpt.every=4")
    assert None not in [loss for loss, _ in results]


def test_a_stop_file_stops_the_run_and_is_removed(tmp_path, uninterrupted):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    results = train_on(2, tmp_path, *COMMON)
    assert [loss for loss, _ in results] == [None, None]
    assert not (tmp_path / "run" / "stop").exists()
    train_on(2, tmp_path, *COMMON)
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_preempted_says_what_to_do():
    assert "step 7, which is saved; the same command goes on" in str(Preempted("SIGTERM", 7))


def test_a_loss_spike_goes_back_and_leaves_the_samples_out(tmp_path, monkeypatch, capfd):
    from seqengine.spikes import SpikeDetector

    seen = []

    def third_time(self, loss):
        seen.append(loss)
        return len(seen) == 7

    monkeypatch.setattr(SpikeDetector, "is_spike", third_time)
    train_on(1, tmp_path, *COMMON, "train.spike=rewind", "ckpt.every=4")
    read = samples(tmp_path, 1)
    rows = 8
    first = [read[step][0][0] for step in sorted(read)]
    # Steps 5 to 7 were undone, and what they read (samples 32 to 55) is read no more.
    assert first == [rows * step for step in (0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14)]
    assert len(losses(tmp_path)) == 12
    assert "loss spike at step 7" in capfd.readouterr().out


def test_a_step_that_is_not_finite_is_reported_with_its_samples_and_layers(tmp_path, monkeypatch):
    monkeypatch.setattr("seqengine.backends.backend.Backend.finish", _poison)
    train_on(1, tmp_path, *COMMON, "train.nonfinite=skip")
    (report,) = (tmp_path / "run" / "nonfinite").glob("*.json")
    content = json.loads(report.read_text())
    assert content["step"] == 3
    assert content["samples"] == list(range(16, 24))
    assert "blocks.0.norm1.weight" in json.dumps(content)


def _poison(self):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 3:
        self.model.blocks[0].norm1.weight.grad.fill_(float("nan"))


def test_other_data_are_refused_on_resume(tmp_path):
    train_on(1, tmp_path, *COMMON, stop_at=2)
    with pytest.raises(AssertionError, match=r"was trained on other data|was started with"):
        train_on(1, tmp_path, *COMMON, "data.synthetic.seed=9", allow_changes=("data.synthetic.seed",))
