"""A job whose worker is killed starts again by itself, and its history has no gap, no repetition and no other weights."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from seqengine.checkpoint.reading import TensorReader
from seqengine.checkpoint.store import LATEST
from seqengine.metrics import read_metrics
from seqengine.watchdog import read_beats
from tests.seqengine.runs import BASE, train_on

ROOT = Path(__file__).parent.parent.parent
STEPS, WINDOWS = 80, 4
SETTINGS = ["model.n_layer=1", "model.embed_dropout=0.1", f"train.steps={STEPS}", f"train.batch_tokens={32 * WINDOWS}",
            "log.samples=true", "ckpt.every=8", "ckpt.async=true", "ckpt.keep=2", "eval.windows=2",
            "parallel.replicate=2"]  # fmt: skip
LIMIT_SECONDS = 120
CORES = 2
"""So many threads a process has here and there: on more, sums may be rounded otherwise."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train_on(2, folder, *SETTINGS)
    return folder / "run"


class Job:
    """A command in a process of its own, and its workers, known by their heartbeats."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        (folder / "run.toml").write_text(BASE)
        words = ["train", f"{folder}/run.toml", f"run.dir={folder}/run", f"data.cache={folder}/cache", *SETTINGS]
        self.run = folder / "run"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    *command,
                    *words,
                    *(["--max-restarts", "3"] if command == ["seqengine"] else []),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_keep_to_few_cores,
            )

    def wait_for_step(self, step: int) -> None:
        """Until the metrics have it, and a checkpoint is whole: steps do not wait for the thread that writes."""
        end = time.monotonic() + LIMIT_SECONDS
        latest = self.run / "ckpt" / LATEST
        while not (latest.exists() and any(line["step"] >= step for line in read_metrics(self.run))):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def kill_worker(self, rank: int) -> None:
        pids = {beat.rank: beat.pid for beat in read_beats(self.run)}
        os.kill(pids[rank], signal.SIGKILL)

    def end(self) -> str:
        """Its output, once it has ended with exit code 0."""
        code = self.process.wait(LIMIT_SECONDS)
        said = self.log.read_text()
        assert code == 0, said
        return said

    def end_all(self) -> None:
        """The command and its workers, whatever they do."""
        if self.process.poll() is None:
            workers = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in (self.process.pid, *map(int, workers)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def _keep_to_few_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


@pytest.fixture
def start(tmp_path):
    jobs = []

    def job(command: list[str]) -> Job:
        jobs.append(Job(tmp_path, command))
        return jobs[-1]

    yield job
    for each in jobs:
        each.end_all()


def contents(run: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint: weights, moments, random states."""
    reader = TensorReader(run / "ckpt" / f"step-{STEPS:08d}")
    tensors = reader.empty(list(reader.shapes))
    reader.fill(tensors)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def history(run: Path) -> list[tuple[int, list[int]]]:
    """(step, samples) of all ranks, in the order of steps and of samples."""
    lines = [
        json.loads(line) for path in (run / "samples").glob("rank-*.jsonl") for line in path.read_text().splitlines()
    ]
    steps = sorted({line["step"] for line in lines})
    return [(step, sorted(s for line in lines if line["step"] == step for s in line["samples"])) for step in steps]


def check_equal(run: Path, whole: Path) -> None:
    every = [(step, list(range((step - 1) * WINDOWS, step * WINDOWS))) for step in range(1, STEPS + 1)]
    assert history(whole) == every
    assert history(run) == every
    assert contents(run) == contents(whole)
    figures = [[(line["step"], line["loss"], "split" in line) for line in read_metrics(of)] for of in (run, whole)]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_killed_worker_costs_no_sample_and_changes_no_weight(start, whole):
    job = start(["seqengine"])
    job.wait_for_step(13)
    job.kill_worker(1)
    said = job.end()
    assert "killed by SIGKILL" in said
    assert "starting all processes again (1 of 3)" in said
    assert "resumed at step" in said
    check_equal(job.run, whole)


@pytest.mark.slow
def test_under_torchrun_too(start, whole):
    job = start(["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "seqengine"])
    job.wait_for_step(13)
    job.kill_worker(0)
    assert "resumed at step" in job.end()
    check_equal(job.run, whole)
