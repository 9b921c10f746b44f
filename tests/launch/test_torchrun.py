"""The launcher of local processes: small workers that do not import torch, real signals, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = "import sys; from seqengine.launch.torchrun import run_local; sys.exit(run_local({arguments}))"
HEADER = """
import os, signal, socket, subprocess, sys, time
from pathlib import Path
RUN, rank = Path({folder!r}), int(os.environ["RANK"])
life = len(list(RUN.glob(f"worker-{{rank}}-*")))
(RUN / f"aside-{{rank}}").write_text(str(os.getpid()))

def ready():
    (RUN / f"aside-{{rank}}").rename(RUN / f"worker-{{rank}}-{{life}}")

def note(number, frame):
    with (RUN / f"signals-{{rank}}").open("a") as file:
        file.write(signal.Signals(number).name + " ")

def handle():
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        signal.signal(getattr(signal, name), note)

"""


class Launcher:
    """`run_local` in a process of its own, with workers that run a script."""

    def __init__(self, folder: Path, worker: str, num_processes: int = 2, **options: object) -> None:
        self.folder = folder
        (folder / "worker.py").write_text(HEADER.format(folder=str(folder)) + worker)
        named = {"command": [sys.executable, "-S"], **options}
        words = ", ".join(f"{name}={value!r}" for name, value in named.items())
        arguments = f"[{str(folder / 'worker.py')!r}], {num_processes}, {words}"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", LAUNCHER.format(arguments=arguments)],
            env={"PYTHONPATH": str(ROOT), "PATH": "/bin"},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # ignored under nohup
        )

    def wait(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def wait_for_workers(self, num_workers: int) -> list[int]:
        wait_until(lambda: len(self.pids()) == num_workers)
        return self.pids()

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob("worker-*-*"))]

    def lives(self) -> int:
        return len(list(self.folder.glob("worker-0-*")))

    def signals(self) -> list[str]:
        return [path.read_text().strip() for path in sorted(self.folder.glob("signals-*"))]


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def launch(tmp_path) -> Iterator[object]:
    """Starts launchers; at the end none of their workers may be alive."""
    started: list[Launcher] = []

    def start(worker: str, *arguments: int, **options: object) -> Launcher:
        started.append(Launcher(tmp_path, worker, *arguments, **options))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()
    end = time.monotonic() + 5.0
    pids = [pid for launcher in started for pid in launcher.pids()]
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert alive == []


def test_workers_get_torchruns_variables_and_one_port_that_is_kept_for_them(launch, tmp_path):
    """Rank 0 listens as the store of a process group does; a port that somebody else may be given would fail the others."""
    launcher = launch(
        """
ready()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
(RUN / f"environment-{rank}").write_text(" ".join(os.environ[name] for name in names))
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    try:
        socket.socket().bind(address)
    except OSError:
        (RUN / "kept").touch()
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(address)
    server.listen()
    for _ in range(2):
        server.accept()[0].sendall(b"met")
else:
    for _ in range(500):
        client = socket.socket()
        if client.connect_ex(address) == 0:
            break
        time.sleep(0.01)
    assert client.recv(3) == b"met"
""",
        3,
    )
    assert launcher.wait() == (0, "")
    assert [(tmp_path / f"environment-{r}").read_text() for r in range(3)] == [
        f"{r} {r} 3 3 127.0.0.1" for r in range(3)
    ]
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("codes", "code", "lives"),
    [
        ("[0, 0]", 0, 1),
        ("[2, 2]", 2, 1),
        ("[75, 75]", 75, 1),
        ("[0, 75]", 75, 1),
        ("[2, None]", 2, 1),
        ("[1, 2]", 2, 1),
        ("[1, 1]", 1, 3),
        ("[3, None]", 1, 3),
        ("[75, 1]", 1, 3),
    ],
)
def test_only_failures_are_started_again(launch, codes, code, lives):
    """None hangs: others' failures end it."""
    worker = f"ready()\nwanted = {codes}[rank]\ntime.sleep(60) if wanted is None else sys.exit(wanted)"
    launcher = launch(worker, max_restarts=2, settle_seconds=0.3)
    ended, err = launcher.wait()
    assert ended == code
    assert launcher.lives() == lives
    assert err.count("starting all processes again") == lives - 1
    if code in (1, 2):
        wanted = codes.strip("[]").split(", ")
        for rank, one in enumerate(wanted):
            assert f"rank {rank}: {'ended with the others' if one == 'None' else f'exit code {one}'}" in err


