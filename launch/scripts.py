"""The text of what a launch starts: a batch script for Slurm, and a script that is run on every node by hand.

Signals of the batch script. Slurm warns it alone (`--signal=B:USR1@S`, up to a minute early), and it passes the warning on to
the processes of the run. They ignore it until they can handle it: a process that is starting is not killed by it, and neither
are torchrun's agent and data workers, to which Slurm sends it too. The file RUN/stop, made before, tells those that start.

End of the batch script. A preempted run leaves a file behind (see `launch/task.py`), because srun and torchrun know no exit
code that means saved. Then the job is queued again, unless somebody has cancelled it or it has come back too often.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqengine.errors import BAD_INPUT, FAILED, PREEMPTED
from seqengine.launch.cli_processes import train_words
from seqengine.launch.environment import FIRST_PORT, NUM_PORTS
from seqengine.launch.request import GPU_OPTIONS, MAX_REQUEUES, PORT, SIGNAL_SECONDS, Request
from seqengine.launch.torchrun import SHUTDOWN_SECONDS

NONE = "-"
"""To a task (see `launch/task.py`): no file."""


@dataclass(frozen=True)
class Place:
    """Where a launch lives; all paths absolute."""

    run: Path
    folder: Path
    """Of this launch, RUN/launch/N."""
    start: Path
    """The working directory, to which the paths of the config are relative."""
    name: str

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def script(self) -> Path:
        return self.folder / "submit.sh"

    @property
    def node_script(self) -> Path:
        return self.folder / "launch.sh"

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    @property
    def log_name(self) -> str:
        """How the logs of a launch begin that has no number of Slurm's."""
        return f"launch-{self.folder.name}"


