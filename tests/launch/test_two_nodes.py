"""Two nodes: two network namespaces joined by a cable (a veth pair), a torchrun in each, one sequence over both.

A guard process ends what runs in the namespaces and removes them once the pipe from the process that made them closes: at the
end of a test, and also if that process is killed.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seqengine.metrics import read_metrics
from tests.seqengine.runs import BASE

ROOT = Path(__file__).parent.parent.parent
CABLE, ADDRESSES, PORT = "cable", ("10.77.0.1", "10.77.0.2"), 29400
TIMEOUT_SECONDS = 120
CLEAN_UP = """
cat > /dev/null
for node in "$@"; do ip netns pids "$node" | xargs -r kill -9; done
for node in "$@"; do ip netns del "$node"; done
"""

pytestmark = pytest.mark.timeout(3 * TIMEOUT_SECONDS)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout


def namespaces() -> set[str]:
    return set(ip("netns", "list").split())


@contextmanager
def two_nodes(names: list[str]) -> Iterator[list[str]]:
    """Namespaces with one address each, reachable from each other and from nowhere else."""
    with subprocess.Popen(
        ["sh", "-c", CLEAN_UP, "guard", *names],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):  # at the end the pipe closes and the guard is waited for
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                ip("-n", name, "link", "set", link, "up")
        yield names


@pytest.fixture(scope="module", autouse=True)
def _network():
    """Skips where nodes cannot be made, and says why."""
    missing = [tool for tool in ("ip", "taskset") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"two nodes need {' and '.join(missing)}: not installed")
    if os.geteuid() != 0:
        pytest.skip("two nodes need network namespaces: only root can make them")
    try:
        with two_nodes([f"seqengine-{os.getpid()}-try-{i}" for i in range(2)]) as names:
            ip("netns", "exec", names[0], "true")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two nodes need network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")


@pytest.fixture
def nodes():
    names = [f"seqengine-{os.getpid()}-{i}" for i in range(2)]
    with two_nodes(names):
        yield names
    assert not namespaces() & set(names)


def start(
    folder: Path, node: str, cores: list[int], link: str, command: list[str], run: str
) -> subprocess.Popen[bytes]:
    """Training of small.toml in a node, on these cores; its sequence is cut into two parts. The output goes to RUN-NODE.log."""
    settings = ["train", "small.toml", "parallel.sequence=2", f"run.name={run}"]
    on_node = ["ip", "netns", "exec", node, "taskset", "-c", ",".join(map(str, cores))]
    with (folder / f"{run}-{node}.log").open("wb") as log:
        return subprocess.Popen(
            [*on_node, sys.executable, "-m", *command, *settings],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": link},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def expect_success(folder: Path, *processes: subprocess.Popen[bytes]) -> None:
    """Waits; of a process that must be ended here, the guard ends the children."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    is_soon(lambda: all(process.poll() is not None for process in processes), deadline)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    assert set(codes) == {0}, "\n".join(f"{log.name}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))


def is_soon(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line.get("split", "train"), line["loss"]) for line in read_metrics(run)]


@pytest.mark.slow
def test_a_sequence_over_two_nodes_trains_to_the_losses_of_one_node(nodes, tmp_path):
    (tmp_path / "small.toml").write_text(BASE)
    cores = sorted(os.sched_getaffinity(0))[:2]  # one thread a rank, on one node as on two
    expect_success(tmp_path, start(tmp_path, nodes[0], cores, "lo", ["seqengine"], "one"))
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    both = []
    for rank, node in enumerate(nodes):
        torchrun = ["torch.distributed.run", *rendezvous, "--node-rank", str(rank), "-m", "seqengine"]
        both.append(start(tmp_path, node, [cores[rank % len(cores)]], CABLE, torchrun, "two"))
    expect_success(tmp_path, *both)
    one, two = losses(tmp_path / "runs/one"), losses(tmp_path / "runs/two")
    assert [(step, split) for step, split, _ in one] == [*((i, "train") for i in range(1, 7)), (6, "valid")]
    assert two == one
    mesh = json.loads((tmp_path / "runs/two/environment.json").read_text())["mesh"]
    assert mesh == {"replicate": 1, "sequence": 2, "shard": 1, "backend": "none"}
    for node in nodes:
        (link,) = json.loads(ip("-n", node, "-j", "-s", "link", "show", CABLE))
        assert min(link["stats64"][way]["bytes"] for way in ("rx", "tx")) > 10_000, "the ranks did not use the cable"


def _stay(names: list[str]) -> None:
    with two_nodes(names):
        subprocess.Popen(["ip", "netns", "exec", names[0], "sleep", "600"])
        time.sleep(600)


def test_nodes_and_what_runs_in_them_end_with_a_process_that_is_killed():
    names = [f"seqengine-{os.getpid()}-killed-{i}" for i in range(2)]
    maker = multiprocessing.get_context("fork").Process(target=_stay, args=(names,), daemon=True)
    maker.start()
    deadline = time.monotonic() + 20
    assert is_soon(lambda: set(names) <= namespaces() and ip("netns", "pids", names[0]).strip() != "", deadline)
    sleeper = Path("/proc") / ip("netns", "pids", names[0]).split()[0]
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    assert is_soon(lambda: not namespaces() & set(names) and not sleeper.exists(), deadline)
