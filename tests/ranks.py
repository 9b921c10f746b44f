"""Run a function on P ranks of a gloo group, in forked processes of this machine, and collect what it returns."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANK_TIMEOUT_SECONDS = 60


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(group, *arguments) on rank 0, on rank 1, ...]; raises AssertionError with the traceback of a rank."""
    outcomes = _run(num_ranks, function, arguments, RANK_TIMEOUT_SECONDS // 2, 2 * RANK_TIMEOUT_SECONDS)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank} of {num_ranks} failed:\n{outcome.error}"
        assert outcome.has_result, f"rank {rank} of {num_ranks} ended without a result: exit code {outcome.exit_code}"
    return [outcome.result for outcome in outcomes]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: with a result, with a traceback, or without a word (killed: a negative exit code)."""

    exit_code: int | None
    has_result: bool = False
    result: Any = None
    error: str | None = None


def run_ranks_to_their_end(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float, limit_seconds: float
) -> list[Outcome]:
    """How each rank ended, whatever became of the others. timeout_seconds: of the group; limit_seconds: of all."""
    return _run(num_ranks, function, arguments, timeout_seconds, limit_seconds)


def _run(
    num_ranks: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout_seconds: float,
    limit_seconds: float,
) -> list[Outcome]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(rank, num_ranks, Path(folder), function, arguments, timeout_seconds), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit_seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [_outcome(Path(folder) / f"result-{r}", p.exitcode) for r, p in enumerate(processes)]


def _outcome(path: Path, exit_code: int | None) -> Outcome:
    if not path.is_file():
        return Outcome(exit_code)
    is_good, value = pickle.loads(path.read_bytes())
    return Outcome(exit_code, True, result=value) if is_good else Outcome(exit_code, error=value)


def _rank(
    rank: int,
    num_ranks: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout_seconds: float,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_seconds),
        )
        outcome = (True, function(dist.group.WORLD, *arguments))
    except BaseException:  # noqa: BLE001  whatever it was, the parent prints it
        outcome = (False, traceback.format_exc())
    aside = folder / f"aside-{rank}"
    aside.write_bytes(pickle.dumps(outcome))
    aside.rename(folder / f"result-{rank}")
    sys.stdout.flush()
    os._exit(0 if outcome[0] else 1)
