"""Blocks of channels shared out among threads of Python, each with its part of torch's threads.

A block is some ten operations of a few dozen microseconds. Where all threads share each of them, they wait for one another
after each: a tenth of the time on a quiet machine, and most of it where another process has one of the cores, because the
others spin. Threads with blocks of their own meet at the end only, and a slow one takes fewer blocks. Which thread has a block
changes no digit of it; how many there are decides how large blocks are, as the number of torch's threads does elsewhere.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import Empty, SimpleQueue

import torch

from seqengine.kernels.conv.plan import Block
from seqengine.kernels.environment import torch_library

Work = Callable[[Block], None]


def share(blocks: Iterable[Block], workers: int, start: Callable[[], Work]) -> None:
    """Work on all blocks. start() is called once by each worker, for memory of its own, and returns what it does with a block.

    Blocks of one filter stay together and in order: their gradients are added up. The first error is raised, when all workers
    have ended.
    """
    if workers <= 1:
        work = start()
        for block in blocks:
            work(block)
        return
    waiting: SimpleQueue[list[Block]] = SimpleQueue()
    for together in _by_filter(blocks):
        waiting.put(together)
    threads, inference = max(1, torch.get_num_threads() // workers), torch.is_inference_mode_enabled()

    def run() -> None:
        _limit_own_threads(threads)
        with torch.inference_mode(inference), torch.no_grad():
            work = start()
            while True:
                try:
                    together = waiting.get_nowait()
                except Empty:
                    return
                for block in together:
                    work(block)

    with ThreadPoolExecutor(workers, "long_conv") as pool:
        for ended in [pool.submit(run) for _ in range(workers)]:
            ended.result()


def can_share() -> bool:
    """Whether a thread of Python can have fewer threads of torch's than the others: where torch has OpenMP."""
    return _set_own_threads() is not None


def _by_filter(blocks: Iterable[Block]) -> list[list[Block]]:
    found: list[list[Block]] = []
    for block in blocks:
        if block.starts_filter:
            found.append([])
        found[-1].append(block)
    return found


def _limit_own_threads(threads: int) -> None:
    """Of the calling thread alone: torch.set_num_threads is meant for all that begin later, too."""
    torch.get_num_threads()  # a new thread's first question gives it as many as the others: not after ours
    set_threads = _set_own_threads()
    assert set_threads is not None
    set_threads(threads)


@cache
def _set_own_threads() -> Callable[[int], object] | None:
    """OpenMP's, of the library that torch's threads come from: one that was loaded before torch goes before torch's own."""
    if os.name != "posix":
        return None
    for library in (ctypes.CDLL(None), torch_library()):
        found: Callable[[int], object] | None = getattr(library, "omp_set_num_threads", None)
        if found is not None and _takes_effect(found):
            return found
    return None


def _takes_effect(set_threads: Callable[[int], object]) -> bool:
    """On the thread that calls it."""

    def ask() -> bool:
        other = torch.get_num_threads() + 1
        set_threads(other)
        return torch.get_num_threads() == other

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()
