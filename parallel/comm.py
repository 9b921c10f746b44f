"""Every call to torch.distributed that moves tensors during a step, with a ledger of what each one sent.

Rules: every rank of a group enters every call; shapes follow from the layout alone, never from data; point-to-point
messages are sent and received in one batch, and all of its works are waited for.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One collective call as this rank saw it."""

    operation: str
    sent_bytes: int
    """Bytes that left this rank."""
    messages: int
    """Peers that got a non-empty part."""


@dataclass
class Ledger:
    """What this rank sent, call by call. `parallel.cost` predicts the same integers from the layout."""

    entries: list[Entry] = field(default_factory=list)

    def record(self, operation: str, sent_bytes: int, messages: int) -> None:
        self.entries.append(Entry(operation, sent_bytes, messages))

    def sent_bytes(self, operation: str | None = None) -> int:
        """Bytes sent by one operation, or by all."""
        return sum(e.sent_bytes for e in self.entries if operation in (None, e.operation))

    def counts(self) -> dict[str, int]:
        """Calls by operation."""
        return dict(Counter(e.operation for e in self.entries))

    def clear(self) -> None:
        self.entries.clear()


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must lie for the group's backend."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_integers(value: int, group: dist.ProcessGroup, ledger: Ledger) -> list[int]:
    """One integer of every rank, in the order of ranks."""
    mine = torch.tensor([value], dtype=torch.int64, device=group_device(group))
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    ledger.record("gather_integers", mine.nbytes * (group.size() - 1), group.size() - 1)
    return [int(t.item()) for t in everyone]


def all_to_all(
    parts: Sequence[Tensor],
    receive_shapes: Sequence[torch.Size],
    group: dist.ProcessGroup,
    ledger: Ledger,
    operation: str,
) -> list[Tensor]:
    """Part j goes to rank j; returns what each rank sent here, in the given shapes. Parts may be empty or uneven."""
    example = parts[0]
    rank = group.rank()
    send_sizes = [p.numel() for p in parts]
    receive_sizes = [s.numel() for s in receive_shapes]
    outgoing = torch.cat([p.reshape(-1) for p in parts])
    incoming = torch.empty(sum(receive_sizes), dtype=example.dtype, device=example.device)
    dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=group)
    sent = [n for j, n in enumerate(send_sizes) if j != rank and n > 0]
    ledger.record(operation, sum(sent) * example.element_size(), len(sent))
    return [t.view(s) for t, s in zip(incoming.split(receive_sizes), receive_shapes, strict=True)]


def send_and_receive(
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: dist.ProcessGroup,
    ledger: Ledger,
    operation: str,
) -> None:
    """Point-to-point messages in one batch; peers are ranks of the group; receives are filled in place."""
    for work in start_send_and_receive(sends, receives, group, ledger, operation):
        work.wait()


def start_send_and_receive(
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: dist.ProcessGroup,
    ledger: Ledger,
    operation: str,
) -> list[dist.Work]:
    """`send_and_receive` under way: the caller keeps the tensors, and waits for all of the works."""
    operations = [dist.P2POp(dist.isend, t, group=group, group_peer=peer) for peer, t in sends]
    operations += [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, t in receives]
    works = list(dist.batch_isend_irecv(operations)) if operations else []
    ledger.record(operation, sum(t.nbytes for _, t in sends), len(sends))
    return works


def start_receive(x: Tensor, source: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """x from rank `source`, in place, once the works are done. Recorded by the sender alone."""
    return list(dist.batch_isend_irecv([dist.P2POp(dist.irecv, x, group=group, group_peer=source)]))


def start_all_gather(
    x: Tensor, group: dist.ProcessGroup, ledger: Ledger, operation: str
) -> tuple[list[Tensor], list[dist.Work]]:
    """x of every rank, in the order of ranks, once the works are done. Counted as x to each of the P - 1 others."""
    everyone = [torch.empty_like(x) for _ in range(group.size())]
    work = dist.all_gather(everyone, x, group=group, async_op=True)
    ledger.record(operation, x.nbytes * (group.size() - 1), group.size() - 1)
    return everyone, [work]


def start_broadcast(
    x: Tensor, source: int, group: dist.ProcessGroup, ledger: Ledger, operation: str
) -> list[dist.Work]:
    """x of rank `source` to all, in place. Counted at the source, as x to each of the P - 1 others."""
    work = dist.broadcast(x, group=group, group_src=source, async_op=True)
    peers = group.size() - 1 if group.rank() == source else 0
    ledger.record(operation, x.nbytes * peers, peers)
    return [work]


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None, ledger: Ledger | None = None) -> Tensor:
    """Sum over the group, in place. Counted as the 2 (P-1)/P of x that a ring sends."""
    if group is None or group.size() == 1:
        return x
    dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    if ledger is not None:
        ledger.record("all_reduce", 2 * (group.size() - 1) * x.nbytes // group.size(), group.size() - 1)
    return x


def all_reduce_max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Largest value over the group, in place."""
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def barrier(group: dist.ProcessGroup | None) -> None:
    """Wait for every rank of the group."""
    if group is not None and group.size() > 1:
        dist.barrier(group=group)


def gather_objects(value: object, group: dist.ProcessGroup | None) -> list[object]:
    """One small picklable object of every rank, on every rank."""
    if group is None or group.size() == 1:
        return [value]
    everyone: list[object] = [None] * group.size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone
