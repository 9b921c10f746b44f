"""`seqengine eval`: loss of a run or a checkpoint on its validation windows, and whether long context helps."""

import argparse
import json
from pathlib import Path
from typing import Any

from seqengine.launch.cli_processes import launch, num_processes

PICTURES = (".png", ".svg", ".pdf")


def add_eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `seqengine eval`."""
    evaluate = commands.add_parser("eval", help="loss of a run, or of one checkpoint, on its validation windows")
    evaluate.add_argument(
        "target", metavar="RUN|CHECKPOINT", type=Path, help="a directory such as runs/a, or runs/a/ckpt/step-00000300"
    )
    evaluate.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings in place of the run's, such as eval.windows=all"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--ema", action="store_true", help="the averaged weights of a run with optim.ema")
    evaluate.add_argument("--positions", action="store_true", help="also the loss by position in a window")
    evaluate.add_argument(
        "--contexts", action="store_true", help="also the loss of each window's last tokens with more and more context"
    )
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="a picture of them: .png, .svg or .pdf")
    evaluate.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from seqengine.data.source import open_source
    from seqengine.errors import InputError
    from seqengine.evaluate import evaluate_checkpoint
    from seqengine.launch.environment import read_processes
    from seqengine.launch.process import mesh_of
    from seqengine.rundir import CheckpointTarget

    if arguments.plot is not None and not (arguments.positions or arguments.contexts):
        raise InputError("--plot: needs something to draw; add --positions or --contexts.")
    if arguments.plot is not None and arguments.plot.suffix not in PICTURES:
        raise InputError(f"--plot: must end in {', '.join(PICTURES)}; got {arguments.plot}.")
    target = CheckpointTarget.find(arguments.target)
    loaded = target.run.read_config(tuple(arguments.overrides))
    processes = read_processes()
    wanted = num_processes(loaded.config)
    if not processes.launched and wanted > 1:
        return launch(_words(arguments), wanted)
    with mesh_of(loaded.config, processes) as mesh:
        source = open_source(loaded.config.data)
        result = evaluate_checkpoint(
            target,
            loaded.config,
            source,
            mesh,
            averaged=arguments.ema,
            positions=arguments.positions,
            contexts=arguments.contexts,
        )
        if mesh.rank == 0:
            _tell(result, arguments)
    return 0


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command again, for the processes of a mesh."""
    flags = [f"--{name}" for name in ("json", "ema", "positions", "contexts") if getattr(arguments, name)]
    plot = [] if arguments.plot is None else ["--plot", str(arguments.plot)]
    return ["eval", str(arguments.target), *arguments.overrides, *flags, *plot]


def _tell(result: Any, arguments: argparse.Namespace) -> None:
    from seqengine.context_use import plot

    print(json.dumps(result.as_dict()) if arguments.json else result.describe())
    if arguments.plot is not None:
        plot({name: parts for name, parts in result.parts.items() if parts}, arguments.plot)
