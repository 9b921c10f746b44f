"""All ranks of a group in one process: the exchanges, the twins and their backward as they are, without any process group.

Each rank is a thread, of which one runs at a time: it goes on until it has to wait, and then hands on to the rank that became
ready first. So the order is the same on every run, and a state in which no rank can go on is seen at once. Messages between two
ranks meet in the order in which they were posted; the n-th collective of a rank meets the n-th of all others.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
SHOWN = 8
"""Ranks and messages that an error names."""


class LocalRanks:
    """P ranks in this process.

        results = LocalRanks(1024).run(function, shards)      # function(group, shards[r]) on rank r

    The group that function gets stands where a process group does: `SequenceContext.create(group, n)`. Tensors are on the CPU,
    computed by one thread, so that results do not depend on the machine's cores; backward runs on the rank that calls it.
    Memory:    that of all ranks, and stack_bytes of address space for each.
    Raises:    what function raised on the first rank that did, with a note that names the rank. RuntimeError if no rank can go
               on, which says who waits for what, or if messages or collectives do not match.
    """

    def __init__(self, size: int, *, stack_bytes: int = 1 << 21):
        if size < 1:
            raise ValueError(f"LocalRanks: size must be >= 1; got {size}.")
        self.size, self.stack_bytes = size, stack_bytes

    def run(self, function: Callable[..., Result], *per_rank: Sequence[Any]) -> list[Result]:
        """[function(group, *(a[0] for a in per_rank)) on rank 0, ..]; each argument is a sequence with one item a rank."""
        for i, argument in enumerate(per_rank):
            if len(argument) != self.size:
                raise ValueError(f"LocalRanks: argument {i} must have {self.size} items; got {len(argument)}.")
        world = _World(self.size)
        is_grad_enabled = torch.is_grad_enabled()

        def start(rank: int) -> None:
            with torch.set_grad_enabled(is_grad_enabled):
                world.results[rank] = function(LocalGroup(world, rank), *(a[rank] for a in per_rank))

        before, num_threads = threading.stack_size(self.stack_bytes), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            world.run(start)
        finally:
            threading.stack_size(before)
            torch.set_num_threads(num_threads)
        return world.results


class _Stopped(BaseException):
    """Ends a rank because another one failed."""


@dataclass
class _Pending:
    """One rank's part of a call that may have to wait for other ranks."""

    world: "_World"
    rank: int
    needs: Callable[[], str]
    is_done: bool = False

    def wait(self) -> None:
        if not self.is_done:
            self.world.wait_for(self)


@dataclass
class _Post:
    """A message that one of two ranks has posted."""

    peer: int
    tensor: Tensor
    is_send: bool
    pending: _Pending

    def __str__(self) -> str:
        way = "send to" if self.is_send else "receive from"
        return f"rank {self.pending.rank} posted a {way} rank {self.peer} of {_kind(self.tensor)} that was not met"


@dataclass
class _Meeting:
    """One collective: what each rank brought to it so far."""

    kind: str
    first: int
    brought: dict[int, Any] = field(default_factory=dict)
    pending: list[_Pending] = field(default_factory=list)


