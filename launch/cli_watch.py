"""The words of `seqengine watch`."""

import argparse
import math
from pathlib import Path


def add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `watch`. What the command needs is imported when it runs."""
    watch = commands.add_parser("watch", help="follow a run from another terminal; name the rank that is stuck")
    watch.add_argument("run_dir", metavar="RUN", type=Path, help="it may not have begun yet")
    watch.add_argument(
        "--once", action="store_true", help="print how it stands, and end; exit code 1 if a rank is stuck"
    )
    watch.add_argument(
        "--stuck-after", type=_seconds, default=120.0, metavar="SECONDS", help="of silence (default 120)"
    )
    watch.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    watch.set_defaults(run=_watch)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds above 0; got {text!r}")
    return value


def _watch(arguments: argparse.Namespace) -> int:
    from seqengine.launch.watch import watch

    return watch(arguments.run_dir, once=arguments.once, stuck_after=arguments.stuck_after, interval=arguments.interval)
