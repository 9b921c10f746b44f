"""What `seqengine launch` was asked for: nodes, processes and a scheduler's options, checked before anything is written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.launch.cli_processes import num_processes
from seqengine.launch.environment import Processes
from seqengine.launch.process import mesh_shape

SCHEDULERS = ("slurm", "torchrun", "local")
SIGNAL_SECONDS, MAX_REQUEUES, PORT = 180, 100, 29500
MOST_SIGNAL_SECONDS = 65535
"""What Slurm takes for --signal."""
MOST_PORT = 65535
OURS = ("array", "chdir", "error", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue", "signal")
"""Options of sbatch that the script sets itself, and must."""
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
"""Options of sbatch that ask for GPUs in a site's own words; with one of them the script asks for none itself."""


@dataclass(frozen=True)
class Request:
    """The options of `seqengine launch`; None and empty ones were not given."""

    scheduler: str
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    allow_change: tuple[str, ...] = ()
    python: str | None = None
    setup: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    max_restarts: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    # Slurm's
    sbatch: tuple[str, ...] = ()
    tasks: str | None = None
    cpus_per_task: int | None = None
    signal_seconds: int | None = None
    max_requeues: int | None = None
    container: str | None = None
    container_runtime: str | None = None
    container_mounts: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    """partition, account, time, qos, constraint, reservation, as far as given."""


def processes_per_node(request: Request, config: RunConfig) -> int:
    """Processes on each node: one a GPU, or --tasks-per-node. Raises InputError naming every fault of the request."""
    problems = [*_number_problems(request), *_misplaced(request), *_text_problems(request)]
    if problems:
        raise InputError(*problems)
    gpus, tasks = request.gpus_per_node, request.tasks_per_node
    if not gpus and tasks is None:
        if request.scheduler != "local" or gpus == 0:
            raise InputError(
                f"--gpus-per-node: must say how many processes a node has, one for each GPU; got {gpus}. "
                "On nodes without GPUs: --gpus-per-node 0 --tasks-per-node K."
            )
        tasks = num_processes(config)
    each = tasks or gpus or 1
    if gpus and each != gpus:
        raise InputError(
            f"--tasks-per-node: must be --gpus-per-node = {gpus}, one process a GPU; got {tasks}. Leave it out."
        )
    if gpus and config.run.device == "cpu":
        raise InputError(
            f"run.device: 'cpu' would leave {gpus} GPUs a node idle; set run.device='auto', or --gpus-per-node 0 "
            "--tasks-per-node K."
        )
    if gpus == 0 and config.run.device == "cuda":
        raise InputError("--gpus-per-node: must be at least 1 for run.device='cuda'; got 0. Or set run.device='auto'.")
    try:
        mesh_shape(config, Processes(0, request.nodes * each, 0, each, launched=True))
    except InputError as error:
        asked = f"{request.nodes} nodes x {each} processes = {request.nodes * each}"
        raise InputError(*(f"{asked}: {problem}" for problem in error.problems)) from None
    return each


def _number_problems(request: Request) -> Iterator[str]:
    least = {
        "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 1,
        "max_requeues": 0, "max_restarts": 0, "master_port": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(request, name)
        if value is not None and value < low:
            yield f"{_option(name)}: must be at least {low}; got {value}."
    if (request.signal_seconds or 0) > MOST_SIGNAL_SECONDS:
        yield f"--signal-seconds: must be at most {MOST_SIGNAL_SECONDS}; got {request.signal_seconds}."
    if (request.master_port or 0) > MOST_PORT:
        yield f"--master-port: must be at most {MOST_PORT}; got {request.master_port}."
    if request.scheduler == "local" and request.nodes > 1:
        yield f"--nodes: must be 1 with --scheduler local; got {request.nodes}. Use slurm or torchrun for more."


def _misplaced(request: Request) -> Iterator[str]:
    """Options that this scheduler would leave unread."""
    only = {
        ("slurm",): ("sbatch", "tasks", "cpus_per_task", "signal_seconds", "max_requeues", "container",
                     "container_runtime", "container_mounts"),
        ("slurm", "torchrun"): ("setup", "env", "python"),
        ("torchrun",): ("master_addr", "master_port"),
        ("torchrun", "local"): ("max_restarts",),
    }  # fmt: skip
    for schedulers, names in only.items():
        for name in names:
            if getattr(request, name) not in (None, ()) and request.scheduler not in schedulers:
                yield f"{_option(name)}: only with --scheduler {' or '.join(schedulers)}. Leave it out."
    if request.scheduler != "slurm":
        yield from (f"--{name}: only with --scheduler slurm. Leave it out." for name in request.named)
    if request.container is None and (request.container_mounts or request.container_runtime):
        yield "--container-mounts and --container-runtime: only with --container IMAGE. Name the image, or leave them out."


def _text_problems(request: Request) -> Iterator[str]:
    one = {"--container": request.container, "--python": request.python, "--master-addr": request.master_addr}
    one |= {f"--{name}": value for name, value in request.named.items()}
    many = {
        "--setup": request.setup,
        "--sbatch": request.sbatch,
        "--env": request.env,
        "--container-mounts": request.container_mounts,
    }
    texts = many | {option: (value,) for option, value in one.items() if value is not None}
    for option, values in texts.items():
        for value in values:
            if re.search(r"[\x00-\x1f\x7f]", value):
                yield f"{option}: must be one line without control characters; got {value!r}."
    for word in request.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", word):
            yield f"--env: must be NAME=VALUE; got {word!r}."
    for word in request.sbatch:
        key = word.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            yield f"--sbatch: must be key=value with a long option of sbatch, such as mem=64G; got {word!r}."
        elif key in OURS:
            yield f"--sbatch: {key} is set by the script itself; got {word!r}. Leave it out."


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