class _World:
    """Who runs, who waits, and what was posted. Only the rank that runs touches it."""

    def __init__(self, size: int):
        self.size = size
        self.results: list[Any] = [None] * size
        self.errors: dict[int, BaseException] = {}
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._end = threading.Semaphore(0)
        self._ready = deque(range(size))
        self._waiting: dict[int, _Pending] = {}
        self._is_stuck = self._is_stopped = False
        self._posts: dict[tuple[int, int], deque[_Post]] = {}
        self._meetings: dict[int, _Meeting] = {}
        self._calls = [0] * size

    def run(self, start: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=self._live, args=(r, start), daemon=True) for r in range(self.size)]
        for thread in threads:
            thread.start()
        self._hand_on()
        self._end.acquire()
        for thread in threads:
            thread.join()
        self._report()

    def _live(self, rank: int, start: Callable[[int], None]) -> None:
        self._turns[rank].acquire()
        if not self._is_stopped:
            try:
                start(rank)
            except _Stopped:
                self.results[rank] = None
            except BaseException as error:  # noqa: BLE001  it is raised again by the thread that called
                self.errors[rank] = error
                self._is_stopped = self._is_stopped or not self._is_stuck
        self._hand_on()

    def _hand_on(self) -> None:
        """Let the next rank run; the end if there is none."""
        if self._ready:
            self._turns[self._ready.popleft()].release()
        elif self._waiting:
            self._is_stuck = not self._is_stopped
            self._turns[next(iter(self._waiting))].release()
        else:
            self._end.release()

    def wait_for(self, pending: _Pending) -> None:
        rank = pending.rank
        self._waiting[rank] = pending
        self._hand_on()
        self._turns[rank].acquire()
        if not pending.is_done:
            del self._waiting[rank]
            if self._is_stuck:
                raise RuntimeError(f"it waits for {pending.needs()}")
            raise _Stopped

    def finish(self, pending: _Pending) -> None:
        """What it waits for is there."""
        pending.is_done = True
        if self._waiting.get(pending.rank) is pending:
            del self._waiting[pending.rank]
            self._ready.append(pending.rank)

    def _report(self) -> None:
        lost = [str(post) for queue in self._posts.values() for post in queue]
        lost += [f"only {_names(m.brought)} entered a {m.kind}" for m in self._meetings.values()]
        if self._is_stuck:
            lines = [*(str(error) for error in self.errors.values()), *lost]
            raise RuntimeError("LocalRanks: no rank can go on.\n" + _lines(lines)) from next(
                iter(self.errors.values()), None
            )
        for rank, error in self.errors.items():
            error.add_note(f"on rank {rank} of {self.size}")
            raise error
        if lost:
            raise RuntimeError("LocalRanks: the ranks ended with exchanges that did not match.\n" + _lines(lost))

    def post(self, source: int, target: int, tensor: Tensor, *, is_send: bool) -> _Pending:
        """A message of one side; it is copied when the other side is there."""
        rank, peer = (source, target) if is_send else (target, source)
        if not 0 <= peer < self.size or peer == rank:
            raise RuntimeError(f"rank {rank} has no peer {peer}; there are {self.size} ranks")
        text = f"rank {peer} to receive {_kind(tensor)}" if is_send else f"a message of rank {peer}, {_kind(tensor)}"
        post = _Post(peer, tensor, is_send, _Pending(self, rank, lambda: text))
        queue = self._posts.setdefault((source, target), deque())
        if not queue or queue[0].is_send == is_send:
            queue.append(post)
            return post.pending
        other = queue.popleft()
        if not queue:
            del self._posts[source, target]
        sent, received = (tensor, other.tensor) if is_send else (other.tensor, tensor)
        if (sent.numel(), sent.dtype) != (received.numel(), received.dtype):
            raise RuntimeError(f"rank {source} sends {_kind(sent)} and rank {target} receives {_kind(received)}")
        with torch.no_grad():
            received.copy_(sent.view(received.shape))
        for pending in (other.pending, post.pending):
            self.finish(pending)
        return post.pending

    def meet(self, rank: int, kind: str, brought: Any, transfer: Callable[[list[Any]], None]) -> _Pending:
        """A collective: the last rank that enters it does it for all."""
        call = self._calls[rank]
        self._calls[rank] += 1
        meeting = self._meetings.setdefault(call, _Meeting(kind, rank))
        if meeting.kind != kind:
            raise RuntimeError(f"rank {rank} enters a {kind} where rank {meeting.first} is in a {meeting.kind}")

        def missing() -> str:
            return f"{_names(set(range(self.size)) - set(meeting.brought))} in a {kind}"

        meeting.brought[rank] = brought
        meeting.pending.append(_Pending(self, rank, missing))
        mine = meeting.pending[-1]
        if len(meeting.brought) == self.size:
            del self._meetings[call]
            with torch.no_grad():
                transfer([meeting.brought[r] for r in range(self.size)])
            meeting.brought.clear()  # ranks that wait hold the meeting, but not what others brought
            for pending in sorted(meeting.pending, key=lambda p: p.rank):
                self.finish(pending)
            meeting.pending.clear()
        return mine