def test_a_killed_worker_makes_all_start_again_at_once(launch):
    launcher = launch("ready()\nif life == 0: time.sleep(60)", 3, max_restarts=1)
    pids = launcher.wait_for_workers(3)
    started = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, err = launcher.wait()
    assert time.monotonic() - started < 5
    assert code == 0
    assert launcher.lives() == 2
    assert "rank 1: killed by SIGKILL, rank 2: ended with the others" in err
    assert "starting all processes again (1 of 1)" in err


def test_a_killed_worker_without_restarts_left_ends_the_run(launch):
    launcher = launch("ready()\ntime.sleep(60)")
    os.kill(launcher.wait_for_workers(2)[0], signal.SIGKILL)
    code, err = launcher.wait()
    assert code == 1
    assert "rank 0: killed by SIGKILL" in err
    assert launcher.lives() == 1


SAVES = """
handle()
ready()
while not (RUN / f"signals-{rank}").exists():
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_worker_once_and_the_launcher_ends_with_75(launch, name):
    """To the whole group of processes, as a terminal does."""
    launcher = launch(SAVES, max_restarts=3)
    launcher.wait_for_workers(2)
    os.killpg(launcher.process.pid, getattr(signal, name))
    assert launcher.wait() == (75, "")
    assert launcher.signals() == [name, name]
    assert launcher.lives() == 1


def test_a_second_signal_ends_everything_at_once(launch):
    launcher = launch("handle()\nready()\nwhile True: time.sleep(1)")
    launcher.wait_for_workers(2)
    launcher.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: launcher.signals() == ["SIGUSR1", "SIGUSR1"])
    assert launcher.process.poll() is None
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait()[0] == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5


def test_workers_that_do_not_end_after_a_signal_are_ended(launch):
    launcher = launch("handle()\nready()\nwhile True: time.sleep(1)", shutdown_seconds=0.5, max_restarts=1)
    launcher.wait_for_workers(2)
    launcher.process.send_signal(signal.SIGUSR1)
    code, err = launcher.wait()
    assert code == 128 + signal.SIGUSR1
    assert "stopped before the run was saved (rank 0: ended with the others" in err
    assert launcher.signals() == ["SIGUSR1", "SIGUSR1"]
    assert launcher.lives() == 1


def test_a_signal_that_workers_do_not_handle_ends_them_and_is_told(launch):
    launcher = launch("ready()\ntime.sleep(60)", max_restarts=1)
    launcher.wait_for_workers(2)
    launcher.process.send_signal(signal.SIGTERM)
    code, err = launcher.wait()
    assert code == 128 + signal.SIGTERM
    assert "rank 0: killed by SIGTERM" in err
    assert launcher.lives() == 1


def test_a_failure_while_saving_is_no_good_save(launch):
    launcher = launch(SAVES.replace("sys.exit(75)", "sys.exit(75 if rank else 1)"), max_restarts=3)
    launcher.wait_for_workers(2)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait()[0] == 1
    assert launcher.lives() == 1


@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP"])
def test_workers_die_with_a_killed_launcher(launch, name):
    launcher = launch("handle()\nready()\nwhile True: time.sleep(1)", 3)
    pids = launcher.wait_for_workers(3)
    assert all(is_alive(pid) for pid in pids)
    launcher.process.send_signal(getattr(signal, name))
    launcher.process.communicate(timeout=20)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_what_a_worker_started_and_left_ends_with_it(launch, tmp_path):
    launcher = launch("""
child = subprocess.Popen(["sleep", "60"], stderr=subprocess.DEVNULL)
(RUN / f"child-{rank}").write_text(str(child.pid))
ready()
child.returncode = 0
""")
    assert launcher.wait()[0] == 0
    children = [int((tmp_path / f"child-{rank}").read_text()) for rank in range(2)]
    wait_until(lambda: not any(is_alive(pid) for pid in children))
