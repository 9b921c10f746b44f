"""SequenceContext: who holds which tokens of a sequence. An argument of every twin, never stored by a module."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_bounds
from seqengine.parallel import comm
from seqengine.parallel.layout import (
    Interval,
    Intervals,
    Layout,
    count,
    num_parts,
    offsets,
    part_of,
    parts_of,
    split_sizes,
    zigzag_cuts,
)
from seqengine.parallel.ledger import Ledger


@dataclass(frozen=True)
class SequenceContext:
    """A sequence cut into parts, part r on rank r of `group`. Parts may be uneven, and empty.

    cuts:      the boundaries of chunks, global positions. Layout "contiguous": P chunks, this rank holds chunk `rank`;
               "zigzag": 2 P chunks, this rank holds `rank` and then 2 P - 1 - `rank`.
    documents: boundaries of packed documents in the whole sequence, or None.
    A value that is the same on every rank (the result of `join`, a summed loss) counts once: its gradient is taken to be
    the same on every rank, and is not summed again.
    """

    group: comm.Group | None
    rank: int
    cuts: tuple[int, ...]
    layout: Layout = "contiguous"
    documents: tuple[int, ...] | None = None
    _ledger: Ledger = field(default_factory=Ledger, compare=False, repr=False)
    _home: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    """Of a zigzag context: the bounds of the contiguous one that it was made from."""

    def __post_init__(self) -> None:
        name = "SequenceContext"
        check(name, isinstance(self.cuts, tuple) and len(self.cuts) > 1, "cuts must be a tuple [P + 1]", self.cuts)
        check(name, self.layout in ("contiguous", "zigzag"), "layout must be 'contiguous' or 'zigzag'", self.layout)
        is_even = self.layout == "contiguous" or len(self.cuts) % 2 == 1
        check(name, is_even, "zigzag needs the boundaries of 2 P chunks", self.cuts)

    @classmethod
    def create(cls, group: comm.Group | None, local_tokens: int) -> "SequenceContext":
        """From the tokens that this rank holds: one collective, once. Every rank of the group must call.

        Raises ValueError if local_tokens is negative.
        """
        if local_tokens < 0:
            raise ValueError(f"SequenceContext.create: local_tokens must be >= 0; got {local_tokens}.")
        if group is None or group.size() == 1:
            return cls(None, 0, (0, local_tokens))
        ledger = Ledger()
        bounds = offsets(comm.gather_integers(local_tokens, group, ledger))
        return cls(group, group.rank(), bounds, _ledger=ledger)

    @classmethod
    def even(cls, group: comm.Group | None, total_tokens: int) -> "SequenceContext":
        """`total_tokens` cut into parts that differ by at most one token; no communication."""
        if group is None or group.size() == 1:
            return cls.single(total_tokens)
        return cls(group, group.rank(), offsets(split_sizes(total_tokens, group.size())))

    @classmethod
    def single(cls, tokens: int) -> "SequenceContext":
        """The whole sequence on one rank: every twin is the plain kernel, and nothing is sent."""
        # Given here, not by the field's default: torch.compile can trace this call, and not that one.
        return cls(None, 0, (0, tokens), _ledger=Ledger())

    def zigzag(self) -> "SequenceContext":
        """The same sequence, ranks, documents and ledger in 2 P chunks that differ by at most one token; no communication.

        On one rank the two layouts are the same, and this is the context itself.
        """
        cuts = zigzag_cuts(self.total_tokens, self.size)
        if self.size == 1 or self.cuts == cuts:
            return self
        home = self.cuts if self.layout == "contiguous" else self._home
        return SequenceContext(self.group, self.rank, cuts, "zigzag", self.documents, self._ledger, home)

    def contiguous(self) -> "SequenceContext":
        """The contiguous context that a zigzag one was made from, or else one of even parts; itself if it is contiguous."""
        if self.layout == "contiguous":
            return self
        bounds = offsets(split_sizes(self.total_tokens, self.size)) if self._home is None else self._home
        return SequenceContext(self.group, self.rank, bounds, "contiguous", self.documents, self._ledger)

    def with_documents(self, cu_seqlens: Sequence[int] | Tensor | None) -> "SequenceContext":
        """The same with packed documents: their boundaries in the whole sequence, the same on every rank; None: with none.

        Shapes: cu_seqlens [M + 1] = [0, .., total_tokens], ascending; documents without tokens are allowed. Read on the host.
        Raises: ValueError if the boundaries are not that.
        """
        name, documents = "with_documents", None
        if cu_seqlens is not None:
            given = torch.as_tensor(cu_seqlens)
            is_vector = given.ndim == 1 and given.numel() >= 2 and not given.is_floating_point()
            check(name, is_vector, "cu_seqlens must be integers [M + 1], M >= 1", cu_seqlens)
            documents = tuple(check_bounds(name, given, self.total_tokens))
        return SequenceContext(
            self.group, self.rank, self.cuts, self.layout, documents, _ledger=self._ledger, _home=self._home
        )

    @property
    def bounds(self) -> tuple[int, ...]:
        """[P + 1]: rank r holds [bounds[r], bounds[r + 1]). Raises ValueError for zigzag, where no such numbers exist."""
        self.require_contiguous("bounds")
        return self.cuts

    @property
    def size(self) -> int:
        """Ranks."""
        return num_parts(self.cuts, self.layout)

    @property
    def parts(self) -> tuple[Intervals, ...]:
        """What each rank holds: intervals (start, stop) of global positions, in the order of its tokens."""
        return parts_of(self.cuts, self.layout)

    @property
    def local_tokens(self) -> int:
        return count(part_of(self.cuts, self.layout, self.rank))

    @property
    def total_tokens(self) -> int:
        return self.cuts[-1]

    @property
    def sizes(self) -> list[int]:
        """Tokens of every rank."""
        return [count(held) for held in self.parts]

    def require_group(self) -> comm.Group:
        """The group of a context of several ranks."""
        assert self.group is not None, "a context of several ranks has a group"
        return self.group

    def require_contiguous(self, name: str) -> None:
        """Raises ValueError, on every rank before any collective, if a rank's tokens are not one interval."""
        if self.layout != "contiguous":
            raise ValueError(
                f"{name}: the context must be contiguous; got layout={self.layout!r}, two chunks of tokens on each rank. "
                f"Bring x there with relayout(x, ctx=ctx, to=ctx.contiguous(), dim=...)."
            )

    def ledger(self) -> Ledger:
        """What this rank sent through this context, and those made from it."""
        return self._ledger

    def positions(self, device: torch.device | str | None = None, *, within_documents: bool = False) -> Tensor:
        """Global positions of this rank's tokens, int64 [T]; within_documents: each counted from its document's first token.

        Without documents the sequence is one document.
        """
        found = torch.cat([torch.arange(a, b, device=device) for a, b in part_of(self.cuts, self.layout, self.rank)])
        if not within_documents or self.documents is None:
            return found
        ends = torch.tensor(self.documents, dtype=torch.int64, device=device)
        return found - ends[torch.searchsorted(ends, found, right=True) - 1]

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole x that every rank holds; a view if it is contiguous. Its gradient is zero outside."""
        if x.shape[dim] != self.total_tokens:
            raise ValueError(f"split: x must have {self.total_tokens} tokens in dim {dim}; got {tuple(x.shape)}.")
        held = [x.narrow(dim, a, b - a) for a, b in part_of(self.cuts, self.layout, self.rank)]
        return held[0] if len(held) == 1 else torch.cat(held, dim=dim)

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
        chunks: list[tuple[Interval, Tensor]] = []
        for held, part in zip(context.parts, received, strict=True):
            chunks += zip(held, part.split([b - a for a, b in held], dim=dim), strict=True)
        return torch.cat([chunk for _, chunk in sorted(chunks, key=lambda found: found[0])], dim=dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.context.split(gradient, ctx.dim), None, None
