"""Every call to torch.distributed that moves tensors during a step, with a ledger of what each one sent.

Rules: every rank of a group enters every call; shapes follow from the layout alone, never from data; point-to-point
messages are sent and received in one batch, and all of its works are waited for.

All calls go the same way (`_start`): while a checkpointed block runs again, the tape of the ledger gives what was received in
its first run, and nothing is sent. Else the transport of the group sends, the ledger records it, and an error, a timeout
included, becomes a RuntimeError that names the rank, the operation and its peers. A group of processes is moved by
torch.distributed; another group brings its own transport (`local_ranks.LocalGroup`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from seqengine.parallel.ledger import Ledger, Recorder


class Waits(Protocol):
    """Something under way."""

    def wait(self) -> Any: ...


class Transport(Protocol):
    """What moves tensors between the ranks of a group: each method starts a call, and returns what to wait for."""

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def tensor_device(self) -> torch.device: ...

    def start_all_to_all(
        self, incoming: Tensor, outgoing: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Sequence[Waits]: ...

    def start_messages(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Sequence[Waits]: ...

    def start_all_gather(self, everyone: list[Tensor], x: Tensor) -> Sequence[Waits]: ...

    def start_broadcast(self, x: Tensor, source: int) -> Sequence[Waits]: ...

    def start_all_reduce(self, x: Tensor, by: Literal["sum", "max"]) -> Sequence[Waits]: ...

    def gather_objects(self, value: object) -> list[object]: ...

    def barrier(self) -> None: ...


Group = dist.ProcessGroup | Transport


class _Processes:
    """The transport of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def rank(self) -> int:
        return self._group.rank()

    def size(self) -> int:
        return self._group.size()

    def tensor_device(self) -> torch.device:
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def start_all_to_all(
        self, incoming: Tensor, outgoing: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Sequence[Waits]:
        work = dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=self._group, async_op=True)
        return [work]

    def start_messages(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Sequence[Waits]:
        operations = [dist.P2POp(dist.isend, t, group=self._group, group_peer=peer) for peer, t in sends]
        operations += [dist.P2POp(dist.irecv, t, group=self._group, group_peer=peer) for peer, t in receives]
        return list(dist.batch_isend_irecv(operations)) if operations else []

    def start_all_gather(self, everyone: list[Tensor], x: Tensor) -> Sequence[Waits]:
        return [dist.all_gather(everyone, x, group=self._group, async_op=True)]

    def start_broadcast(self, x: Tensor, source: int) -> Sequence[Waits]:
        return [dist.broadcast(x, group=self._group, group_src=source, async_op=True)]

    def start_all_reduce(self, x: Tensor, by: Literal["sum", "max"]) -> Sequence[Waits]:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[by]
        return [dist.all_reduce(x, op=operation, group=self._group, async_op=True)]

    def gather_objects(self, value: object) -> list[object]:
        everyone: list[object] = [None] * self.size()
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def barrier(self) -> None:
        dist.barrier(group=self._group)


def _transport(group: Group) -> Transport:
    return _Processes(group) if isinstance(group, dist.ProcessGroup) else group


class Work:
    """A call under way. What it receives is there once it was waited for."""

    def __init__(self, waits: Sequence[Waits], name: "_Name", record: Recorder | None, tensors: Sequence[Tensor]):
        self._waits, self._name, self._record, self._tensors = list(waits), name, record, tensors

    def wait(self) -> None:
        """Raises RuntimeError if the call fails, or takes longer than the timeout of its group."""
        waits, self._waits = self._waits, []
        for each in waits:
            try:
                each.wait()
            except RuntimeError as error:
                raise self._name.failure(error) from error
        if self._record is not None:
            self._record()
        self._record, self._tensors = None, ()  # they had to live until now


class _Name:
    """A call, in the words of an error."""

    def __init__(self, operation: str, peers: str, transport: Transport, ledger: Ledger | None):
        self._what = f"rank {transport.rank()} of {transport.size()}: {operation} {peers}"
        self._ledger = ledger

    def failure(self, error: Exception) -> RuntimeError:
        reason = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
        before = "" if self._ledger is None else f" The last exchanges of this rank: {self._ledger.last()}."
        return RuntimeError(f"{self._what} failed: {reason}.{before}")


def _start(
    operation: str,
    peers: str,
    group: Group,
    ledger: Ledger | None,
    call: Callable[[Transport], Sequence[Waits]],
    *,
    received: Sequence[Tensor],
    tensors: Sequence[Tensor] = (),
    entry: tuple[int, int] | None = None,
) -> list[Work]:
    """A call: from the tape, when `received` is filled and no work is returned, or under way.

    received: what other ranks fill. tensors: all others that the call works on. entry: bytes and messages for the ledger.
    """
    if ledger is not None and ledger.replay(operation, received):
        return []
    transport = _transport(group)
    name = _Name(operation, peers, transport, ledger)
    try:
        waits = call(transport)
    except RuntimeError as error:
        raise name.failure(error) from error
    record = None
    if ledger is not None:
        if entry is not None:
            ledger.record(operation, *entry)
        record = ledger.recorder(operation, received)
    return [Work(waits, name, record, (*received, *tensors))]


def _wait(works: Sequence[Work]) -> None:
    for work in works:
        work.wait()


def gather_integers(value: int, group: Group, ledger: Ledger) -> list[int]:
    """One integer of every rank, in the order of ranks."""
    mine = torch.tensor([value], dtype=torch.int64, device=_transport(group).tensor_device())
    everyone, works = start_all_gather(mine, group, ledger, "gather_integers")
    _wait(works)
    return [int(t.item()) for t in everyone]


def all_to_all(
    parts: Sequence[Tensor], receive_shapes: Sequence[torch.Size], group: Group, ledger: Ledger, operation: str
) -> list[Tensor]:
    """Part j goes to rank j; returns what each rank sent here, in the given shapes. Parts may be empty or uneven."""
    received, works = start_all_to_all(parts, receive_shapes, group, ledger, operation)
    _wait(works)
    return received


def start_all_to_all(
    parts: Sequence[Tensor], receive_shapes: Sequence[torch.Size], group: Group, ledger: Ledger, operation: str
) -> tuple[list[Tensor], list[Work]]:
    """`all_to_all` under way: the results are there once the works are done. The parts are copied, and may change."""
    example, rank = parts[0], group.rank()
    send_sizes = [p.numel() for p in parts]
    receive_sizes = [s.numel() for s in receive_shapes]
    outgoing = torch.cat([p.reshape(-1) for p in parts])
    incoming = torch.empty(sum(receive_sizes), dtype=example.dtype, device=example.device)
    received = incoming.split(receive_sizes)
    sent = [n for j, n in enumerate(send_sizes) if j != rank and n > 0]
    works = _start(
        operation,
        "between all ranks",
        group,
        ledger,
        lambda transport: transport.start_all_to_all(incoming, outgoing, receive_sizes, send_sizes),
        received=[t for j, t in enumerate(received) if j != rank],
        tensors=[outgoing],
        entry=(sum(sent) * example.element_size(), len(sent)),
    )
    if not works:
        received[rank].copy_(parts[rank].detach().reshape(-1))
    return [t.view(s) for t, s in zip(received, receive_shapes, strict=True)], works


def send_and_receive(
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: Group,
    ledger: Ledger,
    operation: str,
) -> None:
    """Point-to-point messages in one batch; peers are ranks of the group; receives are filled in place."""
    _wait(start_send_and_receive(sends, receives, group, ledger, operation))


def start_send_and_receive(
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: Group,
    ledger: Ledger,
    operation: str,
) -> list[Work]:
    """`send_and_receive` under way: the caller leaves the tensors alone, and waits for all of the works."""
    entry = (sum(t.nbytes for _, t in sends), len(sends))
    return _messages(sends, receives, group, ledger, operation, entry)


def start_receive(x: Tensor, source: int, group: Group, ledger: Ledger, operation: str) -> list[Work]:
    """x from rank `source`, in place, once the works are done. Recorded by the sender alone."""
    return _messages([], [(source, x)], group, ledger, operation, None)


def _messages(
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: Group,
    ledger: Ledger,
    operation: str,
    entry: tuple[int, int] | None,
) -> list[Work]:
    words = [f"{word} rank {peer}" for word, pairs in (("to", sends), ("from", receives)) for peer, _ in pairs]
    return _start(
        operation,
        ", ".join(words) or "to nobody",
        group,
        ledger,
        lambda transport: transport.start_messages(sends, receives),
        received=[t for _, t in receives],
        tensors=[t for _, t in sends],
        entry=entry,
    )


def start_all_gather(x: Tensor, group: Group, ledger: Ledger, operation: str) -> tuple[list[Tensor], list[Work]]:
    """x of every rank, in the order of ranks, once the works are done. Counted as x to each of the P - 1 others."""
    peers, rank = group.size() - 1, group.rank()
    everyone = list(torch.empty((group.size(), *x.shape), dtype=x.dtype, device=x.device).unbind())
    works = _start(
        operation,
        "between all ranks",
        group,
        ledger,
        lambda transport: transport.start_all_gather(everyone, x),
        received=[t for j, t in enumerate(everyone) if j != rank],
        tensors=[x],
        entry=(x.nbytes * peers, peers),
    )
    if not works:
        everyone[rank].copy_(x.detach())
    return everyone, works


def start_broadcast(x: Tensor, source: int, group: Group, ledger: Ledger, operation: str) -> list[Work]:
    """x of rank `source` to all, in place. Counted at the source, as x to each of the P - 1 others."""
    is_source = group.rank() == source
    peers = group.size() - 1 if is_source else 0
    return _start(
        operation,
        "to all ranks" if is_source else f"from rank {source}",
        group,
        ledger,
        lambda transport: transport.start_broadcast(x, source),
        received=[] if is_source else [x],
        tensors=[x],
        entry=(x.nbytes * peers, peers),
    )


def all_reduce_sum(x: Tensor, group: Group | None, ledger: Ledger | None = None) -> Tensor:
    """Sum over the group, in place. Counted as the 2 (P-1)/P of x that a ring sends."""
    if group is None or group.size() == 1:
        return x
    entry = (2 * (group.size() - 1) * x.nbytes // group.size(), group.size() - 1)
    return _all_reduce(x, "sum", group, ledger, entry)


def all_reduce_max(x: Tensor, group: Group | None) -> Tensor:
    """Largest value over the group, in place."""
    return x if group is None or group.size() == 1 else _all_reduce(x, "max", group, None, None)


def _all_reduce(
    x: Tensor, by: Literal["sum", "max"], group: Group, ledger: Ledger | None, entry: tuple[int, int] | None
) -> Tensor:
    def call(transport: Transport) -> Sequence[Waits]:
        return transport.start_all_reduce(x, by)

    _wait(_start("all_reduce", "between all ranks", group, ledger, call, received=[x], entry=entry))
    return x


def barrier(group: Group | None) -> None:
    """Wait for every rank of the group."""
    if group is not None and group.size() > 1:

        def call(transport: Transport) -> Sequence[Waits]:
            transport.barrier()
            return []

        _start("barrier", "between all ranks", group, None, call, received=[])


def gather_objects(value: object, group: Group | None) -> list[object]:
    """One small picklable object of every rank, on every rank."""
    if group is None or group.size() == 1:
        return [value]
    found: list[object] = []

    def call(transport: Transport) -> Sequence[Waits]:
        found.extend(transport.gather_objects(value))
        return []

    _start("gather_objects", "between all ranks", group, None, call, received=[])
    return found
