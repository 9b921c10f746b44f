"""From a process of a job to a mesh, and back: device, threads, memory, groups."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seqengine.config.engine import ParallelSection
from seqengine.config.mesh_checks import Length, lengths
from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.launch.environment import (
    Processes,
    available_cores,
    prepare_deterministic_cuda,
    prepare_rendezvous,
    read_life,
)
from seqengine.parallel.mesh import Mesh, start_processes, stop_processes


def mesh_shape(config: RunConfig, processes: Processes) -> tuple[int, int]:
    """(groups of ranks that read different windows, how many of them share one copy of the weights).

    Raises InputError if the mesh does not fit the number of processes, in any stage.
    """
    parallel, world = config.parallel, processes.world_size
    groups, rest = divmod(world, parallel.sequence)
    copies, shard = _copies_and_shards(parallel, groups)
    if rest or copies * shard != groups:
        shape = f"parallel.replicate x shard x sequence = {parallel.replicate} x {parallel.shard} x {parallel.sequence}"
        needed = copies * shard * parallel.sequence
        raise InputError(
            f"{shape} must be the number of processes; got {world}. Start {max(1, needed)}, or change them."
        )
    problems = [
        p
        for length in lengths(config.train, config.data, parallel)
        for p in _stage_problems(length, config, world, copies if parallel.is_sharded else 1)
    ]
    if problems:
        raise InputError(*problems)
    return groups, shard


def _copies_and_shards(parallel: ParallelSection, groups: int) -> tuple[int, int]:
    """`auto` filled in, for so many groups of ranks that read different windows."""
    copies, shard = parallel.replicate, parallel.shard
    if isinstance(shard, str):
        one_copy = max(1, groups // (1 if isinstance(copies, str) else copies))
        shard = one_copy if parallel.is_sharded else 1
    return (groups // shard if isinstance(copies, str) else copies), shard


def _stage_problems(length: Length, config: RunConfig, world: int, copies: int) -> Iterator[str]:
    windows = config.train.batch_tokens // length.seq_len
    if world // copies % length.sequence:
        ranks = f"{world} ranks" if copies == 1 else f"{world // copies} ranks of a copy of the weights"
        yield f"{length.sequence_key} = {length.sequence} must divide the {ranks}; change it, or the number of processes."
        return
    groups = world // length.sequence
    if windows % groups:
        yield (
            f"parallel.replicate x shard = {groups} must divide the {windows} windows of a step (train.batch_tokens / "
            f"{length.key}); change train.batch_tokens or the number of processes."
        )
    elif length.micro_batch != "auto" and windows // groups % length.micro_batch:
        yield (
            f"{length.micro_batch_key} = {length.micro_batch} must divide the {windows // groups} windows of one replica; "
            "set it to a divisor, or leave it 'auto'."
        )


def ranks_per_node(config: RunConfig, processes: Processes) -> int | None:
    """Neighbouring ranks on one machine; None where nodes would cut the ranks or a window unevenly."""
    here, sequence = processes.local_world_size, config.parallel.sequence
    fits = processes.world_size % here == 0 and (here % sequence == 0 or sequence % here == 0)
    return here if fits else None


def choose_device(config: RunConfig, processes: Processes) -> torch.device:
    """run.device, this process's own GPU. Raises InputError if CUDA is asked for and not there."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device: CUDA is not available here; got 'cuda'. Set run.device='cpu' or 'auto'.")
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", processes.local_rank)


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that torch frees, where it can be told to (glibc).

    By default each large tensor is mapped anew and its pages are cleared at first touch, in every step. Costs: the process
    keeps its peak memory until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def mesh_of(config: RunConfig, processes: Processes) -> Iterator[Mesh]:
    """The mesh of this job, for the time of a run."""
    groups, shards = mesh_shape(config, processes)
    device = choose_device(config, processes)
    if config.run.deterministic:
        if device.type == "cuda":
            prepare_deterministic_cuda()
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory would make a fault repeatable that our kernels' tests look for; it costs a third of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.set_num_threads(max(1, available_cores() // processes.local_world_size))
        keep_freed_memory()
    if processes.world_size == 1:
        yield Mesh.single(device)
        return
    prepare_rendezvous(processes)
    life = read_life(processes)
    start_processes(processes.rank, processes.world_size, device, config.comm.init_timeout, life=life)
    try:
        node = ranks_per_node(config, processes)
        yield Mesh.create(groups, config.parallel.sequence, device, num_shards=shards, ranks_per_node=node)
    finally:
        stop_processes()
