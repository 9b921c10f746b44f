"""Scan: the state before each rank's tokens, from summaries of what every rank's tokens do to a state.

A summary is an affine map (`seqengine.parallel.summary`). With the ranks in the order in which the state visits them,
S_{p+1} = A_p S_p + b_p and S_0 = initial. The gradients G_p of the states run the other way: G_p = g_p + A_p^H G_{p+1}, a
scan of the maps (A_p^H, g_p), where g_p is what flows to S_p on its rank. Then db_p = G_{p+1}, and dA_p follows from S_p and
G_{p+1}, which both lie on the rank.

Forward and backward are nodes of their own for the first messages and for the rest, so that what is computed between
`start_scan` and `finish` hides the exchange, in the backward too: there the messages leave when the gradient reaches `finish`,
and are waited for when it reaches `start_scan`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.checks import check
from seqengine.parallel import comm, cost
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.summary import Decay, Summary, Transition, check_summary, empty_message, pack, unpack

Algorithm = Literal["auto", "serial", "gather", "log", "hierarchical"]
"""serial: rank to rank. gather: all summaries to all ranks. log: 1 + ceil(log2(P - 1)) rounds of one message. hierarchical:
within nodes, between their last ranks, and back. auto: `cost.scan_algorithm`."""


def scan(
    summary: Summary | tuple[Tensor, Tensor],
    *,
    ctx: SequenceContext,
    initial: Tensor | None = None,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
    output_final: bool = False,
    node_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The state before this rank's first token, and, if asked for, the one after the global last token, on every rank.

    Local in:  summary of this rank's tokens, of the same shapes on all ranks; a pair (log_decay, state) means
               Summary(Decay(log_decay), state). A rank without tokens gives the identity: decay 1, state 0.
               initial: the state before the global first token, the same on every rank; zero if None.
    Local out: (before, final), both like the state; final is None unless output_final. With reverse the state goes from the
               last token to the first: `before` is what enters this rank from the right, `final` what leaves rank 0.
    Dtypes:    states and transitions float32 or float64, or complex of the same precision; what is sent, and the folding.
    Traffic:   `cost.scan_bytes`, forward; `cost.scan_backward_bytes`. Decays of a FixedDecay are never sent. `gather` has the
               final state for nothing; the others broadcast it, and in the backward the gradient of `initial`.
    Gradients: of the summary local, without a collective for that of the decay. `initial` and `final` are the same on every
               rank and count once: the gradient of `final` must be the same on every rank, that of `initial` is the whole one
               on every rank. (A trained initial state has to average it over the ranks, where other parameters sum.)
    Memory:    saves the transition and `before`; `gather` the transitions that were sent to it too.
    Order:     every rank must call, and must run the backward, with the same algorithm; checks come before any message. The
               order of folding depends on the algorithm and P alone. With ctx.size == 1 nothing is sent.
    Raises:    ValueError if shapes, dtypes or the algorithm do not fit. RuntimeError for a second derivative if P > 1.
    References: Hillis and Steele 1986, doi:10.1145/7902.7903; LASP-2, Sun et al. 2025, arXiv:2502.07563 (gather).
    """
    return start_scan(
        summary,
        ctx=ctx,
        initial=initial,
        reverse=reverse,
        algorithm=algorithm,
        output_final=output_final,
        node_size=node_size,
    ).finish()


