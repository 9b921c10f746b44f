"""`seqengine launch` without a cluster: what it checks, records, refuses; status, logs, cancel. Scripts play Slurm's part."""

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from seqengine.config.load import load
from seqengine.launch.cli import main
from seqengine.launch.job import Follower
from seqengine.launch.record import Launch, only_one, started_at
from seqengine.watchdog import Beat, write_aside
from tests.launch.plays import CPU, TWO_NODES, install, launch, make_workplace, refused
from tests.seqengine.runs import BASE

SLURM = {
    "sbatch": 'echo "$@" >> called; cp "$2" sent; echo "${NUMBER:-42};cluster"',
    "scontrol": 'if [ -e job ]; then cat job; else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scancel": 'echo "$@" >> called',
    "sacct": 'echo "TIMEOUT|0:1|01:00:00"',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a config."""
    return make_workplace(tmp_path, monkeypatch)


@pytest.fixture
def slurm(folder, monkeypatch):
    """Slurm's commands, which note how they were called; `say` tells what scontrol shows."""
    install(folder, SLURM)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def say(text: str) -> None:
        (folder / "job").write_text(text)

    return say


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheduler", "slurm", "--nodes", "0", *CPU, "1"), "--nodes: must be at least 1; got 0"),
        (("--scheduler", "slurm"), "--gpus-per-node: must say how many processes a node has"),
        (("--scheduler", "slurm", "--gpus-per-node", "0"), "got 0. On nodes without GPUs"),
        (("--scheduler", "slurm", "--gpus-per-node", "3"), "1 nodes x 3 processes = 3: parallel.replicate"),
        (("--scheduler", "slurm", "--gpus-per-node", "2", "--tasks-per-node", "1"), "must be --gpus-per-node = 2"),
        (("--scheduler", "slurm", "--gpus-per-node", "2", "run.device=cpu"), "would leave 2 GPUs a node idle"),
        ((*TWO_NODES, "run.device=cuda"), "must be at least 1 for run.device='cuda'"),
        (
            ("--scheduler", "local", "--gpus-per-node", "2048", "parallel.replicate=1", "parallel.sequence=2"),
            "1 nodes x 2048",
        ),
        (("--scheduler", "local", "--nodes", "2"), "--nodes: must be 1 with --scheduler local; got 2"),
        (("--scheduler", "local", "--partition", "x"), "--partition: only with --scheduler slurm"),
        (("--scheduler", "local", "--env", "A=1"), "--env: only with --scheduler slurm or torchrun"),
        ((*TWO_NODES, "--max-restarts", "1"), "--max-restarts: only with --scheduler torchrun or local"),
        ((*TWO_NODES, "--sbatch", "array=1-3"), "--sbatch: array is set by the script itself"),
        ((*TWO_NODES, "--sbatch=-p=x"), "--sbatch: must be key=value with a long option"),
        ((*TWO_NODES, "--sbatch", "mem=1\nrm -rf"), "--sbatch: must be one line"),
        ((*TWO_NODES, "--env", "1A=1"), "--env: must be NAME=VALUE"),
        ((*TWO_NODES, "--container-mounts", "a:b"), "only with --container IMAGE"),
        ((*TWO_NODES, "--signal-seconds", "70000"), "must be at most 65535"),
        ((*TWO_NODES, "optim.lrr=1"), "optim.lrr: unknown key"),
        (TWO_NODES, "Slurm: must be on this machine, and `sbatch` is not on the PATH"),
    ],
)
def test_what_cannot_work_is_told_and_nothing_is_left_behind(folder, capsys, words, message):
    assert message in refused(capsys, "small.toml", "parallel.sequence=2", *words)


