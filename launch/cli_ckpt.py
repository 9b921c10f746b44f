"""The words of `seqengine ckpt`: ls, verify, diff, consolidate, import, export."""

import argparse
from pathlib import Path


def add_ckpt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `ckpt` and of everything below it. What the commands need is imported when one runs."""
    ckpt = commands.add_parser("ckpt", help="checkpoints: list, verify, compare, gather; published weights in and out")
    below = ckpt.add_subparsers(required=True, metavar="COMMAND")

    ls = below.add_parser("ls", help="the checkpoints of a run")
    ls.add_argument("run_dir", metavar="RUN", type=Path)
    ls.add_argument("--verify", action="store_true", help="hash every file, and say which checkpoints are whole")
    ls.set_defaults(run=_ls)

    verify = below.add_parser("verify", help="hash every file; exit code 1 if one is not as it was saved")
    verify.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    verify.set_defaults(run=_verify)

    diff = below.add_parser("diff", help="what differs between two checkpoints")
    diff.add_argument("first", metavar="A", type=Path, help="a run (its newest whole checkpoint) or a checkpoint")
    diff.add_argument("second", metavar="B", type=Path)
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    diff.set_defaults(run=_diff)

    gather = below.add_parser("consolidate", help="write the weights of a model into one file")
    gather.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    gather.add_argument("file", metavar="FILE", type=Path, help="its end tells the format: .safetensors or .pt")
    gather.add_argument("--ema", action="store_true", help="the averaged weights, where the run keeps them")
    gather.add_argument("--force", action="store_true", help="replace the file")
    gather.set_defaults(run=_consolidate)

    bring = below.add_parser("import", help="make a run of published weights, to train, evaluate and generate from")
    bring.add_argument("source", metavar="FOLDER_OR_FILE", type=Path, help="with config.json in it, or beside the file")
    bring.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="must not exist")
    bring.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings of the run, such as data.fasta=genome.fa"
    )
    bring.add_argument("--format", help="hyenadna, h3, gla or evo2; found out if not given")
    bring.set_defaults(run=_import)

    write = below.add_parser("export", help="write a run's weights as others publish theirs")
    write.add_argument("target", metavar="RUN|CHECKPOINT", type=Path)
    write.add_argument("folder", metavar="FOLDER", type=Path)
    write.add_argument("--format", required=True, help="hyenadna, h3, gla or evo2")
    write.add_argument("--force", action="store_true", help="replace an earlier export")
    write.set_defaults(run=_export)


def _ls(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt_tools import list_checkpoints

    return list_checkpoints(arguments.run_dir, verify=arguments.verify)


def _verify(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt_tools import verify_checkpoints

    return verify_checkpoints(arguments.target)


def _diff(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt_tools import compare

    return compare(arguments.first, arguments.second, as_json=arguments.json)


def _consolidate(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt_tools import consolidate

    return consolidate(arguments.target, arguments.file, ema=arguments.ema, replace=arguments.force)


def _import(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt import import_weights

    return import_weights(arguments.source, arguments.run_dir, arguments.format, arguments.overrides)


def _export(arguments: argparse.Namespace) -> int:
    from seqengine.launch.ckpt import export_weights

    return export_weights(arguments.target, arguments.folder, arguments.format, replace=arguments.force)