def start_scan(
    summary: Summary | tuple[Tensor, Tensor],
    *,
    ctx: SequenceContext,
    initial: Tensor | None = None,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
    output_final: bool = False,
    node_size: int | None = None,
) -> "PendingScan":
    """`scan` under way: its first messages are sent. Work that does not need the states goes between this and `finish`."""
    if isinstance(summary, tuple):
        log_decay, state = summary
        summary = Summary(Decay(log_decay), state)
    name, state = "scan", summary.state
    ctx.require_contiguous(name)
    transition = check_summary(name, summary, ctx.local_tokens)
    check(name, algorithm in get_args(Algorithm), "algorithm must be one of {}", algorithm, get_args(Algorithm))
    check(name, node_size is None or node_size >= 1, "node_size must be >= 1", node_size)
    check(name, algorithm != "hierarchical" or node_size is not None, "hierarchical needs a node_size", node_size)
    if initial is not None:
        is_same = (initial.shape, initial.dtype, initial.device) == (state.shape, state.dtype, state.device)
        must = "initial must be like the state, {} {} on {}"
        got = (tuple(initial.shape), initial.dtype, initial.device)
        check(name, is_same, must, got, tuple(state.shape), state.dtype, state.device)
    if ctx.size == 1 or state.numel() == 0:
        before = torch.zeros_like(state) if initial is None else initial.clone()
        return PendingScan(None, None, before, summary(before) if output_final else None)
    if algorithm == "auto":
        transition_bytes = transition.value.nbytes if transition.is_sent else 0
        algorithm = cost.scan_algorithm(  # type: ignore[assignment]
            ctx.size, state.nbytes, transition_bytes, output_final=output_final, node_size=node_size
        )
    kind = transition.of(transition.value.new_empty(0), 0)
    exchange = _Exchange(ctx, reverse, algorithm, node_size, kind, output_final)
    token: Tensor = _Start.apply(exchange, transition.value, state, initial)  # type: ignore[no-untyped-call]
    return PendingScan(exchange, transition.value.detach(), token, None)