def test_a_job_is_recorded_and_a_second_one_refused_while_it_lives(slurm, folder, capsys):
    out = launch(capsys, "small.toml", *TWO_NODES, "parallel.sequence=2")
    assert "job         42, submitted" in out
    assert (folder / "sent").read_text() == (folder / "runs/run/launch/1/submit.sh").read_text()
    assert Launch.find(folder / "runs/run").job == "42"
    slurm(
        "JobId=42 JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 RunTime=00:01:00 TimeLimit=01:00:00 NodeList=n[1-2]"
    )
    assert "is in use: Slurm job 42 is RUNNING" in launch(
        capsys, "small.toml", *TWO_NODES, "parallel.sequence=2", code=2
    )
    status = launch(capsys, "status", "runs/run")
    for line in (
        "slurm       job 42: RUNNING",
        "2 nodes (n[1-2]), 2 processes",
        "00:01:00 of 01:00:00, 2 restarts",
        "none logged yet",
    ):
        assert line in status
    assert "cancelled   Slurm job 42" in launch(capsys, "cancel", "runs/run")
    assert (folder / "called").read_text().splitlines()[-1] == "42"
    slurm("JobId=42 JobState=COMPLETED Reason=None Restarts=2 ExitCode=0:0")
    assert "nothing to cancel" in launch(capsys, "cancel", "runs/run")
    (folder / "job").unlink()
    assert "TIMEOUT, exit code 0:1, elapsed 01:00:00" in launch(capsys, "status", "runs/run")
    launch(capsys, "small.toml", *TWO_NODES, "parallel.sequence=2")
    assert (folder / "runs/run/launch/2/submit.sh").exists()


