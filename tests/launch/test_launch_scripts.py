"""The scripts of `seqengine launch`: what they say, and what they do when srun, scontrol and torchrun are plays."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqengine.config.load import load
from seqengine.launch import task
from seqengine.launch.environment import Processes
from tests.launch.plays import CPU, TWO_NODES, dry, install, launch, make_workplace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a config."""
    return make_workplace(tmp_path, monkeypatch)


def test_the_batch_script_asks_for_what_was_asked_for(folder, capsys):
    script = dry(
        capsys, "parallel.sequence=8", "parallel.replicate=4", "--scheduler", "slurm", "--nodes", "4", "--gpus-per-node", "8",
        "--partition", "gpu", "--account", "lab one", "--time", "24:00:00", "--qos", "high", "--constraint", "a|b",
        "--reservation", "r", "--sbatch", "mem=0", "--sbatch", "exclusive", "--cpus-per-task", "12", "--signal-seconds", "300",
        "--max-requeues", "7", "--env", "NCCL_DEBUG=IN FO", "--setup", "module load cuda", "train.batch_tokens=1024",
    )  # fmt: skip
    directives = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    here = str(folder)
    assert directives == [
        "--job-name=run", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", f"--chdir={here}",
        f"--output={here}/runs/run/logs/%j.log", "--open-mode=append", "--signal=B:USR1@300", "--partition=gpu",
        '--account="lab one"', "--time=24:00:00", "--qos=high", '--constraint="a|b"', "--reservation=r", "--requeue", "--mem=0",
        "--exclusive",
    ]  # fmt: skip
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "export NCCL_DEBUG='IN FO'" in lines
    assert lines.index("module load cuda") < lines.index("export NCCL_DEBUG='IN FO'")
    for fact in (
        "--nodes=4 --ntasks=32 --ntasks-per-node=8 --distribution=block",
        "--kill-on-bad-exit=1",
        f"--output={here}/runs/run/logs/%j-%t.log",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"{sys.executable} -m seqengine.launch.task",
        f"train {here}/runs/run/launch/1/config.toml",
        "most=7",
    ):
        assert fact in script
    assert script.index("trap warn USR1") < script.index("module load cuda") < script.index("srun")


def test_one_torchrun_a_node_and_containers(folder, capsys):
    words = (
        "parallel.sequence=4",
        "train.batch_tokens=512",
        "--scheduler",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
    )
    script = dry(
        capsys,
        *words,
        "--tasks",
        "node",
        "--cpus-per-task",
        "3",
        "--container",
        "im age.sqsh",
        "--container-mounts",
        "/a:/b",
    )
    for fact in (
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=6",
        "--ntasks=2 --ntasks-per-node=1",
        "--container-image='im age.sqsh'",
        "--container-mounts=/a:/b",
        'exec python3 -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"',
        '--nnodes=2 --nproc-per-node=2 --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        "%j-node-%t.log",
    ):
        assert fact in script
    script = dry(capsys, *words, "--container", "x.sif", "--container-runtime", "apptainer", "--python", "/opt/python")
    assert f"apptainer exec --nv --pwd {folder} x.sif /opt/python -m seqengine.launch.task" in script
    script = dry(capsys, *words, "--sbatch", "gres=gpu:h200:2")
    assert "#SBATCH --gres=gpu:h200:2" in script
    assert "--gpus-per-node" not in script