def _kind(x: Tensor) -> str:
    return f"{x.numel()} x {str(x.dtype).removeprefix('torch.')}"


def _names(ranks: Any) -> str:
    known = sorted(ranks)
    return (
        f"rank {known[0]}"
        if len(known) == 1
        else f"ranks {', '.join(map(str, known[:SHOWN]))}"
        + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "")
    )


def _lines(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])


class LocalGroup:
    """One rank's view of a `LocalRanks`: the transport that `parallel.comm` uses."""

    def __init__(self, world: _World, rank: int):
        self._world, self._rank = world, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._world.size

    def tensor_device(self) -> torch.device:
        return torch.device("cpu")

    def start_messages(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> list[_Pending]:
        found = [self._world.post(self._rank, peer, t, is_send=True) for peer, t in sends]
        return found + [self._world.post(peer, self._rank, t, is_send=False) for peer, t in receives]

    def start_all_to_all(
        self, incoming: Tensor, outgoing: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> list[_Pending]:
        return [
            self._world.meet(self._rank, "all-to-all", (incoming, outgoing, receive_sizes, send_sizes), _all_to_all)
        ]

    def start_all_gather(self, everyone: list[Tensor], x: Tensor) -> list[_Pending]:
        return [self._world.meet(self._rank, "all-gather", (everyone, x), _all_gather)]

    def start_broadcast(self, x: Tensor, source: int) -> list[_Pending]:
        return [self._world.meet(self._rank, f"broadcast from rank {source}", (x, source), _broadcast)]

    def start_all_reduce(self, x: Tensor, by: Literal["sum", "max"]) -> list[_Pending]:
        return [self._world.meet(self._rank, f"all-reduce ({by})", (x, by), _all_reduce)]

    def gather_objects(self, value: object) -> list[object]:
        found: list[object] = []
        self._world.meet(self._rank, "gather of objects", (found, value), _gather_objects).wait()
        return found

    def barrier(self) -> None:
        self._world.meet(self._rank, "barrier", None, lambda _: None).wait()


def _same(kind: str, tensors: Sequence[Tensor]) -> None:
    for rank, x in enumerate(tensors):
        if (x.numel(), x.dtype) != (tensors[0].numel(), tensors[0].dtype):
            raise RuntimeError(f"{kind}: rank 0 brings {_kind(tensors[0])}, rank {rank} {_kind(x)}")


def _all_to_all(brought: list[tuple[Tensor, Tensor, list[int], list[int]]]) -> None:
    parts = [outgoing.split(send_sizes) for _, outgoing, _, send_sizes in brought]
    for rank, (incoming, _, receive_sizes, _) in enumerate(brought):
        mine = [part[rank] for part in parts]
        for peer, (part, size) in enumerate(zip(mine, receive_sizes, strict=True)):
            if part.numel() != size or part.dtype != incoming.dtype:
                raise RuntimeError(
                    f"rank {peer} sends {_kind(part)} and rank {rank} receives {size} x {incoming.dtype}"
                )
        torch.cat(mine, out=incoming)


def _all_gather(brought: list[tuple[list[Tensor], Tensor]]) -> None:
    mine = [x for _, x in brought]
    _same("all-gather", mine)
    for everyone, _ in brought:
        torch._foreach_copy_(everyone, mine)


def _broadcast(brought: list[tuple[Tensor, int]]) -> None:
    tensors = [x for x, _ in brought]
    _same("broadcast", tensors)
    source = brought[0][1]
    for rank, x in enumerate(tensors):
        if rank != source:
            x.copy_(tensors[source])


def _all_reduce(brought: list[tuple[Tensor, str]]) -> None:
    tensors = [x for x, _ in brought]
    _same("all-reduce", tensors)
    everyone = torch.stack(tensors)
    total = everyone.sum(dim=0) if brought[0][1] == "sum" else everyone.amax(dim=0)
    for x in tensors:
        x.copy_(total)


def _gather_objects(brought: list[tuple[list[object], object]]) -> None:
    for found, _ in brought:
        found.extend(value for _, value in brought)