def test_slurm_s_refusal_is_shown_and_leaves_the_run_as_it_was(slurm, folder, capsys):
    install(folder, {"sbatch": 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1'})
    words = ("small.toml", *TWO_NODES, "parallel.sequence=2")
    assert "sbatch refused the job: sbatch: error: invalid partition specified: x" in refused(capsys, *words)
    assert not (folder / "runs/run").exists()
    install(folder, SLURM)
    launch(capsys, *words)
    install(folder, {"sbatch": "exit 3"})
    before = (folder / "runs/run/launch.json").read_text()
    assert "sbatch refused the job: exit code 3" in refused(capsys, *words)
    assert (folder / "runs/run/launch.json").read_text() == before
    Launch("slurm", 2, "", 1, 1, time.time(), "there").write(folder / "runs/run")
    assert "a launch on there was cut short before Slurm's number was known" in refused(capsys, *words)


def test_of_two_launches_at_once_one_goes_on(slurm, folder, capsys):
    words = ("small.toml", *TWO_NODES, "parallel.sequence=2")
    launch(capsys, *words)
    with only_one(folder / "runs/run"):
        assert "is in use: another launch is under way" in refused(capsys, *words)
    launch(capsys, *words)


def test_a_run_whose_ranks_are_alive_is_in_use(folder, capsys):
    words = ("small.toml", "--scheduler", "torchrun", *CPU, "1")
    beats = folder / "runs/run/heartbeat"
    beats.mkdir(parents=True)

    def beat(**changes: object) -> None:
        fields = {"rank": 0, "step": 3, "phase": "train", "time": time.time(), "host": "elsewhere", "pid": 1}
        write_aside(beats / "rank-0.json", vars(Beat(**{**fields, **changes})))

    beat()
    assert "is in use: rank 0 (process 1 on elsewhere) was at step 3" in refused(capsys, *words)
    beat(host=socket.gethostname(), pid=os.getpid(), time=time.time() - 3600)
    started = started_at(os.getpid())
    assert started is not None
    assert abs(time.time() - started) < 24 * 3600
    beat(host=socket.gethostname(), pid=os.getpid())
    assert "is in use" in refused(capsys, *words)
    for free in ({"phase": "ended"}, {"time": time.time() - 3600}, {"host": socket.gethostname(), "pid": 2**22 + 1}):
        beat(**free)
        launch(capsys, *words)


def test_logs_of_a_rank_or_of_the_batch_script_and_what_is_missing(folder, capsys):
    run = folder / "runs/run"
    assert "has no launch.json" in refused(capsys, "logs", "runs/run")
    (run / "logs").mkdir(parents=True)
    Launch("slurm", 1, "42", 2, 2, time.time(), "here", job="42").write(run)
    assert "42-0.log: there is no such log" in launch(capsys, "logs", "runs/run", code=2)
    (run / "logs/42.log").write_text("waiting\n")
    assert launch(capsys, "logs", "runs/run") == "waiting\n"
    (run / "logs/42-0.log").write_text("rank 0\n")
    (run / "logs/42-1.log").write_text("rank 1\n")
    assert launch(capsys, "logs", "runs/run") == "rank 0\n"
    assert launch(capsys, "logs", "runs/run", "--rank", "1") == "rank 1\n"
    assert "runs/run/logs has 42-0.log, 42-1.log, 42.log" in launch(capsys, "logs", "runs/run", "--rank", "2", code=2)
    (run / "launch.json").write_text("{")
    assert "launch.json: must be the record of a launch" in launch(capsys, "status", "runs/run", code=2)


def test_a_follower_prints_every_byte_once_even_when_letters_are_cut(folder, capsys, monkeypatch):
    file, text = folder / "log", "A\u00e9\u20ac\n"
    follower = Follower(file)
    pieces = [text.encode()[i : i + 1] for i in range(len(text.encode()))]

    def wait(seconds: float) -> None:
        if not pieces:
            follower.stop()
            return
        with file.open("ab") as log:
            log.write(pieces.pop(0))

    monkeypatch.setattr(follower._stopped, "wait", wait)
    follower.run()
    assert capsys.readouterr().out == text


def test_status_names_stuck_ranks_and_cancel_stops_a_local_launch(folder, capsys):
    run = folder / "runs/run"
    (run / "heartbeat").mkdir(parents=True)
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        started = started_at(process.pid)
        here = socket.gethostname()
        Launch("local", 1, "launch-1", 1, 1, time.time(), here, pid=process.pid, started=started).write(run)
        write_aside(run / "heartbeat/rank-0.json", vars(Beat(0, 7, "eval", time.time() - 300, here, process.pid)))
        status = launch(capsys, "status", "runs/run")
        assert f"local       process {process.pid} on {here}: RUNNING" in status
        assert re.search(r"stuck       rank 0 \(process \d+ on .*\): no progress for 300 s, step 7, phase eval", status)
        assert "stuck" not in launch(capsys, "status", "runs/run", "--stuck-seconds", "1000")
        assert "process trains" not in launch(capsys, "cancel", "runs/run")
        assert process.wait(timeout=5) == -signal.SIGTERM
    assert "nothing to cancel" in launch(capsys, "cancel", "runs/run")
    assert ": ended" in launch(capsys, "status", "runs/run")


def test_words_of_launch_and_a_config_of_the_same_name(folder, capsys):
    (folder / "status").write_text(BASE)
    (folder / "status.toml").write_text(BASE)
    assert "has no launch.json" in launch(capsys, "status", ".", code=2)
    assert "#SBATCH --nodes=1" in launch(capsys, "./status.toml", "--scheduler", "slurm", *CPU, "1", "--dry-run")
    with pytest.raises(SystemExit) as stop:
        main(["launch", "status", "runs/run", "--nodes", "2"])
    assert stop.value.code == 2


def test_gpus_that_are_not_there_are_an_error_and_not_a_slow_run(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message = refused(capsys, "small.toml", "parallel.sequence=2", "--scheduler", "local", "--gpus-per-node", "2")
    assert "must be at most the 1 GPUs of this machine; got 2" in message
    out = launch(capsys, "small.toml", "--scheduler", "torchrun", "--gpus-per-node", "1")
    assert "launch.sh 0" in out
    assert load(folder / "runs/run/launch/1/config.toml").config.run.device == "cuda"


def commands_of_the_docs() -> list[list[str]]:
    page = (Path(__file__).parent.parent.parent / "docs/launch.md").read_text()
    code = "".join(re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True)[1:] for line in code.splitlines() if line.startswith("seqengine ")]
    return [words for words in lines if not {"CONFIG", "RUN"} & set(words)]


def test_every_launch_of_the_documentation_is_one(folder, capsys, monkeypatch):
    (folder / "my.toml").write_text(BASE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    found = commands_of_the_docs()
    assert len(found) == 4
    for words in found:
        assert main([*words, "--dry-run"]) == 0, words
    assert capsys.readouterr().err == ""
