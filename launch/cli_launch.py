"""The words of `seqengine launch`: CONFIG, or status, logs, cancel and a run.

A config whose name is one of these words is given as a path: `./status`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SLURM = ("partition", "account", "time", "qos", "constraint", "reservation")


class _Parser(argparse.ArgumentParser):
    """Hands the rest to another parser if the first word is one of its own."""

    below: dict[str, argparse.ArgumentParser]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if args and args[0] in self.below:
            return self.below[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `launch` and of everything below it. What the commands need is imported when one runs."""
    text = "train on this machine, on several by torchrun, or under Slurm"
    prog = commands.add_parser("launch", help=text).prog
    parser = _Parser(
        prog=prog,
        description=f"{text[0].upper()}{text[1:]}. Afterwards: launch status RUN, launch logs RUN, launch cancel RUN.",
    )
    commands._name_parser_map["launch"] = parser
    _add_options(parser)
    _add_slurm(parser)
    parser.set_defaults(run=_launch)
    parser.below = {
        "status": argparse.ArgumentParser(prog=f"{prog} status", description="what a launched run does now"),
        "logs": argparse.ArgumentParser(prog=f"{prog} logs", description="what a rank has printed"),
        "cancel": argparse.ArgumentParser(prog=f"{prog} cancel", description="end a launched run; it saves first"),
    }
    for below in parser.below.values():
        below.add_argument("run_dir", metavar="RUN", type=Path)
    status = parser.below["status"]
    status.add_argument(
        "--stuck-seconds", type=float, default=120.0, metavar="S", help="a rank quiet for longer is named"
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(run=_status)
    logs = parser.below["logs"]
    logs.add_argument("--rank", type=int, metavar="R", help="0 if not given")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.set_defaults(run=_logs)
    parser.below["cancel"].set_defaults(run=_cancel)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset's name; or status, logs, cancel")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that take precedence over the file's")
    add = parser.add_argument
    add("--scheduler", required=True, choices=("slurm", "torchrun", "local"))
    add("--nodes", type=int, default=1, metavar="N")
    add("--gpus-per-node", type=int, metavar="G", help="one process for each")
    add("--tasks-per-node", type=int, metavar="K", help="processes on each node, where it has no GPUs")
    add("--dry-run", action="store_true", help="print the script; write and start nothing")
    add("--allow-change", action="append", default=[], metavar="KEY", help="let a resumed run change this key")
    add("--python", metavar="PATH", help="on the nodes; if not given, the one that runs this command")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a shell line before the run, such as 'module load cuda'",
    )
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the run's environment")
    add(
        "--max-restarts",
        type=int,
        metavar="N",
        help="local and torchrun: start again after a failure, at most so often",
    )
    add("--master-addr", metavar="HOST", help="torchrun: node 0, as the others reach it; this machine if not given")
    add("--master-port", type=int, metavar="PORT", help="torchrun: 29500 if not given")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm")
    for name in SLURM:
        group.add_argument(f"--{name}", metavar=name.upper())
    add = group.add_argument
    add(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch, such as mem=64G"
    )
    add("--tasks", choices=("gpu", "node"), help="srun starts a task a GPU (if not given), or a torchrun a node")
    add("--cpus-per-task", type=int, metavar="C", help="cores of each process")
    add("--signal-seconds", type=int, metavar="S", help="save so long before the time limit; 180 if not given")
    add("--max-requeues", type=int, metavar="N", help="queue a preempted job again at most so often; 100 if not given")
    add("--container", metavar="IMAGE")
    add("--container-runtime", choices=("pyxis", "apptainer"), help="pyxis (srun's own options) if not given")
    add("--container-mounts", action="append", default=[], metavar="FROM:TO")


def _launch(arguments: argparse.Namespace) -> int:
    from seqengine.launch.request import Request
    from seqengine.launch.submit import launch

    known = {name: getattr(arguments, name) for name in Request.__dataclass_fields__ if hasattr(arguments, name)}
    lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    named = {name: value for name in SLURM if (value := getattr(arguments, name)) is not None}
    request = Request(**{**known, **lists, "named": named})
    return launch(arguments.config, arguments.overrides, request, dry_run=arguments.dry_run)


def _status(arguments: argparse.Namespace) -> int:
    from seqengine.launch.job import status

    return status(arguments.run_dir, stuck_seconds=arguments.stuck_seconds, as_json=arguments.json)


def _logs(arguments: argparse.Namespace) -> int:
    from seqengine.launch.job import logs

    return logs(arguments.run_dir, rank=arguments.rank, follow=arguments.follow)


def _cancel(arguments: argparse.Namespace) -> int:
    from seqengine.launch.job import cancel

    return cancel(arguments.run_dir)
