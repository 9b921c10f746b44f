"""The command as a user types it, in processes of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqengine.launch.cli import main
from seqengine.metrics import read_metrics
from tests.seqengine.runs import BASE

ROOT = Path(__file__).parent.parent.parent
CONFIG = BASE.replace("every = 1\n", "every = 2\n").replace("every = 1000", "every = 3")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.toml").write_text(CONFIG)
    return tmp_path


def seqengine(folder: Path, *arguments: str, code: int = 0, launcher: tuple[str, ...] = (), timeout: int = 120) -> str:
    """Standard output of a command that must end with `code`."""
    command = [sys.executable, *launcher, "-m", "seqengine", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def here(folder: Path, *arguments: str, code: int = 0) -> None:
    """The same in this process, where that is not what a test is of."""
    with contextlib.chdir(folder):
        assert main(list(arguments)) == code


def training_losses(folder: Path, run: str = "runs/run") -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / run) if "split" not in line]


def test_train_starts_its_processes_resumes_and_evaluates_on_one(folder, capsys):
    out = seqengine(folder, "train", "small.toml", "parallel.sequence=2")
    assert "step 6/6" in out
    assert [step for step, _ in training_losses(folder)] == [2, 4, 6]
    again = seqengine(folder, "train", "small.toml", "parallel.sequence=2", "train.steps=8")
    assert "resumed at step 6" in again
    assert "bit for bit" in again
    assert [step for step, _ in training_losses(folder)] == [2, 4, 6, 8]
    trained = [line for line in read_metrics(folder / "runs/run") if line.get("split") == "valid"][-1]
    here(folder, "eval", "runs/run", "parallel.sequence=1", "--json")
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["step"] == 8
    assert evaluated["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    older = seqengine(folder, "eval", "runs/run/ckpt/step-00000003")
    assert "step-00000003 (verified): loss" in older


def test_generate_goes_on_where_prompts_end(folder, monkeypatch, capsys):
    here(folder, "train", "small.toml", "train.steps=2")
    capsys.readouterr()
    line = seqengine(folder, "generate", "runs/run", "--prompt", "acGTN", "-n", "20", "--seed", "3").rstrip("\n")
    assert line.startswith("acGTN")
    assert len(line) == 25
    assert set(line[5:]) <= set("ACGT")
    monkeypatch.chdir(folder)

    def generate(*arguments, code=0):
        assert main(["generate", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    two = generate("runs/run", "--prompt", "acGTN", "--prompt", "A", "-n", "20", "--seed", "3").splitlines()
    assert two[0] == line
    assert (two[1][0], len(two[1])) == ("A", 21)
    checkpoint = str(next(Path("runs/run/ckpt").glob("step-*")))
    greedy = ("--prompt", "ACGT", "-n", "5", "--temperature", "0")
    assert generate(checkpoint, *greedy, "--seed", "1") == generate(checkpoint, *greedy, "--seed", "2")
    assert len(generate("runs/run", *greedy, "--distill", "4").strip()) == 9
    assert "must be a number of modes" in generate("runs/run", *greedy, "--distill", "many", code=2)
    assert "got 'auto'" in generate("runs/run", *greedy, "--distill", "auto", code=2)
    assert "order and max_order must be at least 1" in generate("runs/run", *greedy, "--distill", "0", code=2)
    assert main(["generate", "runs/run", *greedy, "--distill", "auto:1e-3"]) == 0
    assert "modes for 66 taps; errors at most: " in capsys.readouterr().err
    assert "got 'X' at position 4" in generate("runs/run", "--prompt", "ACGTX", code=2)
    assert "temperature must be >= 0" in generate("runs/run", "--prompt", "A", "--temperature", "-1", code=2)
    assert "at least one token" in generate("runs/run", "--prompt", "", code=2)
    assert "filters reach over 66" in generate("runs/run", "--prompt", "A", "-n", "90", code=2)
    assert "must be a run's directory" in generate("runs", "--prompt", "A", code=2)


def test_torchrun_trains_the_same_run_with_replicas(folder):
    here(folder, "train", "small.toml", "run.name=one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    seqengine(folder, "train", "small.toml", "run.name=four", "parallel.sequence=2", launcher=launcher)
    one, four = training_losses(folder, "runs/one"), training_losses(folder, "runs/four")
    assert [s for s, _ in one] == [s for s, _ in four]
    assert [x for _, x in four] == pytest.approx([x for _, x in one], abs=1e-4)
    environment = json.loads((folder / "runs/four/environment.json").read_text())
    assert environment["mesh"] == {"replicate": 2, "shard": 1, "sequence": 2, "backend": "none"}


def test_a_killed_run_goes_on_from_its_last_checkpoint(folder):
    here(folder, "train", "small.toml", "run.name=whole", "train.steps=40", "log.every=1", "ckpt.every=5")
    command = [
        sys.executable,
        "-m",
        "seqengine",
        "train",
        "small.toml",
        "run.name=cut",
        "train.steps=40",
        "log.every=1",
        "ckpt.every=5",
    ]
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (folder / "runs/cut/ckpt/latest").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    out = seqengine(folder, "train", "small.toml", "run.name=cut", "train.steps=40", "log.every=1", "ckpt.every=5")
    assert "resumed at step" in out or "complete" in out
    assert training_losses(folder, "runs/cut") == training_losses(folder, "runs/whole")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(folder):
    here(folder, "train", "small.toml")
    file = folder / "runs/run/ckpt/step-00000006/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    out = seqengine(folder, "train", "small.toml")
    assert "passed over a damaged checkpoint: step-00000006: __0_0.distcp does not have the contents" in out
    assert "resumed at step 3" in out
    assert [step for step, _ in training_losses(folder)] == [2, 4, 6]


def test_failures_keep_their_exit_code_through_the_launcher(folder, capsys):
    seqengine(folder, "train", "small.toml", "parallel.sequence=2", "run.name=x")
    here(folder, "train", "small.toml", "parallel.sequence=2", "run.name=x", "optim.lr=0.5", code=2)
    assert "optim.lr: runs/x was started with" in capsys.readouterr().err
    message = seqengine(folder, "train", "small.toml", "parallel.sequence=2", "optim.lr=1e30", "train.clip=0", code=1)
    assert "loss nan" in message or "gradient norm" in message


def test_check_and_version(folder, capsys):
    here(folder, "check", "small.toml")
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "train windows" in out
    assert out.endswith("ok\n")
    assert "seqengine 0.1.0" in seqengine(folder, "version")


def test_tensorboard_events_are_written_when_asked_for(folder):
    pytest.importorskip("tensorboard")
    here(folder, "train", "small.toml", "log.tensorboard=true", "train.steps=2")
    assert list((folder / "runs/run/tensorboard").glob("events.*"))


@pytest.mark.slow
def test_demo_ends_with_two_equal_losses_a_table_and_a_picture(folder):
    pytest.importorskip("matplotlib")
    small = [
        "train.steps=20",
        "data.seq_len=64",
        "train.batch_tokens=512",
        "eval.windows=16",
        "data.synthetic.length=50000",
    ]
    out = seqengine(folder, "demo", *small, timeout=240)
    assert "they differ by" in out
    for row in ("uniform guess", "entropy floor", "order-5 Markov", "HyenaDNA, this run"):
        assert row in out
    assert (folder / "runs/demo-1/curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "runs/demo-1/ckpt/latest").exists()


@pytest.mark.slow
def test_demo_on_a_genome_of_ones_own(folder, real_data):
    small = ["train.steps=4", "data.seq_len=64", "train.batch_tokens=512", "eval.windows=16"]
    out = seqengine(folder, "demo", "--fasta", str((real_data / "lambda.fa.gz").resolve()), *small, timeout=240)
    assert "order-5 Markov" in out
    assert "entropy floor" not in out