_SIGNALS = """\
signalled= cancelled=
warn() {
    signalled=1
    echo "seqengine: asked to stop; the run saves"
    : > "$run/stop"
    scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap warn USR1
trap 'signalled=1 cancelled=1' TERM
"""
_WAIT = """\
step=$!
while :; do
    signalled=
    wait "$step"
    code=$?
    [ -n "$signalled" ] || break
done"""
_END = f"""\
if [ "$code" = 0 ] && [ -e "$preempted" ]; then
    code={PREEMPTED}
fi
rm -f "$preempted" "$run/stop"
if [ "$code" != {PREEMPTED} ]; then
    exit "$code"
fi
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ -n "$cancelled" ] || [ "$state" != RUNNING ]; then
    echo "seqengine: saved; the job ends here, and is not queued again"
elif [ "$restarts" -ge "$most" ]; then
    echo "seqengine: saved; the job has come back $restarts times, and is not queued again (--max-requeues $most)"
else
    echo "seqengine: saved; the job is queued again ($((restarts + 1)) of at most $most)"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def slurm_script(request: Request, each: int, place: Place, python: str) -> str:
    """The batch script, with `each` processes on every node."""
    lines = [
        "#!/bin/bash",
        "# Written by seqengine launch; sbatch takes it as it is.",
        *(f"#SBATCH {option}" for option in _directives(request, each, place)),
        "",
        f"run={shlex.quote(str(place.run))}",
        f"preempted={shlex.quote(str(place.folder / 'preempted'))}-$SLURM_JOB_ID",
        f"restarts=${{SLURM_RESTART_COUNT:-0}} most={_or(request.max_requeues, MAX_REQUEUES)}",
        'rm -f "$preempted" "$run/stop"',
        "",
        _SIGNALS,
        *_environment(request),
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({FIRST_PORT} + (16 * SLURM_JOB_ID + restarts) % {NUM_PORTS}))",
        "export MASTER_ADDR MASTER_PORT",
        *_exports(request),
        "",
        "srun " + " \\\n    ".join(_step(request, each, place, python)) + " &",
        f"{_WAIT}\n",
        _END,
    ]
    return "\n".join(lines)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _directives(request: Request, each: int, place: Place) -> Iterator[str]:
    own = {word.partition("=")[0] for word in request.sbatch}
    options: dict[str, object] = {
        "job-name": place.name,
        "nodes": request.nodes,
        "ntasks-per-node": 1 if request.tasks == "node" else each,
        "gpus-per-node": None if own & set(GPU_OPTIONS) else request.gpus_per_node,
        "cpus-per-task": _cores(request, each),
        "chdir": place.start,
        "output": f"{_literal(place.logs)}/%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{_or(request.signal_seconds, SIGNAL_SECONDS)}",
        **request.named,
    }
    yield from (f"--{key}={_quoted(str(value))}" for key, value in options.items() if value and key not in own)
    yield "--requeue"
    for word in request.sbatch:
        key, equals, value = word.partition("=")
        yield f"--{key}{equals}{_quoted(value)}"


def _cores(request: Request, each: int) -> int | None:
    cores = request.cpus_per_task
    return cores * each if cores and request.tasks == "node" else cores


def _literal(path: Path) -> str:
    """Slurm fills in what follows a % in the name of a log."""
    return str(path).replace("%", "%%")


def _quoted(text: str) -> str:
    """For a line of #SBATCH, which has quotes and backslashes, but no variables."""
    if all(letter.isalnum() or letter in "-_./:@,=%+[]" for letter in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _environment(request: Request) -> Iterator[str]:
    yield "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE  # of a launcher around this one"
    for line in request.setup:
        failed = f"seqengine: this line of --setup failed: {line}"
        yield line
        yield f"[ $? = 0 ] || {{ echo {shlex.quote(failed)} >&2; exit {FAILED}; }}"
    yield f"export PYTHONUNBUFFERED=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SHUTDOWN_SECONDS} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


def _exports(request: Request) -> Iterator[str]:
    for word in request.env:
        name, _, value = word.partition("=")
        yield f"export {name}={shlex.quote(value)}"


def words_of_run(request: Request, place: Place) -> list[str]:
    """Of `seqengine train`, for every process."""
    return train_words(str(place.config), allow_change=request.allow_change)


def _step(request: Request, each: int, place: Place, python: str) -> list[str]:
    """srun's words, a line each: one task a process, or one torchrun a node."""
    by_node, cores = request.tasks == "node", _cores(request, each)
    per_node = 1 if by_node else each
    log = f"{_literal(place.logs)}/%j-" + ("node-%t" if by_node else "%t") + ".log"
    inside, options = _container(request, place)
    words = [
        f"--nodes={request.nodes} --ntasks={request.nodes * per_node} --ntasks-per-node={per_node} --distribution=block",
        *([f"--cpus-per-task={cores}"] if cores else []),
        "--kill-on-bad-exit=1 --mpi=none --open-mode=append",
        f"--output={shlex.quote(log)}",
        *options,
    ]
    tail = f'"$preempted" {shlex.join(words_of_run(request, place))}'
    if not by_node:
        ignore = """sh -c 'trap "" USR1; exec "$@"' task"""
        return [*words, f"{ignore} {shlex.join([*inside, python])} -m seqengine.launch.task", f"{NONE} {tail}"]
    agent = shlex.join([*inside, python, "-m", "torch.distributed.run"])
    on_node = f'trap "" USR1; exec {agent} --node-rank="$SLURM_NODEID" "$@"'  # the task's shell knows its node
    return [
        *words,
        f"sh -c {shlex.quote(on_node)} task",
        f'--nnodes={request.nodes} --nproc-per-node={each} --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        f"-m seqengine.launch.task {shlex.quote(str(place.logs))}/$SLURM_JOB_ID",
        tail,
    ]


def _container(request: Request, place: Place) -> tuple[list[str], list[str]]:
    """Words before the command, and options of srun."""
    image, mounts = request.container, ",".join(request.container_mounts)
    if image is None:
        return [], []
    if request.container_runtime == "apptainer":
        gpu, bind = (["--nv"] if request.gpus_per_node else []), (["--bind", mounts] if mounts else [])
        return ["apptainer", "exec", *gpu, *bind, "--pwd", str(place.start), image], []
    options = {"image": image, "mounts": mounts, "workdir": str(place.start)}
    return [], [f"--container-{name}={shlex.quote(value)}" for name, value in options.items() if value]


_NODE = """\
node=$1
case "$node" in
    '' | *[!0-9]*) node={nodes} ;;
esac
if [ "$node" -ge {nodes} ]; then
    echo "seqengine: say which of the nodes this is, 0 to {last}: bash $0 NODE" >&2
    exit {bad_input}
fi"""
_NODE_SIGNALS = """\
trap '' USR1  # torchrun would die of it
trap 'signalled=1' INT  # a terminal sends it to torchrun too
trap 'signalled=1; kill -TERM "$step"' TERM
"""
_NODE_END = f"""\
if [ -e "$preempted" ]; then
    rm -f "$preempted"
    echo "seqengine: preempted and saved; the same command goes on" >&2
    exit {PREEMPTED}
fi
exit "$code"
"""


def node_script(request: Request, each: int, place: Place, python: str, address: str) -> str:
    """The script for every node: `bash launch.sh NODE`, NODE from 0."""
    port, logs = _or(request.master_port, PORT), place.logs / place.log_name
    lines = [
        "#!/bin/bash",
        f"# Written by seqengine launch. On every node: bash {shlex.quote(str(place.node_script))} NODE",
        _NODE.format(nodes=request.nodes, last=request.nodes - 1, bad_input=BAD_INPUT),
        f"cd {shlex.quote(str(place.start))} || exit {BAD_INPUT}",
        f"preempted={shlex.quote(str(place.folder / 'preempted'))}-$node",
        'rm -f "$preempted"',
        "",
        *_environment(request),
        *_exports(request),
        "",
        _NODE_SIGNALS,
        f'{shlex.quote(python)} -m torch.distributed.run --nnodes={request.nodes} --node-rank="$node" \\',
        f"    --nproc-per-node={each} --master-addr={shlex.quote(address)} --master-port={port} \\",
        f"    --max-restarts={_or(request.max_restarts, 0)} -m seqengine.launch.task \\",
        f'    {shlex.quote(str(logs))} "$preempted" {shlex.join(words_of_run(request, place))} &',
        f"{_WAIT}\n",
        _NODE_END,
    ]
    return "\n".join(lines)
