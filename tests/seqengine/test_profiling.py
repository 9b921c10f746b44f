"""Traces of a window of steps."""

import gzip
import json

import pytest
import torch
from pydantic import ValidationError

from seqengine.config.sections import LogSection
from seqengine.data.source import open_source
from seqengine.errors import InputError
from seqengine.parallel.mesh import Mesh
from seqengine.preemption import StopRequest
from seqengine.profiling import Profiler
from seqengine.train import Trainer
from tests.seqengine.runs import config


def trace(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def work() -> None:
    torch.ones(4, 4) @ torch.ones(4, 4)


def test_a_window_of_a_training_run_is_traced(tmp_path):
    loaded = config(tmp_path, "log.profile_step=2", "log.profile_steps=1", "model.n_layer=1")
    device = torch.device("cpu")
    with StopRequest((), tmp_path / "stop") as stop:
        trainer = Trainer(loaded, open_source(loaded.config.data), Mesh.single(device), stop)
        try:
            for _ in range(3):
                trainer.step()
        finally:
            trainer.close()
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name == "rank-0-step-2.json.gz"
    names = {event.get("name", "") for event in trace(file)}
    assert any(name.startswith("aten::") for name in names)
    assert any("backward" in name.lower() for name in names)


def test_only_the_steps_of_the_window_are_in_it(tmp_path):
    profiler = Profiler(LogSection(profile_step=3, profile_steps=2), tmp_path, 7)
    for step in range(1, 8):
        profiler.step(step)
        work()
    profiler.close()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank-7-step-3.json.gz"
    assert sum(event.get("name") == "aten::matmul" for event in trace(file)) == 2


def test_a_run_that_ends_or_begins_inside_the_window_leaves_what_there_was(tmp_path):
    log = LogSection(profile_step=3, profile_steps=5)
    profiler = Profiler(log, tmp_path, 0)
    profiler.step(6)
    work()
    profiler.close()
    profiler.close()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank-0-step-6.json.gz"]


def test_a_second_profiler_is_refused(tmp_path):
    first, second = (Profiler(LogSection(profile_step=1), tmp_path / name, 0) for name in "ab")
    first.step(1)
    with pytest.raises(RuntimeError, match="another profiler runs in this process"):
        second.step(1)
    first.close()
    assert not (tmp_path / "b").exists()


def test_by_default_nothing_is_traced(tmp_path):
    profiler = Profiler(LogSection(), tmp_path, 0)
    for step in range(3):
        profiler.step(step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_memory_snapshot_needs_cuda_and_steps(tmp_path):
    with pytest.raises(ValidationError, match=r"log\.memory_snapshot needs the steps of log\.profile_step"):
        LogSection(memory_snapshot=True)
    with pytest.raises(InputError, match=r"log\.memory_snapshot: needs CUDA; got cpu"):
        Profiler(LogSection(memory_snapshot=True, profile_step=1), tmp_path, 0, torch.device("cpu"))
