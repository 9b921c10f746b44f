"""A real Slurm of several virtual nodes on this machine, for the time of a `with` block: no systemd, no cgroups, no accounting.

The nodes are called 127.0.0.1, 127.0.0.2 ..., so that what `scontrol show hostnames` says can be reached. Everything lies in
one folder. Daemons and jobs carry the folder's name in their environment; a guard process ends all that do once the pipe from
the process that made the cluster closes: at the end of the block, and also if that process is killed.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TOOLS = ("taskset", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
START_SECONDS = 30.0
MARK = "SEQENGINE_TEST_CLUSTER"
CLEAN_UP = """
cat > /dev/null
for round in 1 2 3 4 5; do
    for process in /proc/[0-9]*; do
        if grep -qsa "$1" "$process/environ"; then kill -9 "${process#/proc/}"; fi
    done
    sleep 0.05
done
rm -rf "$2"
"""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=30
JobRequeue=1
"""


class NoClusterError(Exception):
    """Why there can be none here."""


class Cluster:
    """Slurm's commands see it with `environment`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"127.0.0.{i + 1}" for i in range(nodes)]
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), MARK: str(folder)}

    def call(self, *command: str) -> str:
        """Standard output of a command of Slurm's that must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says."""
        return next(
            word.partition("=")[2]
            for word in self.call("scontrol", "-o", "show", "job", job).split()
            if word.startswith(f"{name}=")
        )

    def is_idle(self) -> bool:
        """Every node is up and free."""
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return len(done.stdout.split()) == len(self.nodes)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))

    def processes(self) -> list[int]:
        """All that carry the mark of this cluster."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.folder}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


@contextmanager
def slurm_cluster(nodes: int) -> Iterator[Cluster]:
    """Raises NoClusterError with the reason if Slurm cannot be started on this machine."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        raise NoClusterError(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise NoClusterError("only root can start a cluster whose daemons are not the system's")
    folder = Path(tempfile.mkdtemp(prefix="seqengine-slurm-"))
    cluster = Cluster(folder, nodes)
    with (
        _waited(cluster),
        subprocess.Popen(
            ["sh", "-c", CLEAN_UP, "guard", f"{MARK}={folder}", str(folder)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ),
    ):  # at the end the pipe closes and the guard is waited for
        _start(cluster)
        yield cluster


@contextmanager
def _waited(cluster: Cluster) -> Iterator[None]:
    try:
        yield
    finally:
        for daemon in cluster.daemons:
            daemon.wait()


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    _configure(cluster)
    munge = {name: f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file")}
    munge["socket"] = f"--socket={folder}/munge.sock"
    logs = [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed", "--origin=127.0.0.1"]
    _daemon(cluster, "munged", "--foreground", "--force", *munge.values(), *logs)
    _wait(cluster, lambda: (folder / "munge.sock").exists(), "munged does not start")
    _daemon(cluster, "slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf"))
    cores = sorted(os.sched_getaffinity(0))
    for i, node in enumerate(cluster.nodes):  # each has a core of its own, as far as there are enough
        on_core = ("taskset", "-c", str(cores[i % len(cores)]))
        _daemon(cluster, *on_core, "slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
    _wait(cluster, cluster.is_idle, "its nodes do not come up")


def _configure(cluster: Cluster) -> None:
    folder = cluster.folder
    (folder / "state").mkdir()
    for node in cluster.nodes:
        (folder / f"spool-{node}").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(len(cluster.nodes) + 1)
    first_job = 1 + 10 * (os.getpid() % 100000)  # the port of a job follows from its number: others have other numbers
    lines = [CONF.format(host=host, port=ports[0], folder=folder, first_job=first_job)]
    for node, port in zip(cluster.nodes, ports[1:], strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN")
    lines.append(f"PartitionName=main Nodes={','.join(cluster.nodes)} Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _daemon(cluster: Cluster, *command: str) -> None:
    with (cluster.folder / f"{len(cluster.daemons)}.out").open("ab") as out:
        daemon = subprocess.Popen(
            command,
            env={**cluster.environment, "PATH": _path()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    cluster.daemons.append(daemon)


def _wait(cluster: Cluster, condition, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(path.read_text()[-500:] for path in sorted(cluster.folder.glob("*.out")))
            raise NoClusterError(f"{what}: {said}{cluster.logs()}")
        time.sleep(0.05)
