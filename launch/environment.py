"""What a launcher put into the environment, and what this one puts there. The only file of this floor that touches it.

Two launchers are read: torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), which come first, and those of a
Slurm step (`srun python -m seqengine train`). A batch script or an interactive shell of Slurm has launched nothing.
"""

import os
import re
import subprocess
from dataclasses import dataclass

from seqengine.errors import InputError

FIRST_PORT, NUM_PORTS = 10000, 20000
"""Where a Slurm step meets if nobody said so: below the ports that systems give out by themselves."""
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the steps of batch scripts and of interactive shells from here on."""
SCONTROL_SECONDS = 60.0


@dataclass(frozen=True)
class Processes:
    """This process among those of the job; one process that nobody launched is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """A launcher (torchrun, srun, or anything that sets the same variables) started this process."""


def read_processes() -> Processes:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them, else from those of a Slurm step.

    A Slurm step of one task counts as not launched: that task starts processes of its own.
    Raises InputError if some are set and others missing, one is no number, or Slurm deals ranks out to nodes in turn.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = {name: os.environ.get(name) for name in (*names, "LOCAL_WORLD_SIZE")}
    if all(values[name] is None for name in names):
        return _read_slurm()
    bad = [f"{name}={values[name]!r}" for name in names if not (values[name] or "").isdigit()]
    if bad:
        raise InputError(f"environment: {', '.join(names)} must all be set by the launcher; got {', '.join(bad)}.")
    rank, world, local = (int(values[name] or 0) for name in names)
    return Processes(rank, world, local, int(values["LOCAL_WORLD_SIZE"] or world), launched=True)


def _read_slurm() -> Processes:
    step = os.environ.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in os.environ or not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP:
        return Processes()
    world = _slurm_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if world == 1:
        return Processes()
    rank, local, node = (_slurm_number(name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
    tasks = _tasks_per_node()
    if node >= len(tasks) or sum(tasks) != world:
        raise InputError(
            f"environment: the tasks of Slurm's nodes must be those of the step; got {tasks} on node {node} of {world} tasks."
        )
    if rank != sum(tasks[:node]) + local:
        raise InputError(
            f"environment: neighbouring ranks must share a node; got rank {rank} as task {local} of node {node}. "
            "Start with srun --distribution=block."
        )
    return Processes(rank, world, local, tasks[node], launched=True)


def _slurm_number(*names: str) -> int:
    """The first of the variables that is set."""
    name = next((name for name in names if name in os.environ), names[0])
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise InputError(f"environment: {name} must be a number in a Slurm step; got {value!r}. Start with srun.")
    return int(value)


def _tasks_per_node() -> list[int]:
    """Slurm writes 4(x2),3 for 4, 4, 3. Without it, SLURM_NTASKS_PER_NODE holds for every node."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE"))
    if text is None:
        world = _slurm_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        each = _slurm_number("SLURM_NTASKS_PER_NODE")
        return [min(each, world - done) for done in range(0, world, each)] if each else []
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise InputError(f"environment: Slurm's tasks per node must read as in 4(x2),3; got {text!r}.")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def read_life(processes: Processes) -> str | None:
    """The name of this life of the job, if torchrun keeps one store for all its lives; None if each meets in its own.

    That store still holds the addresses of dead workers. On several machines torchrun counts lives on each by itself: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every life a store of its own.
    """
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_one_machine = processes.world_size == processes.local_world_size
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") if is_shared and is_one_machine else None


def prepare_rendezvous(processes: Processes) -> None:
    """Name the place where processes meet, MASTER_ADDR and MASTER_PORT, where srun started them and nobody has named it.

    The first node of the step, and a port from the numbers of job and step. Raises InputError if they cannot be found.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if processes.world_size == 1:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # libraries ask for them
        os.environ.setdefault(name, str(getattr(processes, name.lower())))
    if not missing:
        return
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError(f"environment: MASTER_ADDR and MASTER_PORT must be set by the launcher; {missing[0]} is not.")
    if "MASTER_ADDR" in missing:
        os.environ["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" in missing:
        job, step = _slurm_number("SLURM_JOB_ID"), _slurm_number("SLURM_STEP_ID")
        os.environ["MASTER_PORT"] = str(FIRST_PORT + (16 * job + step) % NUM_PORTS)


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    if nodes and not set(nodes) & set("[,"):
        return nodes
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"environment: MASTER_ADDR is not set, and scontrol could not name the nodes {nodes!r}: {error}. "
            "Set MASTER_ADDR to the first of them in the submit script."
        ) from error
    names = done.stdout.split()
    if not names:
        raise InputError(f"environment: MASTER_ADDR is not set, and scontrol finds no node in {nodes!r}. Set it.")
    return names[0]


def worker_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """This process's environment and torchrun's variables, for one of the processes that it starts on this machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    numbers = {name: str(value) for name, value in {**ranks, "MASTER_PORT": port}.items()}
    return {**os.environ, **numbers, "MASTER_ADDR": "127.0.0.1"}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare_deterministic_cuda() -> None:
    """cuBLAS is repeatable only with a fixed workspace, named before CUDA starts; a user's own choice stands."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
