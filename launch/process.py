"""From a process of a job to a mesh, and back: device, threads, memory, groups."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.launch.environment import Processes, available_cores, prepare_deterministic_cuda
from seqengine.parallel.mesh import Mesh, start_processes, stop_processes

GROUP_TIMEOUT_SECONDS = 600.0
"""A rank that waits this long for another raises, instead of hanging."""


def num_replicas(config: RunConfig, processes: Processes) -> int:
    """Copies of the model. Raises InputError if the mesh does not fit the number of processes."""
    sequence, wanted, world = config.parallel.sequence, config.parallel.replicate, processes.world_size
    replicas = wanted if isinstance(wanted, int) else max(1, world // sequence)
    if replicas * sequence != world:
        shape = f"parallel.replicate x parallel.sequence = {wanted} x {sequence}"
        raise InputError(
            f"{shape} must be the number of processes; got {world}. Start {replicas * sequence}, or change them."
        )
    if config.windows_per_step % replicas:
        raise InputError(
            f"parallel.replicate = {replicas} must divide the {config.windows_per_step} windows of a step "
            f"(train.batch_tokens / data.seq_len); change train.batch_tokens or the number of processes."
        )
    rows = config.windows_per_step // replicas
    if config.train.micro_batch != "auto" and rows % config.train.micro_batch:
        raise InputError(
            f"train.micro_batch = {config.train.micro_batch} must divide the {rows} windows of one replica; "
            "set it to a divisor, or leave it 'auto'."
        )
    return replicas


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
    replicas = num_replicas(config, processes)
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
    start_processes(processes.rank, processes.world_size, device, GROUP_TIMEOUT_SECONDS)
    try:
        yield Mesh.create(replicas, config.parallel.sequence, device)
    finally:
        stop_processes()
