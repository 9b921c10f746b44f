"""The mesh of ranks, replicate x shard x sequence, and the only place that starts process groups.

A sequence is split over the sequence axis. Ranks with the same replica read the same windows; replicas read different ones.
Parameters may be sharded over shard x sequence (parallel.sharding); their gradients, losses and token counts are sums over
replicate x shard x sequence, which is every rank.
"""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from seqengine.parallel import comm
from seqengine.parallel.ledger import Ledger


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid: rank = replica * sequence_size + sequence_rank, so that the parts of a window are neighbours.

    replica = replicate_rank * num_shards + shard_rank: num_shards neighbouring replicas share one copy of the parameters.
    """

    rank: int
    size: int
    replica: int
    num_replicas: int
    """Groups of ranks that read different windows, replicate x shard."""
    world: dist.ProcessGroup | None
    """All ranks, replicate x shard x sequence: the view of losses and token counts. None in a single process."""
    sequence: dist.ProcessGroup | None
    """The ranks that share this rank's windows; None if windows are whole."""
    device: torch.device
    num_shards: int = 1
    """Replicas that share one copy of the parameters; a copy is cut over shard x sequence."""
    ranks_per_node: int | None = None
    """Ranks on one node, if known: rank // ranks_per_node is the node."""

    @classmethod
    def single(cls, device: torch.device) -> "Mesh":
        """One process, no groups."""
        return cls(0, 1, 0, 1, None, None, device)

    @classmethod
    def create(
        cls,
        num_replicas: int,
        sequence_size: int,
        device: torch.device,
        *,
        num_shards: int = 1,
        ranks_per_node: int | None = None,
    ) -> "Mesh":
        """Over the started processes. Every rank must call.

        Raises ValueError, before any message, if num_replicas x sequence_size does not cover the ranks, num_shards does not
        divide num_replicas, or ranks_per_node cuts the ranks or a sequence unevenly.
        """
        world = dist.get_world_size()
        if num_replicas * sequence_size != world:
            raise ValueError(
                f"Mesh: replicate x sequence must be the number of ranks; got {num_replicas} x {sequence_size} != {world}."
            )
        if num_shards < 1 or num_replicas % num_shards:
            raise ValueError(f"Mesh: num_shards must divide the {num_replicas} replicas; got {num_shards}.")
        if ranks_per_node is not None:
            _check_nodes(world, sequence_size, ranks_per_node)
        grid = init_device_mesh(device.type, (num_replicas, sequence_size), mesh_dim_names=("replicate", "sequence"))
        return cls(
            rank=dist.get_rank(),
            size=world,
            replica=grid.get_local_rank("replicate"),
            num_replicas=num_replicas,
            world=dist.group.WORLD,
            sequence=grid.get_group("sequence") if sequence_size > 1 else None,
            device=device,
            num_shards=num_shards,
            ranks_per_node=ranks_per_node,
        )

    def reshaped(self, sequence_size: int, *, keep_copies: bool) -> "Mesh":
        """The same ranks, with each window over `sequence_size` of them. Every rank must call.

        keep_copies: for sharded parameters, whose copies stay on the ranks that they lie on.
        Raises ValueError, before any message, if the ranks (of a copy) are no multiple of sequence_size.
        """
        if sequence_size == self.sequence_size:
            return self
        part = self.size // (self.num_copies if keep_copies else 1)
        if part % sequence_size:
            raise ValueError(f"Mesh: sequence_size must divide {part} ranks; got {sequence_size}.")
        return Mesh.create(
            self.size // sequence_size,
            sequence_size,
            self.device,
            num_shards=part // sequence_size if keep_copies else 1,
            ranks_per_node=self.ranks_per_node,
        )

    @property
    def sequence_size(self) -> int:
        return self.size // self.num_replicas

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size

    @property
    def num_copies(self) -> int:
        """Whole copies of the parameters: the replicate axis."""
        return self.num_replicas // self.num_shards

    @property
    def axes(self) -> dict[str, int]:
        """Ranks by axis, the slowest first; a rank is a row-major index into them."""
        return {"replicate": self.num_copies, "shard": self.num_shards, "sequence": self.sequence_size}

    @property
    def node_size(self) -> int | None:
        """Neighbouring ranks of a sequence on one node, as the twins' node_size; None if the nodes are not known."""
        return None if self.ranks_per_node is None else min(self.ranks_per_node, self.sequence_size)

    def parameter_mesh(self) -> DeviceMesh:
        """The flattened view for sharded parameters: shard x sequence, or (replicate, shard x sequence) with several copies.

        Its groups are its own, so that messages of parameters and of sequences do not wait for each other. Every rank must
        call; call once and keep it.
        """
        part = self.size // self.num_copies
        if self.num_copies == 1:
            return init_device_mesh(self.device.type, (part,), mesh_dim_names=("shard_sequence",))
        names = ("replicate", "shard_sequence")
        return init_device_mesh(self.device.type, (self.num_copies, part), mesh_dim_names=names)

    def count_tokens(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Labels that count, over all ranks; int64 []. The divisor of a loss, the same on every rank before its backward."""
        return comm.all_reduce_sum((labels != ignore_index).sum(), self.world)

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(v) for v in comm.all_reduce_sum(numbers, self.world).tolist()]

    def max(self, value: float) -> float:
        """Largest over all ranks."""
        return float(
            comm.all_reduce_max(torch.tensor(value, dtype=torch.float64, device=self.device), self.world).item()
        )

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x` of rank `source`, on every rank and on the mesh's device; the others' tell shape and dtype."""
        x = x.to(self.device).contiguous()
        if self.world is None:
            return x
        received = x.clone() if self.rank == source else torch.empty_like(x)
        for work in comm.start_broadcast(received, source, self.world, Ledger(), "broadcast"):
            work.wait()
        return received

    def barrier(self) -> None:
        comm.barrier(self.world)

    def side_group(self, timeout_seconds: float = 3600.0) -> dist.ProcessGroup | None:
        """All ranks once more, over gloo, for the messages of another thread: they never meet those of training.

        Every rank must call. `free_group` ends it. None in a single process.
        """
        if self.world is None:
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return group


def _check_nodes(world: int, sequence_size: int, ranks_per_node: int) -> None:
    if ranks_per_node < 1 or world % ranks_per_node:
        raise ValueError(f"Mesh: ranks_per_node must divide the {world} ranks; got {ranks_per_node}.")
    if sequence_size % ranks_per_node and ranks_per_node % sequence_size:
        raise ValueError(
            f"Mesh: a sequence must fill whole nodes or lie within one; got {sequence_size} ranks of a sequence and "
            f"{ranks_per_node} of a node."
        )


def start_processes(
    rank: int, world_size: int, device: torch.device, timeout_seconds: float, *, life: str | None = None
) -> None:
    """Join the processes that a launcher started (rendezvous from its environment): gloo on CPUs, NCCL on GPUs.

    life: keeps what is said in a store that outlives the processes apart from what earlier ones said there.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store: Store | None = None
    if life is not None:
        shared, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout_seconds)))
        store = PrefixStore(f"life-{life}", shared)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
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


def free_group(group: dist.ProcessGroup | None) -> None:
    """End a side group, if it is one and the processes have not left already."""
    if group is not None and dist.is_initialized():
        dist.destroy_process_group(group)


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
