"""The words of `seqengine plan`."""

import argparse


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `plan`. What the command needs is imported when it runs."""
    plan = commands.add_parser(
        "plan",
        help="memory, bytes and time of a run on a machine, before it is paid for; the best meshes with --search",
    )
    plan.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset's name such as hyenadna-tiny-1k")
    plan.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that take precedence over the file's")
    plan.add_argument("--nodes", type=_number, metavar="N", help="machines; default 1")
    plan.add_argument(
        "--gpus-per-node",
        type=_number,
        metavar="G",
        help="default: those of the config's mesh; 8 where --nodes is given",
    )
    plan.add_argument("--gpu", default="h200", metavar="NAME", help="h200 (default), h100, a100 or cpu")
    plan.add_argument("--search", action="store_true", help="rank all meshes, backends and checkpoints for these GPUs")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None


def _plan(arguments: argparse.Namespace) -> int:
    from seqengine.launch.plan import print_plan

    print_plan(
        arguments.config,
        arguments.overrides,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu=arguments.gpu,
        searches=arguments.search,
        as_json=arguments.json,
    )
    return 0
