"""The `seqengine` command: train, eval, generate, check, ckpt, demo, version.

Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted after a good save.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqengine.errors import InputError

if TYPE_CHECKING:
    from seqengine.config.run import RunConfig

FAILED, BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad input becomes a message on standard error, one line a problem."""
    arguments = _parse(argv)
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        if _prints_errors():
            for problem in error.problems:
                print(f"seqengine: {problem}", file=sys.stderr)
        return BAD_INPUT


def _prints_errors() -> bool:
    """Of processes that all found the same fault, one a machine tells it."""
    from seqengine.launch.environment import read_processes

    try:
        return read_processes().local_rank == 0
    except InputError:
        return True


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings a.b=c may stand before options and after them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seqengine", description="Train models on very long sequences.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on with, a run; starts its processes itself")
    train.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset's name such as hyenadna-tiny-1k")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that take precedence over the file's")
    train.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="let a resumed run change this key"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="loss of a run, or of one checkpoint, on its validation windows")
    evaluate.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_eval)

    generate = commands.add_parser("generate", help="go on writing where a prompt ends")
    generate.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    generate.add_argument("overrides", nargs="*", metavar="a.b=c")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("-n", "--tokens", type=int, default=100, help="tokens to write after each prompt")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    generate.add_argument("--top-k", type=int, help="of so many most likely tokens")
    generate.add_argument("--top-p", type=float, help="of the fewest tokens that have this probability together")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--distill",
        metavar="N|auto:TOLERANCE",
        help="replace filters of max_len taps by N modes, or by as many as keep the relative error of every filter below "
        "TOLERANCE, so that tokens cost less; the errors are printed on standard error",
    )
    generate.set_defaults(run=_generate)

    check = commands.add_parser("check", help="report everything wrong with a config; start nothing")
    check.add_argument("config", metavar="CONFIG")
    check.add_argument("overrides", nargs="*", metavar="a.b=c")
    check.set_defaults(run=_check)

    _add_ckpt(commands)

    demo = commands.add_parser(
        "demo", help="the main job, small: train on two processes, evaluate on one, draw the curve"
    )
    demo.add_argument("--fasta", type=Path, help="a genome of yours in place of the synthetic one")
    demo.add_argument("overrides", nargs="*", metavar="a.b=c")
    demo.set_defaults(run=_demo)

    version = commands.add_parser("version", help="versions of this program and of what it stands on")
    version.set_defaults(run=_version)
    return parser


def _add_ckpt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ckpt = commands.add_parser("ckpt", help="published weights in and out")
    below = ckpt.add_subparsers(required=True, metavar="COMMAND")

    bring = below.add_parser("import", help="make a run of published weights, to train, evaluate and generate from")
    bring.add_argument("source", metavar="FOLDER_OR_FILE", type=Path, help="with config.json in it, or beside the file")
    bring.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="must not exist")
    bring.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings of the run, such as data.fasta=genome.fa"
    )
    bring.add_argument("--format", help="hyenadna, h3, gla or evo2; found out if not given")
    bring.set_defaults(run=_ckpt_import)

    write = below.add_parser("export", help="write a run's weights as others publish theirs")
    write.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    write.add_argument("folder", metavar="FOLDER", type=Path)
    write.add_argument("--format", required=True, help="hyenadna, h3, gla or evo2")
    write.add_argument("--force", action="store_true", help="replace an earlier export")
    write.set_defaults(run=_ckpt_export)


def _train(arguments: argparse.Namespace) -> int:
    from seqengine.check import check_run
    from seqengine.checkpoint.store import CheckpointError
    from seqengine.config.load import load
    from seqengine.data.packed import pack
    from seqengine.launch.environment import read_processes
    from seqengine.launch.process import choose_device, mesh_of, num_replicas
    from seqengine.rundir import RunDirectory
    from seqengine.train import TrainingError, train

    allowed = tuple(arguments.allow_change)
    loaded = load(arguments.config, arguments.overrides)
    processes = read_processes()
    # Find every fault here, before a group or a directory is made.
    choose_device(loaded.config, processes)
    if processes.launched:
        num_replicas(loaded.config, processes)
    RunDirectory(loaded.config.run_dir).check_resumable(loaded, allowed)
    check_run(loaded.config)
    if not processes.launched and _num_processes(loaded.config) > 1:
        changes = [word for key in allowed for word in ("--allow-change", key)]
        return _launch(["train", arguments.config, *arguments.overrides, *changes], _num_processes(loaded.config))
    with mesh_of(loaded.config, processes) as mesh:
        try:
            train(loaded, pack(loaded.config.data), mesh, allow_changes=allowed)
        except (TrainingError, CheckpointError) as error:
            if mesh.rank == 0:
                print(f"seqengine: {error}", file=sys.stderr)
            return FAILED
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from seqengine.data.packed import pack
    from seqengine.evaluate import evaluate_checkpoint
    from seqengine.launch.environment import read_processes
    from seqengine.launch.process import mesh_of
    from seqengine.rundir import CheckpointTarget

    target = CheckpointTarget.find(arguments.target)
    loaded = target.run.read_config(tuple(arguments.overrides))
    processes = read_processes()
    if not processes.launched and _num_processes(loaded.config) > 1:
        words = ["eval", str(arguments.target), *arguments.overrides, *(["--json"] if arguments.json else [])]
        return _launch(words, _num_processes(loaded.config))
    with mesh_of(loaded.config, processes) as mesh:
        result = evaluate_checkpoint(target, loaded.config, pack(loaded.config.data), mesh)
        if mesh.rank == 0:
            print(json.dumps(result.as_dict()) if arguments.json else result.describe())
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from seqengine.launch.environment import read_processes
    from seqengine.launch.generate import write_continuations

    write_continuations(arguments, read_processes())
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from seqengine.check import check_run
    from seqengine.config.load import load

    print(check_run(load(arguments.config, arguments.overrides, need_data=False).config).describe())
    return 0


def _ckpt_import(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt import import_weights

    return import_weights(arguments.source, arguments.run_dir, arguments.format, arguments.overrides)


def _ckpt_export(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt import export_weights

    return export_weights(arguments.target, arguments.folder, arguments.format, replace=arguments.force)


def _demo(arguments: argparse.Namespace) -> int:
    from seqengine.launch.demo import run_demo

    return run_demo(arguments.fasta, arguments.overrides)


def _version(arguments: argparse.Namespace) -> int:
    from seqengine.rundir import versions

    for name, version in versions().items():
        print(f"{name} {version}")
    return 0


def _num_processes(config: "RunConfig") -> int:
    """Processes to start here; replicate = 'auto' means one replica unless a launcher gives more."""
    replicas = config.parallel.replicate if isinstance(config.parallel.replicate, int) else 1
    return replicas * config.parallel.sequence


def _launch(arguments: list[str], num_processes: int) -> int:
    from seqengine.launch.torchrun import run_local

    sys.stdout.flush()
    return run_local(arguments, num_processes)
