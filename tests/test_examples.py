"""The example scripts run, and do what they say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
SCRIPTS = ("examples/loop.py", "examples/trainer.py", "examples/sequence_parallel.py")
"""Scripts that run here."""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss ([\d.]+) nats", output)]


def test_every_example_begins_with_its_command():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert files == {*SCRIPTS, "examples/slurm.sbatch"}
    for name in files:
        command = rf"^(#     |    )(python|sbatch|torchrun .*) {name}$"
        assert re.search(command, (ROOT / name).read_text(), re.MULTILINE), name


def test_the_loop_learns_what_lies_five_tokens_back(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loop.py", "--steps", "50", "--length", "30"])
    last = script("examples/loop.py").main()
    first, *_ = losses(capsys.readouterr().out)
    assert last < 0.7 * first


def test_the_trainer_learns_in_accelerate(monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--steps", "45", "--length", "32"])
    last = script("examples/trainer.py").main()
    first, *_ = losses(capsys.readouterr().out)
    assert last < 0.6 * first


def test_the_trainer_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match=r"pip install 'seqengine-train\[accelerate\]'"):
        script("examples/trainer.py")


def _train(group, steps: int, length: int):
    found, model, sent = script("examples/sequence_parallel.py").train(group, steps, length)
    return found, [p.detach() for p in model.parameters()], sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_split_sequence_trains_as_one_process_does(ranks):
    alone, weights, nothing = _train(None, 8, 50)
    assert nothing == 0
    for found, others, sent in run_ranks(ranks, _train, 8, 50):
        assert sent > 0
        assert found == pytest.approx(alone, abs=1e-5)
        for mine, theirs in zip(weights, others, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=2e-4)


def test_the_job_script_starts_the_program_on_every_node(tmp_path):
    """With programs of its own in place of Slurm's, which write down how they were called."""
    for name, text in {
        "scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "node7\\nnode8\\n"\n',
        "srun": '#!/bin/bash\nprintf "%s\\n" "$@"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = shutil.which("bash")
    assert bash is not None
    for words, program in (
        ([], [SCRIPTS[2]]),
        (["mine.py", "--name", "two words"], ["mine.py", "--name", "two words"]),
    ):
        command = [bash, str(ROOT / "examples" / "slurm.sbatch"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        called = done.stdout.splitlines()
        assert called[:2] == ["--kill-on-bad-exit=1", "torchrun"]
        assert called[called.index("--nnodes") + 1] == "2"
        assert called[called.index("--rdzv-endpoint") + 1] == "node7:20123"
        assert called[-len(program) :] == program
