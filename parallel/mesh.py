"""The mesh of ranks, replicate x sequence, and the only place that starts process groups."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from seqengine.parallel import comm


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid: rank = replica * sequence_size + sequence_rank, so that the parts of a window are neighbours."""

    rank: int
    size: int
    replica: int
    num_replicas: int
    world: dist.ProcessGroup | None
    """All ranks; None in a single process."""
    sequence: dist.ProcessGroup | None
    """The ranks that share this rank's windows; None if windows are whole."""
    device: torch.device

    @classmethod
    def single(cls, device: torch.device) -> "Mesh":
        """One process, no groups."""
        return cls(0, 1, 0, 1, None, None, device)

    @classmethod
    def create(cls, num_replicas: int, sequence_size: int, device: torch.device) -> "Mesh":
        """Over the started processes. Every rank must call. Raises ValueError if the grid does not cover the ranks."""
        world = dist.get_world_size()
        if num_replicas * sequence_size != world:
            raise ValueError(
                f"Mesh: replicate x sequence must be the number of ranks; got {num_replicas} x {sequence_size} != {world}."
            )
        grid = init_device_mesh(device.type, (num_replicas, sequence_size), mesh_dim_names=("replicate", "sequence"))
        return cls(
            rank=dist.get_rank(),
            size=world,
            replica=grid.get_local_rank("replicate"),
            num_replicas=num_replicas,
            world=dist.group.WORLD,
            sequence=grid.get_group("sequence") if sequence_size > 1 else None,
            device=device,
        )

    @property
    def sequence_size(self) -> int:
        return self.size // self.num_replicas

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(v) for v in comm.all_reduce_sum(numbers, self.world).tolist()]

    def max(self, value: float) -> float:
        """Largest over all ranks."""
        return float(
            comm.all_reduce_max(torch.tensor(value, dtype=torch.float64, device=self.device), self.world).item()
        )

    def barrier(self) -> None:
        comm.barrier(self.world)


def start_processes(rank: int, world_size: int, device: torch.device, timeout_seconds: float) -> None:
    """Join the processes that a launcher started (rendezvous from its environment): gloo on CPUs, NCCL on GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )


def stop_processes() -> None:
    """Leave the process group, if any. Collect first: a mesh or optimiser that outlives its group can abort at exit."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@torch.no_grad()
def reduce_gradients(module: nn.Module, mesh: Mesh) -> None:
    """Replace every gradient by its sum over all ranks: one flat message per dtype, in the order of parameters.

    A parameter without a gradient on this rank (it may have one on another) counts as zero. Afterwards all ranks hold the
    same gradients, bit for bit.
    """
    if mesh.world is None:
        return
    for dtype in sorted({p.dtype for p in module.parameters() if p.requires_grad}, key=str):
        parameters = [p for p in module.parameters() if p.requires_grad and p.dtype == dtype]
        flat = torch.cat([_gradient(p).reshape(-1) for p in parameters])
        comm.all_reduce_sum(flat, mesh.world)
        _write_back(flat, parameters)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _write_back(flat: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    start = 0
    for parameter in parameters:
        part = flat[start : start + parameter.numel()].view_as(parameter)
        if parameter.grad is None:
            parameter.grad = part.clone()
        else:
            parameter.grad.copy_(part)
        start += parameter.numel()
