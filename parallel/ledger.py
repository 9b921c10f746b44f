"""What a rank sent, call by call, and the tapes that keep what it received for a block that is run again.

A tape is recorded while the block runs, and read while it runs again: then nothing is sent. Which tapes are at work hangs on
the ledger, that is on the context, which every exchange gets; a backward runs outside both, so that its exchanges neither
read nor write a tape. Blocks may lie within one another: an exchange is written to the tape of each that is being recorded.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
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
class _Kept:
    """What one call received. tensors: None until it is there."""

    operation: str
    kinds: list[tuple[torch.Size, torch.dtype]]
    tensors: list[Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.operation} that receives {[(tuple(s), str(t)) for s, t in self.kinds]}"


class Tape:
    """What the exchanges of a block received, in the order of their calls.

    Memory: a copy of every message that came from another rank, and the result of each all-reduce; as long as the tape lives.
    offload: on the CPU, in pinned memory if the messages are on a GPU.
    """

    def __init__(self, *, offload: bool = False):
        self.offload = offload
        self._calls: list[_Kept] = []
        self._next: int | None = None  # the call to read; None while it is recorded

    @property
    def is_replaying(self) -> bool:
        return self._next is not None

    @property
    def kept_bytes(self) -> int:
        """Of all messages; one that is kept for several blocks at once counts in each."""
        return sum(t.nbytes for call in self._calls for t in call.tensors or [])

    def rewind(self) -> None:
        """Read from the first call on."""
        self._next = 0

    def stop(self) -> None:
        """Read no more."""
        self._next = None

    def add(self, call: _Kept) -> None:
        self._calls.append(call)

    def read(self, asked: _Kept) -> _Kept:
        """The next call. Raises RuntimeError if it was another one."""
        assert self._next is not None, "a tape is rewound before it is read"
        if self._next == len(self._calls):
            raise RuntimeError(
                f"checkpoint: the block asks for {asked} where its first run had no further exchange. It must do the same "
                "each time it runs."
            )
        call = self._calls[self._next]
        if (call.operation, call.kinds) != (asked.operation, asked.kinds):
            raise RuntimeError(
                f"checkpoint: the block asks for {asked} where exchange {self._next} of its first run was {call}. It must do "
                "the same each time it runs."
            )
        if call.tensors is None:
            raise RuntimeError(f"checkpoint: the block started {call} in its first run and never waited for it.")
        self._next += 1
        return call


class Recorder:
    """Where to put what one call receives, once it is there."""

    def __init__(self, call: _Kept, received: Sequence[Tensor], offload: bool):
        self._call, self._received, self._offload = call, received, offload

    def __call__(self) -> None:
        if self._call.tensors is None:
            self._call.tensors = [_copy(t, self._offload) for t in self._received]


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in tensors]


def _copy(x: Tensor, offload: bool) -> Tensor:
    if not offload or x.device.type == "cpu":
        return x.detach().clone()
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return kept.copy_(x.detach())


class Ledger:
    """What this rank sent, call by call. `parallel.cost` predicts the same integers from the layout.

    tapes: of the blocks that run now, the outermost first.
    Not a dataclass: FSDP copies those among the arguments of a block, and a copy would count for nobody.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.tapes: list[Tape] = []
        self._kept: WeakSet[Tape] | None = None

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

    @property
    def kept_bytes(self) -> int:
        """What the tapes of all blocks hold at this moment."""
        return sum(tape.kept_bytes for tape in self._kept or ())

    def keep(self, tape: Tape) -> None:
        """A tape whose block's backward is still to come."""
        if self._kept is None:
            self._kept = WeakSet()
        self._kept.add(tape)

    def last(self, count: int = 5) -> str:
        """The last calls in words, for errors."""
        lines = [f"{e.operation} ({e.sent_bytes} bytes to {e.messages})" for e in self.entries[-count:]]
        return ", ".join(lines) if lines else "none"

    def replay(self, operation: str, received: Sequence[Tensor]) -> bool:
        """Fill what a call receives from the tape, if the block is run again; False if it has to be sent."""
        place = max((i for i, tape in enumerate(self.tapes) if tape.is_replaying), default=None)
        if place is None:
            return False
        call = self.tapes[place].read(_Kept(operation, _kinds(received)))
        assert call.tensors is not None
        with torch.no_grad():
            for t, kept in zip(received, call.tensors, strict=True):
                t.copy_(kept)
        for tape in self.tapes[place + 1 :]:
            tape.add(call)
        return True

    def recorder(self, operation: str, received: Sequence[Tensor]) -> Recorder | None:
        """Where to keep what a call receives; None if no block is being recorded."""
        if not self.tapes:
            return None
        call = _Kept(operation, _kinds(received))
        for tape in self.tapes:
            tape.add(call)
        return Recorder(call, received, all(tape.offload for tape in self.tapes))
