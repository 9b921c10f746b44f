"""Stopping a run from outside: exit code 75 after a good save, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from seqengine.metrics import read_metrics
from tests.launch.test_cli_runs import ROOT, training_losses
from tests.seqengine.runs import BASE

LONG = BASE.replace("steps = 6", "steps = 400")


def start(folder, *arguments, launcher=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "seqengine", "train", "long.toml", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(folder, step, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if len(read_metrics(folder / "runs/run")) >= step:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


@pytest.mark.slow
def test_a_signal_to_the_command_saves_on_all_ranks_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "long.toml").write_text(LONG)
    first = start(tmp_path, "parallel.sequence=2")
    wait_for_step(tmp_path, 5, first)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "which is saved; the same command goes on from there" in said
    (saved,) = (tmp_path / "runs/run/ckpt").glob("step-????????")
    reached = int(saved.name.removeprefix("step-"))
    assert training_losses(tmp_path)[-1][0] == reached < 400
    again = start(tmp_path, "parallel.sequence=2", f"train.steps={reached + 2}", "--allow-change", "train.steps")
    said, _ = again.communicate(timeout=90)
    assert again.returncode == 0, said
    assert f"resumed at step {reached}" in said
    assert [step for step, _ in training_losses(tmp_path)] == list(range(1, reached + 3))
