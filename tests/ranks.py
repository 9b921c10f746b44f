"""Run a function on P ranks of a gloo group, in forked processes of this machine, and collect what it returns."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANK_TIMEOUT_SECONDS = 60


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(group, *arguments) on rank 0, on rank 1, ...]; raises AssertionError with the traceback of a rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, num_ranks, Path(folder), function, arguments), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(RANK_TIMEOUT_SECONDS)
            if process.is_alive():
                process.kill()
        results = []
        for rank in range(num_ranks):
            path = Path(folder) / f"result-{rank}"
            assert path.is_file(), (
                f"rank {rank} of {num_ranks} ended without a result: exit code {processes[rank].exitcode}"
            )
            is_good, value = pickle.loads(path.read_bytes())
            assert is_good, f"rank {rank} of {num_ranks} failed:\n{value}"
            results.append(value)
        return results


def _rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=RANK_TIMEOUT_SECONDS // 2),
        )
        outcome = (True, function(dist.group.WORLD, *arguments))
    except BaseException:  # noqa: BLE001  whatever it was, the parent prints it
        outcome = (False, traceback.format_exc())
    aside = folder / f"aside-{rank}"
    aside.write_bytes(pickle.dumps(outcome))
    aside.rename(folder / f"result-{rank}")
    os._exit(0)
