"""The exchange of gated linear attention, in the order of its nodes: `_Leaving`, the scan of states, `_Outputs`.

The backward meets them in the opposite order: `_Outputs` finds F, what flows to the state that came in; the scan of F brings G,
the gradient of the state that went out; then `_Leaving` runs the kernel's backward, once, for all gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.linear_attention import summary
from seqengine.kernels.linear_attention.op import Backend
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.documents import Documents
from seqengine.parallel.exchange.scan import Algorithm, start_scan
from seqengine.parallel.summary import Decay, FixedDecay, Summary, Transition


class Tokens(NamedTuple):
    """What the tokens of a rank, or some of their heads, bring."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None

    def heads(self, sizes: list[int]) -> list["Tokens"]:
        """Groups of so many heads."""
        if len(sizes) == 1:  # the gradient of a split is a copy
            return [self]
        g: Sequence[Tensor | None] = [None] * len(sizes)
        if self.g is not None:
            g = self.g.split(sizes, dim=0 if self.g.ndim == 1 else 2)
        q, k, v = (x.split(sizes, dim=2) for x in self[:3])
        return [Tokens(*group) for group in zip(q, k, v, g, strict=True)]


@dataclass(frozen=True)
class Part:
    """A rank's tokens: what comes in meets the first `entering` of them, what goes out is of those from `leaving` on."""

    tokens: int
    entering: int
    leaving: int
    passes: bool
    """Whether what goes out depends on what comes in."""
    ends: int
    """Documents that end here."""
    bounds: Tensor | None
    scale: float
    backend: Backend

    @classmethod
    def of(
        cls, documents: Documents | None, tokens: int, scale: float, backend: Backend, device: torch.device
    ) -> "Part":
        if documents is None:
            return cls(tokens, tokens, 0, True, 0, None, scale, backend)
        local = documents.local
        entering = local[1] if documents.enters else 0
        leaving = local[-2] if documents.leaves else tokens
        passes = tokens == 0 or (entering == tokens and documents.leaves)
        ends = len(local) - 1 - int(documents.leaves)
        return cls(tokens, entering, leaving, passes, ends, torch.tensor(local, device=device), scale, backend)


def _tokens_of(g: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Gates of some of the tokens."""
    return g if g is None or g.ndim == 1 else g[:, start:stop]


class _Met(NamedTuple):
    """What the backward of the outputs leaves for the time when G arrives."""

    arguments: summary.Arguments
    starts: Tensor
    do: Tensor
    d_ends: Tensor | None


@dataclass
class _Shared:
    """Between `_Leaving` and `_Outputs` of one exchange."""

    part: Part
    is_differentiated: bool = False
    met: _Met | None = None


class Exchange:
    """Of some heads: `_Leaving`, the scan, and `_Outputs`; the other way in the backward.

    rows: the initial states of the documents that begin here, if there are documents.
    """

    def __init__(self, part: Part, tokens: Tokens, rows: Tensor | None, dtype: torch.dtype):
        self._shared, self._tokens, self._rows, self._dtype = _Shared(part), tokens, rows, dtype

    def start(
        self,
        initial: Tensor | None,
        output_final: bool,
        algorithm: Algorithm,
        node_size: int | None,
        ctx: SequenceContext,
    ) -> None:
        """Finds this rank's map and sends it. initial: the state before the global first token, without documents."""
        g = self._tokens.g
        state, log_decay = _Leaving.apply(self._shared, self._dtype, *self._tokens, self._rows)  # type: ignore[no-untyped-call]
        transition: Transition = Decay(log_decay)
        if self._rows is None and (g is None or g.ndim == 1):  # all ranks know it
            fixed = state.new_zeros(state.shape[1]) if g is None else g.detach().to(self._dtype)
            transition = FixedDecay(fixed, ctx.local_tokens)
        self._pending = start_scan(
            Summary(transition, state),
            ctx=ctx,
            initial=initial,
            algorithm=algorithm,
            output_final=output_final,
            node_size=node_size,
        )

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """(o, final): the final state of the scan, or with documents those of the ones that end here."""
        before, final = self._pending.finish()
        constants = [None if x is None else x.detach() for x in (*self._tokens, self._rows)]
        found: tuple[Tensor, Tensor | None] = _Outputs.apply(self._shared, before, final, *constants)  # type: ignore[no-untyped-call]
        return found


class _Leaving(torch.autograd.Function):
    """The map of this rank's tokens; its backward, which gets G, is that of the whole twin."""

    @staticmethod
    def forward(
        ctx: Any,
        shared: _Shared,
        dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.shared, part = shared, shared.part
        shared.is_differentiated = any(ctx.needs_input_grad)
        k, v = k[:, part.leaving :], v[:, part.leaving :]
        state, log_decay = summary.state_after(k, v, _tokens_of(g, part.leaving, part.tokens), dtype)
        if rows is not None and not part.passes:
            if part.leaving < part.tokens:  # the last document began here
                state += _trailing(torch.exp(log_decay), state) * rows[-1:]
            log_decay = torch.full_like(log_decay, -torch.inf)
        ctx.mark_non_differentiable(log_decay)
        return state, log_decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        shared: _Shared = ctx.shared
        assert shared.met is not None, "the backward of the outputs comes first"
        (arguments, starts, do, d_ends), shared.met = shared.met, None
        part, d_final = shared.part, d_state
        if d_ends is not None:
            d_final = torch.cat([d_ends, d_state]) if part.leaving < part.tokens else d_ends
        of_gates = ctx.needs_input_grad[5]
        dq, dk, dv, dg, d_before = summary.gradients(arguments, starts, do, d_final, part.backend, of_gates=of_gates)
        d_rows = None if d_ends is None else d_before[int(part.entering > 0) :]
        return None, None, dq, dk, dv, dg, d_rows


class _Outputs(torch.autograd.Function):
    """o, from the state that comes in; its backward finds what flows to that state, F, and leaves the rest to `_Leaving`.

    It takes the final state along, so that it runs whatever the loss depends on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shared: _Shared,
        before: Tensor,
        final: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.shared, part = shared, shared.part
        states = before
        if rows is not None:
            states = torch.cat([before, rows]) if part.entering > 0 else rows
        arguments = summary.Arguments(q, k, v, g, part.scale, states, part.bounds)
        o, after, starts = summary.outputs(arguments, part.backend)
        ctx.save_for_backward(q, k, v, g, states, starts)
        ctx.has_documents = rows is not None
        if rows is not None:
            return o, after[: part.ends]
        return o, None if final is None else final.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        shared: _Shared = ctx.shared
        part = shared.part
        q, k, v, g, states, starts = ctx.saved_tensors
        d_before = states.new_zeros(1 if ctx.has_documents else states.shape[0], *states.shape[1:])
        if part.entering > 0:
            x, y, gates = q[:, : part.entering], do[:, : part.entering], _tokens_of(g, 0, part.entering)
            d_before, log_decay = summary.state_gradient(x, y, gates, part.scale, states.dtype)
            if ctx.has_documents and part.ends > 0:  # the first document ends here
                assert d_final is not None
                d_before += _trailing(torch.exp(log_decay), d_before) * d_final[:1]
        if shared.is_differentiated:
            arguments = summary.Arguments(q, k, v, g, part.scale, states, part.bounds)
            shared.met = _Met(arguments, starts, do, d_final if ctx.has_documents else None)
        return None, d_before, None if ctx.has_documents else d_final, None, None, None, None, None


def _trailing(x: Tensor, like: Tensor) -> Tensor:
    """x with dims of size 1 at its end, as many as there are missing."""
    return x[(..., *(None,) * (like.ndim - x.ndim))]
