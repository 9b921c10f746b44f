"""A long run leaks nothing: memory, open files, threads and processes stay as they are after the first steps."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import seqengine.train as train_module
from seqengine.config.load import Loaded
from seqengine.data.source import open_source
from seqengine.metrics import read_metrics
from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks_to_their_end
from tests.seqengine.runs import config

STEPS, SETTLED, PERIOD = 1000, 100, 50
SETTINGS = [f"train.steps={STEPS}", "train.batch_tokens=32", "data.seq_len=16", "model.n_layer=1", "model.max_len=16",
            "ckpt.every=100", "ckpt.async=true", "ckpt.keep=2", "eval.every=200", "eval.windows=4", "data.workers=2",
            "log.every=10", "log.samples=true"]  # fmt: skip
MOST_GROWTH = 0.02
LIMIT_SECONDS = 280


def _sample() -> dict[str, int]:
    """Of this process, once the checkpoint under way is written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = [task / "children" for task in Path("/proc/self/task").iterdir()]
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "processes": sum(len(path.read_text().split()) for path in children if path.exists()),
    }


def _train(group: Any, loaded: Loaded) -> list[dict[str, int]]:
    """Samples after every PERIOD steps, from step SETTLED + PERIOD / 2 on."""
    samples = []

    class Watched(train_module.Trainer):
        def step(self) -> train_module.StepResult:
            result = super().step()
            if self.progress.step >= SETTLED and self.progress.step % PERIOD == PERIOD // 2:
                samples.append(_sample())
            return result

    train_module.Trainer = Watched
    train_module.train(loaded, open_source(loaded.config.data), Mesh.create(group.size(), 1, torch.device("cpu")))
    return samples


@pytest.mark.slow
def test_1000_steps_on_two_ranks_keep_memory_files_threads_and_processes(tmp_path):
    loaded = config(tmp_path, *SETTINGS)
    open_source(loaded.config.data)
    outcomes = run_ranks_to_their_end(2, _train, loaded, timeout_seconds=60, limit_seconds=LIMIT_SECONDS)
    for rank, outcome in enumerate(outcomes):
        assert outcome.has_result, (rank, outcome.error)
        samples = outcome.result
        assert len(samples) == (STEPS - SETTLED) // PERIOD
        memory = [sample["memory"] for sample in samples]
        assert max(memory) <= memory[0] * (1 + MOST_GROWTH), (rank, memory)
        for name in ("files", "threads", "processes"):
            assert {sample[name] for sample in samples} == {samples[0][name]}, (rank, name, samples)
    lines = read_metrics(tmp_path / "run")
    assert sum("split" in line for line in lines) == STEPS // 200
    assert sorted(path.name for path in (tmp_path / "run" / "ckpt").iterdir()) == [
        "latest", "step-00000900", "step-00001000",
    ]  # fmt: skip