def test_the_script_for_nodes_names_each_and_tells_preemption_apart(folder, capsys):
    words = ("small.toml", "parallel.sequence=4", "--scheduler", "torchrun", "--nodes", "2", *CPU, "2")
    python = folder / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" > words\nif [ "$END" = 75 ]; then touch "$PREEMPTED"; exit 0; fi\nexit "$END"\n'
    )
    python.chmod(0o755)
    out = launch(
        capsys,
        *words,
        "--master-addr",
        "node a",
        "--python",
        str(python),
        "--env",
        f"PREEMPTED={folder}/runs/run/launch/1/preempted-1",
    )
    script = folder / "runs/run/launch/1/launch.sh"
    assert f"bash {script} 0" in out
    assert f"bash {script} 1" in out
    for end in (0, 1, 75):
        done = subprocess.run(
            ["/bin/bash", str(script), "1"], env={**os.environ, "END": str(end)}, check=False, capture_output=True
        )
        assert done.returncode == end
    said = (folder / "words").read_text()
    assert (
        "--nnodes=2 --node-rank=1 --nproc-per-node=2 --master-addr=node a --master-port=29500 --max-restarts=0" in said
    )
    assert f"-m seqengine.launch.task {folder}/runs/run/logs/launch-1 " in said
    for node in ([], ["2"], ["x"], ["-1"]):
        done = subprocess.run(["/bin/bash", str(script), *node], check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert "0 to 1" in done.stderr
    resolved = load(folder / "runs/run/launch/1/config.toml").config
    assert resolved == load(folder / "small.toml", ["parallel.sequence=4", "run.device=cpu"]).config
    assert 'device = "cpu"  # --gpus-per-node 0' in (folder / "runs/run/launch/1/config.toml").read_text()
    record = json.loads((folder / "runs/run/launch/1/environment.json").read_text())
    assert (record["nodes"], record["processes"], record["directory"]) == (2, 4, str(folder))


def test_a_dry_run_shows_the_command_that_a_local_launch_runs(folder, capsys, monkeypatch):
    words = ("--scheduler", "local", *CPU, "2", "--allow-change", "optim.lr", "--allow-change", "train.steps")
    shown = dry(capsys, "parallel.sequence=2", *words).splitlines()
    ran = []

    def run_local(arguments, num_processes, *, command, **options):
        ran.append((shlex.join([*command, *arguments]), num_processes))
        return 0

    monkeypatch.setattr("seqengine.launch.submit.run_local", run_local)
    launch(capsys, "small.toml", "parallel.sequence=2", *words)
    assert len(ran) == 1
    assert shown == [f"cd {folder}", f"{ran[0][0]}  # {ran[0][1]} times"]
    assert ran[0][0].endswith("/launch/1/config.toml --allow-change optim.lr --allow-change train.steps")


def batch(
    folder: Path,
    capsys,
    srun: str,
    *,
    options: tuple[str, ...] = (),
    state: str = "RUNNING",
    restarts: int = 0,
    send: int | None = None,
):
    """Runs the batch script with a play of srun; returns (exit code, what it printed, how Slurm was called)."""
    script = dry(capsys, *TWO_NODES, "parallel.sequence=2", *options)
    run = folder / "runs/run"
    found = re.search(r"^preempted=(\S+)-\$SLURM_JOB_ID$", script, re.MULTILINE)
    assert found
    preempted = Path(f"{found[1]}-7")
    preempted.parent.mkdir(parents=True)
    install(folder, {
        "srun": f"preempted='{preempted}'; trap 'exit 1' TERM; touch begun\n{srun}",
        "scontrol": 'echo "scontrol $@" >> called; [ "$1" = show ] && echo n1',
        "squeue": f"echo {state}",
        "scancel": 'echo "scancel $@" >> called; touch signalled',
    })  # fmt: skip
    for name in ("begun", "signalled"):
        (folder / name).unlink(missing_ok=True)
    (folder / "called").write_text("")
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    with subprocess.Popen(
        ["/bin/bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while send is not None and not (folder / "begun").exists():
            time.sleep(0.005)
        if send is not None:
            process.send_signal(send)
        out = process.communicate(timeout=20)[0]
    assert not (run / "stop").exists()
    assert not preempted.exists()
    called = (folder / "called").read_text().splitlines()
    return process.returncode, out, [line for line in called if "hostnames" not in line]


SAVE = 'while ! [ -e signalled ]; do sleep 0.01; done; ls runs/run/stop; touch "$preempted"'


def test_the_batch_script_passes_a_warning_on_and_queues_the_job_again(folder, capsys):
    code, out, called = batch(folder, capsys, SAVE, send=signal.SIGUSR1)
    assert (code, called) == (75, ["scancel --signal=USR1 7", "scontrol requeue 7"])
    assert "runs/run/stop" in out
    assert "queued again (1 of at most 100)" in out


def test_the_batch_script_keeps_exit_codes_and_queues_only_what_may_come_back(folder, capsys):
    assert batch(folder, capsys, "exit 0")[::2] == (0, [])
    assert batch(folder, capsys, "exit 2")[::2] == (2, [])
    assert batch(folder, capsys, 'touch "$preempted"; exit 1')[0] == 1
    save = 'touch "$preempted"'
    assert batch(folder, capsys, save)[::2] == (75, ["scontrol requeue 7"])
    assert batch(folder, capsys, save, state="COMPLETING")[::2] == (75, [])
    code, out, called = batch(folder, capsys, save, options=("--max-requeues", "3"), restarts=3)
    assert (code, called) == (75, [])
    assert "has come back 3 times, and is not queued again (--max-requeues 3)" in out
    cancelled = f"sleep 0.2; {save}"
    code, _, called = batch(folder, capsys, cancelled, send=signal.SIGTERM)
    assert (code, called) == (75, [])
    code, out, _ = batch(folder, capsys, save, options=("--setup", "cd /; false"))
    assert code == 1
    assert "this line of --setup failed: cd /; false" in out


def test_a_task_turns_a_preemption_into_a_file_and_lets_its_neighbour_speak(folder, monkeypatch):
    file = folder / "preempted"
    assert task._told(75, None, Processes()) == 75
    assert task._told(75, file, Processes(1, 4, 1, 4)) == 0
    assert not file.exists()
    assert task._told(75, file, Processes(2, 4, 0, 2)) == 0
    assert file.exists()
    monkeypatch.setattr(task, "SPEAK_SECONDS", 0.05)
    before = time.monotonic()
    assert task._told(2, file, Processes(1, 4, 1, 4)) == 2
    assert time.monotonic() - before >= 0.05
    assert task._told(1, file, Processes(1, 4, 1, 4)) == 1
