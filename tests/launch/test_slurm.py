"""Training under a real Slurm of two virtual nodes: the time limit's warning, the queue and back, and the same losses."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from seqengine.launch.cli import main
from seqengine.launch.slurm import OVER
from seqengine.metrics import read_metrics
from seqengine.watchdog import read_beats
from tests.launch.slurm_cluster import MARK, Cluster, NoClusterError, slurm_cluster
from tests.seqengine.runs import BASE

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_SECONDS = 120.0
ON_TWO_NODES = ("--scheduler", "slurm", "--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "30")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def started():
    """Skips where Slurm cannot be started, and says why."""
    try:
        with slurm_cluster(nodes=2) as cluster:
            yield cluster
    except NoClusterError as error:
        pytest.skip(f"no Slurm cluster on this machine: {error}")
    assert cluster.processes() == []
    assert not cluster.folder.exists()


@pytest.fixture
def cluster(started, tmp_path, monkeypatch):
    """In a folder whose name needs quotes, with a config of 60 steps."""
    folder = tmp_path / "my runs 100%j"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("SLURM_CONF", MARK):
        monkeypatch.setenv(name, started.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (folder / "small.toml").write_text(BASE.replace("steps = 6", "steps = 60"))
    return started


def wait_for(condition: Callable[[], bool], what: str, cluster: Cluster) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {p}\n{p.read_text()}" for p in sorted(Path.cwd().rglob("*.log")))
            pytest.fail(f"{what}: not within {TIMEOUT_SECONDS:.0f} s\n{logs}\n{cluster.logs()}")
        time.sleep(0.005)


def launch(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["launch", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def job_of(run: Path) -> str:
    return json.loads((run / "launch.json").read_text())["job"]


def steps(run: Path) -> int:
    return len([line for line in read_metrics(run) if "split" not in line])


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line.get("split", "train"), line["loss"]) for line in read_metrics(run)]


def has_pending(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_a_job_that_is_warned_saves_comes_back_and_ends_as_if_it_had_not_been(cluster, capsys):
    run = Path("runs/cut")
    out = launch(capsys, "small.toml", "run.name=cut", "parallel.sequence=2", *ON_TWO_NODES)
    job = job_of(run)
    assert f"job         {job}, submitted" in out
    wait_for(lambda: steps(run) >= 2, "two steps", cluster)
    (rank_1,) = [beat.pid for beat in read_beats(run) if beat.rank == 1]
    os.kill(rank_1, signal.SIGSTOP)  # the run cannot end before the warning is there
    assert steps(run) < 60
    refused = launch(capsys, "small.toml", "run.name=cut", "parallel.sequence=2", *ON_TWO_NODES, code=2)
    assert f"is in use: Slurm job {job} is RUNNING" in refused
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_for(lambda: has_pending(rank_1, signal.SIGUSR1), "the warning at rank 1", cluster)
    os.kill(rank_1, signal.SIGCONT)
    wait_for(lambda: cluster.field(job, "JobState") == "PENDING", "the job in the queue again", cluster)
    saved = int((run / "ckpt/latest").read_text().strip().rpartition("-")[2])
    assert 2 <= saved < 60
    assert "is PENDING" in launch(capsys, "small.toml", "run.name=cut", "parallel.sequence=2", *ON_TWO_NODES, code=2)
    status = launch(capsys, "status", str(run))
    assert f"job {job}: PENDING" in status
    assert f"step        {saved}, loss" in status
    wait_for(cluster.is_idle, "the nodes free", cluster)
    time.sleep(2)  # nodes refuse what they have revoked in the same second
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: cluster.field(job, "JobState") in OVER, "the end of the run", cluster)
    log = launch(capsys, "logs", str(run))
    assert f"stopped by SIGUSR1 at step {saved}, which is saved" in log
    assert f"resumed at step {saved}" in log
    assert "bit for bit" in log
    assert "1 restarts, exit code 0:0" in launch(capsys, "status", str(run))
    assert not (run / "stop").exists()

    assert launch(capsys, "small.toml", "run.name=whole", "parallel.sequence=2", "--scheduler", "local")
    assert losses(run) == losses(Path("runs/whole"))
    assert losses(run)[-1][:2] == (60, "valid")


def test_a_torchrun_a_node_saves_when_warned_and_comes_back_no_more_often_than_allowed(cluster, capsys):
    run = Path("runs/by-node")
    words = ("small.toml", "run.name=by-node", "parallel.sequence=2", "train.steps=100000", *ON_TWO_NODES)
    launch(capsys, *words, "--tasks", "node", "--max-requeues", "0")
    job = job_of(run)
    wait_for(lambda: steps(run) >= 1, "a step", cluster)
    assert json.loads(launch(capsys, "status", str(run), "--json"))["ranks"] == {"known": 2, "alive": 2}
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.field(job, "JobState") in OVER, "the end of the job", cluster)
    assert cluster.field(job, "ExitCode") == "75:0"
    assert cluster.field(job, "Restarts") == "0"
    assert "is not queued again (--max-requeues 0)" in (run / f"logs/{job}.log").read_text()
    assert "stopped by " in launch(capsys, "logs", str(run))
    assert (run / "ckpt/latest").exists()
    assert "nothing to cancel" in launch(capsys, "cancel", str(run))


def test_slurm_s_own_words_are_shown_and_a_job_that_waits_can_be_cancelled(cluster, capsys):
    run = Path("runs/later")
    words = ("small.toml", "run.name=later", "parallel.sequence=2", *ON_TWO_NODES)
    message = launch(capsys, *words, "--partition", "nowhere", code=2)
    assert "sbatch refused the job: sbatch: error: invalid partition specified: nowhere" in message
    assert not run.exists()
    launch(capsys, *words, "--sbatch", "begin=now+1hour")
    job = job_of(run)
    assert "reason      BeginTime" in launch(capsys, "status", str(run))
    assert f"cancelled   Slurm job {job}" in launch(capsys, "cancel", str(run))
    assert cluster.field(job, "JobState") == "CANCELLED"
    launch(capsys, *words, "--sbatch", "begin=now+1hour")
    assert job_of(run) != job
    assert (run / "launch/2/submit.sh").exists()
    launch(capsys, "cancel", str(run))
