"""The `seqengine` command: train, eval, generate, check, ckpt, plan, launch, watch, report, demo, version.

Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted after a good save.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from seqengine.errors import BAD_INPUT, FAILED, PREEMPTED, InputError
from seqengine.launch.cli_ckpt import add_ckpt
from seqengine.launch.cli_eval import add_eval
from seqengine.launch.cli_launch import add_launch
from seqengine.launch.cli_plan import add_plan
from seqengine.launch.cli_processes import launch, num_processes, train_words
from seqengine.launch.cli_report import add_report
from seqengine.launch.cli_watch import add_watch


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
    train.add_argument(
        "--max-restarts",
        type=_count,
        default=0,
        metavar="N",
        help="start all processes again, from the last checkpoint, when one is killed; at most so often",
    )
    train.set_defaults(run=_train)

    add_eval(commands)

    generate = commands.add_parser("generate", help="go on writing where a prompt ends")
    generate.add_argument("target", metavar="RUN|CHECKPOINT", type=Path, help="a directory such as runs/a")
    generate.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of the run's")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("-n", "--tokens", type=int, default=100, help="tokens to write after each prompt")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    generate.add_argument("--top-k", type=int, help="of so many most likely tokens")
    generate.add_argument("--top-p", type=float, help="of the fewest tokens that have this probability together")
    generate.add_argument("--seed", type=int, default=0, help="of the draws; the same seed writes the same")
    generate.add_argument("--ema", action="store_true", help="the averaged weights of a run with optim.ema")
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

    add_ckpt(commands)
    add_plan(commands)
    add_launch(commands)
    add_watch(commands)
    add_report(commands)

    demo = commands.add_parser(
        "demo", help="the main job, small: train on two processes, evaluate on one, draw the curve"
    )
    demo.add_argument("--fasta", type=Path, help="a genome of yours in place of the synthetic one")
    demo.add_argument("overrides", nargs="*", metavar="a.b=c")
    demo.set_defaults(run=_demo)

    version = commands.add_parser("version", help="versions of this program and of what it stands on")
    version.set_defaults(run=_version)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from seqengine.check import check_run
    from seqengine.checkpoint.store import CheckpointError
    from seqengine.config.load import load
    from seqengine.data.source import open_source
    from seqengine.launch.environment import read_processes
    from seqengine.launch.process import choose_device, mesh_of, mesh_shape
    from seqengine.rundir import RunDirectory
    from seqengine.train import Preempted, TrainingError, train

    allowed = tuple(arguments.allow_change)
    loaded = load(arguments.config, arguments.overrides)
    processes = read_processes()
    # Find every fault here, before a group or a directory is made.
    choose_device(loaded.config, processes)
    if processes.launched:
        mesh_shape(loaded.config, processes)
    RunDirectory(loaded.config.run_dir).check_resumable(loaded, allowed)
    source = check_run(loaded.config).source or open_source(loaded.config.data)
    wanted = num_processes(loaded.config)
    if not processes.launched and (wanted > 1 or arguments.max_restarts):
        words = train_words(arguments.config, arguments.overrides, allowed)
        signals = loaded.config.ckpt.on_signal
        return launch(words, wanted, max_restarts=arguments.max_restarts, signals=signals)
    with mesh_of(loaded.config, processes) as mesh:
        try:
            train(loaded, source, mesh, allow_changes=allowed)
        except Preempted as stop:
            _say(mesh.rank, str(stop))
            return PREEMPTED
        except (TrainingError, CheckpointError) as error:
            _say(mesh.rank, str(error))
            return FAILED
    return 0


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(f"seqengine: {text}", file=sys.stderr, flush=True)


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


def _demo(arguments: argparse.Namespace) -> int:
    from seqengine.launch.demo import run_demo

    return run_demo(arguments.fasta, arguments.overrides)


def _version(arguments: argparse.Namespace) -> int:
    from seqengine.rundir import versions

    for name, version in versions().items():
        print(f"{name} {version}")
    return 0


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0; got {text!r}")
    return int(text)
