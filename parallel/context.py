"""SequenceContext: who holds which tokens of a sequence. An argument of every twin, never stored by a module."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqengine.parallel import comm
from seqengine.parallel.layout import offsets, split_sizes


@dataclass(frozen=True)
class SequenceContext:
    """A sequence cut into contiguous parts, part r on rank r of `group`. Parts may be uneven, and empty.

    bounds: P + 1 global positions; this rank holds [bounds[rank], bounds[rank + 1]).
    A value that is the same on every rank (the result of `join`, a summed loss) counts once: its gradient is taken to be
    the same on every rank, and is not summed again.
    """

    group: dist.ProcessGroup | None
    rank: int
    bounds: tuple[int, ...]
    _ledger: comm.Ledger = field(default_factory=comm.Ledger, compare=False, repr=False)

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, local_tokens: int) -> "SequenceContext":
        """From the tokens that this rank holds: one collective, once. Every rank of the group must call.

        Raises ValueError if local_tokens is negative.
        """
        if local_tokens < 0:
            raise ValueError(f"SequenceContext.create: local_tokens must be >= 0; got {local_tokens}.")
        if group is None or group.size() == 1:
            return cls(None, 0, (0, local_tokens))
        ledger = comm.Ledger()
        return cls(group, group.rank(), offsets(comm.gather_integers(local_tokens, group, ledger)), ledger)

    @classmethod
    def even(cls, group: dist.ProcessGroup | None, total_tokens: int) -> "SequenceContext":
        """`total_tokens` cut into parts that differ by at most one token; no communication."""
        if group is None or group.size() == 1:
            return cls.single(total_tokens)
        return cls(group, group.rank(), offsets(split_sizes(total_tokens, group.size())))

    @classmethod
    def single(cls, tokens: int) -> "SequenceContext":
        """The whole sequence on one rank: every twin is the plain kernel, and nothing is sent."""
        return cls(None, 0, (0, tokens))

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.bounds) - 1

    @property
    def local_tokens(self) -> int:
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    @property
    def total_tokens(self) -> int:
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        """Tokens of every rank."""
        return [b - a for a, b in pairwise(self.bounds)]

    def require_group(self) -> dist.ProcessGroup:
        """The group of a context of several ranks."""
        assert self.group is not None, "a context of several ranks has a group"
        return self.group

    def ledger(self) -> comm.Ledger:
        """What this rank sent through this context."""
        return self._ledger

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's tokens, int64 [T]."""
        return torch.arange(self.bounds[self.rank], self.bounds[self.rank + 1], device=device)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole x that every rank holds; a view. Its gradient is zero outside the part."""
        if x.shape[dim] != self.total_tokens:
            raise ValueError(f"split: x must have {self.total_tokens} tokens in dim {dim}; got {tuple(x.shape)}.")
        return x.narrow(dim, self.bounds[self.rank], self.local_tokens)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The whole of which x is this rank's part, on every rank; the inverse of `split`.

        Traffic: each rank sends its part to the P - 1 others. Gradient: this rank's part of the whole's gradient.
        """
        self.check_local("join", x, dim)
        if self.size == 1:
            return x
        whole: Tensor = _Join.apply(x, self, dim % x.ndim)  # type: ignore[no-untyped-call]
        return whole

    def check_local(self, name: str, x: Tensor, dim: int) -> None:
        """Raises ValueError, on this rank before any collective, if x is not this rank's part."""
        if x.shape[dim] != self.local_tokens:
            raise ValueError(
                f"{name}: rank {self.rank} holds {self.local_tokens} tokens of {self.total_tokens}, so dim {dim} must have "
                f"that size; got {tuple(x.shape)}. Make the context from the parts as they are cut."
            )


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceContext, dim: int) -> Tensor:
        ctx.context, ctx.dim = context, dim
        shapes = [torch.Size((*x.shape[:dim], n, *x.shape[dim + 1 :])) for n in context.sizes]
        parts: Sequence[Tensor] = [x.contiguous()] * context.size
        received = comm.all_to_all(parts, shapes, context.require_group(), context.ledger(), "join")
        return torch.cat(received, dim=dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.context.split(gradient, ctx.dim), None, None
