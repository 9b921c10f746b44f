"""Processes that a command starts on this machine."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqengine.config.run import RunConfig


def num_processes(config: "RunConfig") -> int:
    """Processes to start here; 'auto' means one, unless a launcher gives more."""
    parallel = config.parallel
    copies, shards = (n if isinstance(n, int) else 1 for n in (parallel.replicate, parallel.shard))
    return copies * shards * parallel.sequence


def train_words(config: str, overrides: Iterable[str] = (), allow_change: Iterable[str] = ()) -> list[str]:
    """The words of `seqengine train` for every process of a run."""
    changes = [word for key in allow_change for word in ("--allow-change", key)]
    return ["train", config, *overrides, *changes]


def launch(arguments: list[str], num_processes: int, **options: Any) -> int:
    from seqengine.launch.torchrun import run_local

    sys.stdout.flush()
    return run_local(arguments, num_processes, **options)