@dataclass
class PendingScan:
    """A scan whose first messages are sent."""

    _exchange: "_Exchange | None"
    _value: Tensor | None
    _token: Tensor  # carries the graph from one node to the other; the result if there is no exchange
    _final: Tensor | None

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Wait, and return (before, final or None) as `scan` does. To be called once, on every rank."""
        if self._exchange is None:
            return self._token, self._final
        results: tuple[Tensor, Tensor | None] = _Finish.apply(self._exchange, self._token, self._value)  # type: ignore[no-untyped-call]
        return results


class _Result(NamedTuple):
    before: Tensor
    final: Tensor | None
    transitions: dict[int, Transition]  # by rank, where they were gathered


Steps = Generator[list[comm.Work], None, Any]
"""A part of an exchange: yields what has to be waited for, returns what it found."""


class _Running:
    """Steps that are run as far as to their first wait, and to their end by `finish`.

    A message must be posted by both its ranks before that wait, or by both after it: other exchanges may run in between.
    """

    def __init__(self, steps: Steps):
        self._steps = steps
        self._result: _Result | None = None
        self._works: list[comm.Work] = []
        self._advance()

    def _advance(self) -> None:
        try:
            self._works = next(self._steps)
        except StopIteration as stop:
            self._result = stop.value

    def finish(self) -> _Result:
        while self._result is None:
            for work in self._works:
                work.wait()
            self._advance()
        return self._result


@dataclass
class _Exchange:
    """One scan, between its nodes in the graph."""

    context: SequenceContext
    reverse: bool
    algorithm: str
    node_size: int | None
    kind: Transition  # without its value
    output_final: bool
    needs_initial: bool = False
    running: _Running | None = None
    met: tuple[Transition, Tensor] | None = None  # in the backward: this rank's transition and the state before it

    def transition(self, value: Tensor, rank: int) -> Transition:
        bounds = self.context.bounds
        return self.kind.of(value, bounds[rank + 1] - bounds[rank])

    def begin(self, mine: Summary, first: Tensor) -> None:
        wire = _Wire(self.context, self.reverse, mine)
        self.running = _Running(_steps(wire, mine, first, self.algorithm, self.node_size, self.output_final, None))

    def begin_backward(self, mine: Summary, first: Tensor, known: dict[int, Transition] | None) -> None:
        wire = _Wire(self.context, not self.reverse, mine)
        self.running = _Running(_steps(wire, mine, first, self.algorithm, self.node_size, self.needs_initial, known))

    def end(self) -> _Result:
        assert self.running is not None, "an exchange is begun before it ends"
        result, self.running = self.running.finish(), None
        return result

    def later_ranks(self) -> list[int]:
        """Those whose transitions the backward of `gather` will need: later ones, or all for the gradient of `initial`."""
        rank, size = self.context.rank, self.context.size
        if self.needs_initial:
            return list(range(size))
        return list(range(rank)) if self.reverse else list(range(rank + 1, size))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, value: Tensor, state: Tensor, initial: Tensor | None) -> Tensor:
        ctx.exchange = exchange
        exchange.needs_initial = ctx.needs_input_grad[3]
        mine = Summary(exchange.transition(value, exchange.context.rank), state)
        exchange.begin(mine, torch.zeros_like(state) if initial is None else initial)
        return state.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor | None, Tensor, Tensor | None]:
        exchange: _Exchange = ctx.exchange
        assert exchange.met is not None, "the backward of finish comes first"
        (transition, before), exchange.met = exchange.met, None
        d_state, d_initial, _gathered = exchange.end()
        d_value = None
        if ctx.needs_input_grad[1]:
            d_value = transition.gradient(before, d_state).to(transition.value.dtype)
        return None, d_value, d_state, d_initial


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, token: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.exchange = exchange
        result = exchange.end()
        ctx.ranks = exchange.later_ranks() if ctx.needs_input_grad[1] and result.transitions else None
        known = [result.transitions[rank].value.clone() for rank in ctx.ranks or []]
        ctx.save_for_backward(result.before, value, *known)
        return result.before, result.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_final: Tensor | None) -> tuple[None, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        before, value, *values = ctx.saved_tensors
        transition = exchange.transition(value, exchange.context.rank)
        known = None
        if ctx.ranks is not None:
            known = {r: exchange.transition(v, r).adjoint() for r, v in zip(ctx.ranks, values, strict=True)}
        first = torch.zeros_like(d_before) if d_final is None else d_final
        exchange.begin_backward(Summary(transition.adjoint(), d_before), first, known)
        exchange.met = (transition, before)
        return None, d_before.new_zeros(0), None


class _Wire:
    """The ranks by position, in the order in which the state visits them, and summaries as flat messages between them."""

    def __init__(self, context: SequenceContext, reverse: bool, mine: Summary):
        assert mine.transition is not None
        self.context, self.reverse = context, reverse
        self.size = context.size
        self.position = self.rank(context.rank)
        self.transition, self.state = mine.transition, mine.state

    def rank(self, position: int) -> int:
        """Its own inverse."""
        return self.size - 1 - position if self.reverse else position

    def tokens(self, start: int, stop: int) -> int:
        """Of the positions start .. stop-1."""
        bounds, size = self.context.bounds, self.size
        return bounds[size - start] - bounds[size - stop] if self.reverse else bounds[stop] - bounds[start]

    def unpack(self, message: Tensor, start: int, stop: int, is_state: bool) -> Summary:
        """The map of the positions start .. stop-1; of a state alone a constant one."""
        transition = None if is_state else self.transition.of(self.transition.value, self.tokens(start, stop))
        return unpack(message, Summary(transition, self.state))

    def swap(self, sends: Sequence[tuple[int, Summary]], receives: Sequence[tuple[int, int, int]]) -> Steps:
        """Send maps to positions, and receive from (position, start, stop) the maps of start .. stop-1.

        Maps from position 0 on are constant: nothing comes before it but the state that it knows.
        """
        outgoing = [(self.rank(p), pack(summary)) for p, summary in sends]
        incoming = [
            (self.rank(p), empty_message(Summary(self.transition if start > 0 else None, self.state)))
            for p, start, _ in receives
        ]
        group, ledger = self.context.require_group(), self.context.ledger()
        yield comm.start_send_and_receive(outgoing, incoming, group, ledger, "scan")
        return [
            self.unpack(t, start, stop, start == 0) for (_, t), (_, start, stop) in zip(incoming, receives, strict=True)
        ]

    def gather(self, message: Tensor) -> Steps:
        """The message of every position."""
        everyone, works = comm.start_all_gather(message, self.context.require_group(), self.context.ledger(), "scan")
        yield works
        return [everyone[self.rank(p)] for p in range(self.size)]

    def spread(self, last: Tensor | None) -> Steps:
        """The state of the last position, on all of them."""
        message = empty_message(Summary(None, self.state)) if last is None else pack(Summary(None, last))
        group, ledger = self.context.require_group(), self.context.ledger()
        yield comm.start_broadcast(message, self.rank(self.size - 1), group, ledger, "scan")
        return unpack(message, Summary(None, self.state)).state


def _steps(
    wire: _Wire,
    mine: Summary,
    first: Tensor,
    algorithm: str,
    node_size: int | None,
    output_final: bool,
    known: dict[int, Transition] | None,
) -> Steps:
    """One exchange. first: the state before position 0. known: transitions by rank, if none have to be gathered."""
    if algorithm == "gather":
        return (yield from _gather(wire, mine, first, output_final, known))
    own = Summary(None, mine(first)) if wire.position == 0 else mine
    if algorithm == "serial":
        before = yield from _serial(wire, own, first)
    elif algorithm == "log":
        before = yield from _log(wire, range(wire.size + 1), wire.position, own, first)
    else:
        assert node_size is not None
        before = yield from _hierarchical(wire, cost.node_edges(wire.size, node_size, wire.reverse), own, first)
    final = None
    if output_final:
        final = yield from wire.spread(own(before) if wire.position == wire.size - 1 else None)
    return _Result(before.clone(), final, {})


def _serial(wire: _Wire, own: Summary, first: Tensor) -> Steps:
    """Wait for the state, hand it on.

    Only the first message is under way before the first wait: a receive that is posted earlier than its message could take one
    of another exchange that runs in between.
    """
    p, before = wire.position, first
    if p > 1:
        yield []
    if p > 0:
        (arrived,) = yield from wire.swap([], [(p - 1, 0, p)])
        before = arrived.state
    if p + 1 < wire.size:
        yield from wire.swap([(p + 1, Summary(None, own(before)))], [])
    return before


def _gather(
    wire: _Wire, mine: Summary, first: Tensor, output_final: bool, known: dict[int, Transition] | None
) -> Steps:
    """All summaries to all ranks; each folds those before it, in the order of tokens."""
    messages = yield from wire.gather(pack(mine if known is None else Summary(None, mine.state)))
    needed = wire.size if output_final or known is None else wire.position
    summaries = []
    for p, message in enumerate(messages[:needed]):
        summary = wire.unpack(message, p, p + 1, is_state=known is not None)
        summaries.append(summary if known is None else Summary(known[wire.rank(p)], summary.state))
    before = reduce(_after, summaries[: wire.position], first)
    final = reduce(_after, summaries[wire.position :], before) if output_final else None
    gathered = {}
    if known is None and wire.transition.is_sent:
        gathered = {wire.rank(p): s.transition for p, s in enumerate(summaries) if s.transition is not None}
    return _Result(before.clone(), final, gathered)


def _after(state: Tensor, summary: Summary) -> Tensor:
    return summary(state)


def _log(wire: _Wire, edges: Sequence[int], index: int, own: Summary, first: Tensor) -> Steps:
    """The state before element `index`, whose elements are the positions edges[i] .. edges[i+1]-1, by doubling strides.

    The last position of an element speaks for it. After a shift by one, element i holds the map of the one before it; with each
    stride s that grows to the 2 s before it, until it begins with element 0: then it is a state, as element 0's is at once.
    """
    size = len(edges) - 1
    sends = [(edges[index + 2] - 1, own)] if index + 1 < size else []
    receives = [(edges[index] - 1, edges[index - 1], edges[index])] if index > 0 else []
    arrived = yield from wire.swap(sends, receives)
    if index == 0:
        return first
    held, stride = arrived[0], 1
    while stride < size - 1:
        sends = [(edges[index + stride + 1] - 1, held)] if index + stride < size else []
        source = index - stride
        receives = [(edges[source + 1] - 1, edges[max(0, source - stride)], edges[source])] if source >= 1 else []
        arrived = yield from wire.swap(sends, receives)
        held = arrived[0].then(held) if arrived else held
        stride *= 2
    return held.state


def _hierarchical(wire: _Wire, edges: Sequence[int], own: Summary, first: Tensor) -> Steps:
    """Each position to the later ones of its node; the last of each node across nodes; what it finds back to its node."""
    p = wire.position
    node = next(j for j in range(len(edges) - 1) if p < edges[j + 1])
    start, stop = edges[node], edges[node + 1]
    inner = yield from wire.swap([(q, own) for q in range(p + 1, stop)], [(q, q, q + 1) for q in range(start, p)])
    within = reduce(Summary.then, inner) if inner else None
    before_node = first
    if p == stop - 1:
        total = own if within is None else within.then(own)
        before_node = yield from _log(wire, edges, node, total, first)
        if node > 0:
            yield from wire.swap([(q, Summary(None, before_node)) for q in range(start, p)], [])
    elif node > 0:
        (arrived,) = yield from wire.swap([], [(stop - 1, 0, start)])
        before_node = arrived.state
    return before_node if within is None else within(before_node)
