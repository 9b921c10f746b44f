"""Pipeline: a state that no summary stands for, rank to rank, micro-batch by micro-batch.

A non-associative state needs all earlier tokens before its next one, so that ranks work at the same time only on different
samples. The batch is cut into M micro-batches, and rank r works on micro-batch i while rank r-1 works on i + 1: with equal
shards (P - 1 + M) steps, each of one shard of one micro-batch. Ranks without tokens are passed over.

The backward is the same line the other way: cotangents of states go from the last rank to the first. Nothing of a graph is
kept in between. Each micro-batch is run again from the state that entered it, which was saved, and then differentiated; the
cotangent that it needs is on its way meanwhile, so that in the fill of the line running again costs no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqengine.kernels.checks import check
from seqengine.parallel import comm, cost
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes

Tensors = tuple[Tensor, ...]
_Autocast = tuple[str, torch.dtype, bool]  # device, dtype, whether it is enabled
Function = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]
"""(inputs, state, parameters) -> (y, state): of some samples, the tokens that are given and the state before the first."""


def pipeline(
    function: Function,
    inputs: Tensors,
    state: Tensors,
    parameters: Tensors = (),
    *,
    ctx: SequenceContext,
    micro_batches: int,
    output_final: bool = False,
) -> tuple[Tensor, Tensors | None]:
    """function(inputs, state, parameters) of the joined sequence, on this rank's part.

    function:  takes b samples of inputs and state, for any b and for T = 0 too; returns y [b, ...] and a state like the one it
               got. Samples do not depend on one another. It must do the same when it is run again (no random numbers), and
               gradients flow to its arguments alone: what it captures is a constant.
    Local in:  inputs [B, T, ...], T = ctx.local_tokens; state [B, ...], the one before the global first token, tensors of one
               dtype, the same on every rank, as is whether it requires a gradient; parameters, the same on every rank.
               micro_batches: M, the same on every rank; B samples are cut into min(M, B) parts that differ by at most one.
    Local out: (y [B, ...], final): the final state is the one after the global last token, the same on every rank, or None
               unless output_final. A rank without tokens runs function on T = 0 for the shape of y; the state passes it by.
    Traffic:   `cost.pipeline_bytes`, forward: the state once to the next rank that has tokens, in M messages, and at the end
               from the last such rank to all if output_final. `cost.pipeline_backward_bytes`: the same the other way.
    Overlap:   a micro-batch is sent while the next one is computed, and waited for at the end; the backward receives while
               it runs a micro-batch again.
    Memory:    saves inputs, parameters and the state that enters, whatever function makes on its way. The backward holds the
               graph of one micro-batch at a time, and costs one more forward. y is copied together from the micro-batches.
    Gradients: of inputs local; of parameters this rank's partial sums, added up in float32 or better. State and final state are
               the same on every rank and count once, as in `scan`: the gradient of the final state must be the same on every
               rank, that of `state` is the whole one on every rank (to average, not to sum).
    Order:     every rank must call, and if gradients are enabled every rank must run the backward, with or without gradients of
               its own: y then always requires one. Checks come before any message. With ctx.size == 1 it is function itself.
    Raises:    ValueError if arguments do not fit, or the state that function returns. RuntimeError for a second derivative if
               P > 1, and on the other ranks, within the timeout of the group, if function raises on one.
    References: Huang et al. 2019, arXiv:1811.06965 (micro-batches in a pipeline of layers).
    """
    B = _checked_batch(inputs, state, ctx)
    check("pipeline", micro_batches >= 1, "micro_batches must be >= 1", micro_batches)
    if ctx.size == 1:
        y, last = function(inputs, state, parameters)
        return y, (tuple(last) if output_final else None)
    sizes = split_sizes(B, max(1, min(micro_batches, B)))
    has_messages = ctx.total_tokens > 0 and any(s.numel() > 0 for s in state)
    plan = _Plan(function, ctx, sizes, len(inputs), len(state), output_final, has_messages)
    # Whether a rank takes part in the backward must not depend on what requires a gradient there: this always does.
    anchor = state[0].new_zeros(()).requires_grad_(torch.is_grad_enabled())
    y, *final = _Pipeline.apply(plan, anchor, *inputs, *state, *parameters)  # type: ignore[no-untyped-call]
    return y, (tuple(final) if output_final else None)


def _checked_batch(inputs: Tensors, state: Tensors, ctx: SequenceContext) -> int:
    name = "pipeline"
    check(name, len(inputs) > 0 and len(state) > 0, "there must be inputs and a state", (len(inputs), len(state)))
    first = state[0]
    is_number = first.is_floating_point() or first.is_complex()
    check(name, is_number and first.ndim > 0, "the state must be floating point [B, ...]", (first.dtype, first.shape))
    for s in state:
        fits = (s.shape[:1], s.dtype, s.device) == (first.shape[:1], first.dtype, first.device)
        must = "all of the state must be [{}, ...] {} on {}"
        check(name, fits, must, (tuple(s.shape), s.dtype, s.device), first.shape[0], first.dtype, first.device)
    for x in inputs:
        fits = x.ndim >= 2 and x.shape[0] == first.shape[0]
        check(name, fits, "inputs must be [B, T, ...] with B = {} as in the state", x.shape, first.shape[0])
        ctx.check_local(name, x, 1)
    return first.shape[0]


@dataclass(frozen=True)
class _Plan:
    """One pipeline: the same on every rank but for what the function holds."""

    function: Function
    context: SequenceContext
    sizes: list[int]  # samples of each micro-batch
    num_inputs: int
    num_states: int
    output_final: bool
    has_messages: bool

    @property
    def is_idle(self) -> bool:
        """This rank passes nothing on: it holds no token, and y has no element that depends on the state."""
        return self.context.local_tokens == 0

    def parts(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(offsets(self.sizes))]

    def split(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Inputs, state and parameters."""
        a, b = self.num_inputs, self.num_inputs + self.num_states
        return tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b:])

    def run(self, inputs: Tensors, state: Tensors, parameters: Tensors) -> tuple[Tensor, Tensors]:
        """The function, and a check of what it returned."""
        y, after = self.function(inputs, state, parameters)
        rows = state[0].shape[0]
        check("pipeline", y.shape[:1] == (rows,), "function must return y [{}, ...]", y.shape, rows)
        expected, got = ([(tuple(s.shape), s.dtype) for s in of] for of in (state, after))
        check("pipeline", expected == got, "function must return a state like the one it got, {}", got, expected)
        return y, tuple(after)


class _Whole:
    """A tensor of B samples, filled part by part."""

    def __init__(self, samples: int):
        self.samples = samples
        self.tensor: Tensor | None = None

    def put(self, part: slice, x: Tensor | None) -> None:
        if x is None:
            return
        if self.tensor is None:
            self.tensor = torch.empty(self.samples, *x.shape[1:], dtype=x.dtype, device=x.device)
        self.tensor[part] = x

    def get(self) -> Tensor:
        assert self.tensor is not None, "there is at least one part"
        return self.tensor


class _Sum(_Whole):
    """A sum over parts, in float32 or better."""

    def __init__(self, like: Tensor):
        super().__init__(0)
        self.dtype = like.dtype

    def put(self, part: slice, x: Tensor | None) -> None:
        if x is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            self.tensor = wide if self.tensor is None else self.tensor + wide

    def get(self) -> Tensor:
        return super().get().to(self.dtype)


class _Line:
    """Messages of states from one rank with tokens to the next. Reverse: from the last to the first."""

    def __init__(self, plan: _Plan, like: Tensors, *, reverse: bool):
        self.context, self.like = plan.context, like
        self.order = cost.holders(self.context.bounds) if plan.has_messages else []
        if reverse:
            self.order.reverse()
        self.source: int | None = None
        self.target: int | None = None
        if self.context.rank in self.order:
            at = self.order.index(self.context.rank)
            self.source = self.order[at - 1] if at > 0 else None
            self.target = self.order[at + 1] if at + 1 < len(self.order) else None
        self._incoming: tuple[Tensor, list[comm.Work]] | None = None
        self._outgoing: list[tuple[Tensor, list[comm.Work]]] = []  # tensors have to live until they are sent

    def _message(self, samples: int) -> Tensor:
        first = self.like[0]
        numbers = sum(s.shape[1:].numel() for s in self.like)
        return torch.empty(samples * numbers, dtype=first.dtype, device=first.device)

    def _unpack(self, message: Tensor, samples: int) -> Tensors:
        shapes = [torch.Size((samples, *s.shape[1:])) for s in self.like]
        parts = message.split([s.numel() for s in shapes])
        return tuple(t.view(s).clone() for t, s in zip(parts, shapes, strict=True))

    def expect(self, samples: int) -> None:
        """Post the receive of the next state; nothing on the first rank of the line."""
        if self.source is not None:
            message = self._message(samples)
            group, ledger = self.context.require_group(), self.context.ledger()
            self._incoming = message, comm.start_receive(message, self.source, group, ledger, "pipeline")

    def take(self, samples: int) -> Tensors:
        """Wait for the state that is expected."""
        assert self._incoming is not None, "a state is expected before it is taken"
        (message, works), self._incoming = self._incoming, None
        for work in works:
            work.wait()
        return self._unpack(message, samples)

    def send(self, state: Tensors) -> None:
        """Post a state to the next rank; nothing on the last rank of the line."""
        if self.target is not None:
            message = torch.cat([s.reshape(-1) for s in state])
            group, ledger = self.context.require_group(), self.context.ledger()
            works = comm.start_send_and_receive([(self.target, message)], [], group, ledger, "pipeline")
            self._outgoing.append((message, works))

    def finish(self) -> None:
        """Wait for what was sent."""
        for _, works in self._outgoing:
            for work in works:
                work.wait()
        self._outgoing.clear()

    def spread(self, state: Tensors) -> Tensors:
        """The state of the last rank of the line, on all ranks; without messages it is this rank's own."""
        if not self.order:
            return tuple(s.clone() for s in state)
        samples = self.like[0].shape[0]
        if self.context.rank == self.order[-1]:
            message = torch.cat([s.reshape(-1) for s in state])
        else:
            message = self._message(samples)
        group, ledger = self.context.require_group(), self.context.ledger()
        for work in comm.start_broadcast(message, self.order[-1], group, ledger, "pipeline"):
            work.wait()
        return self._unpack(message, samples)


class _Pipeline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, anchor: Tensor, *tensors: Tensor) -> Tensors:
        ctx.plan = plan
        inputs, state, parameters = plan.split(tensors)
        device = state[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        y, entered, final = _run_forward(plan, inputs, state, parameters)
        ctx.save_for_backward(*inputs, *entered, *parameters)
        return y, *final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_final: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.plan.split(ctx.saved_tensors), ctx.plan.split(ctx.needs_input_grad[2:])
        return None, None, *_run_backward(ctx.plan, saved, needs, ctx.autocast, dy, d_final)


def _run_forward(plan: _Plan, inputs: Tensors, state: Tensors, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
    """y, the state that enters this rank, and, if it is asked for, the state after the global last token."""
    line = _Line(plan, state, reverse=False)
    B, parts = sum(plan.sizes), plan.parts()
    y, entered, left = _Whole(B), [_Whole(B) for _ in state], [_Whole(B) for _ in state]
    if plan.is_idle:
        y.put(slice(0, B), plan.run(inputs, state, parameters)[0])
        parts = []
    else:
        line.expect(plan.sizes[0])
    for i, part in enumerate(parts):
        now = tuple(s[part] for s in state) if line.source is None else line.take(plan.sizes[i])
        out, after = plan.run(tuple(x[part] for x in inputs), now, parameters)
        line.send(after)
        if i + 1 < len(parts):
            line.expect(plan.sizes[i + 1])
        y.put(part, out)
        for whole, s in zip((*entered, *left), (*now, *after), strict=True):
            whole.put(part, s)
    line.finish()
    entering, leaving = (tuple(w.get() for w in wholes) if parts else state for wholes in (entered, left))
    return y.get(), entering, line.spread(leaving) if plan.output_final else ()


class _Again:
    """Some samples that are run again, with their graph, if anything of it requires a gradient."""

    def __init__(self, plan: _Plan, arguments: Sequence[Tensor], needs: Sequence[bool], autocast: _Autocast):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(arguments, needs, strict=True)]
        self.leaves = leaves
        self.outputs: Tensors = ()
        device, dtype, is_enabled = autocast
        if any(needs):
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=is_enabled):
                y, state = plan.run(*plan.split(leaves))
            self.outputs = (y, *state)

    def gradients(self, upstream: Tensors) -> list[Tensor | None]:
        """Of every argument that requires one."""
        pairs = [(x, d) for x, d in zip(self.outputs, upstream, strict=False) if x.requires_grad]
        wanted = [x for x in self.leaves if x.requires_grad]
        found: Sequence[Tensor] = [torch.zeros_like(x) for x in wanted]
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, materialize_grads=True)
        each = iter(found)
        return [next(each) if x.requires_grad else None for x in self.leaves]


def _run_backward(
    plan: _Plan,
    saved: tuple[Tensors, Tensors, Tensors],
    needs: tuple[tuple[bool, ...], ...],
    autocast: _Autocast,
    dy: Tensor,
    d_final: Tensors,
) -> list[Tensor | None]:
    """Gradients of inputs, state and parameters; None where none is needed."""
    inputs, entered, parameters = saved
    line = _Line(plan, entered, reverse=True)
    B, parts = sum(plan.sizes), [] if plan.is_idle else plan.parts()
    is_first = line.target is None  # where the backward ends
    here = (*needs[0], *([any(needs[1]) or not is_first] * plan.num_states), *needs[2])
    wholes = [*(_Whole(B) for _ in (*inputs, *entered)), *(_Sum(p) for p in parameters)]
    d_inputs, d_entered, d_parameters = plan.split(wholes)
    d_final = d_final or tuple(torch.zeros_like(s) for s in entered)
    if parts:
        line.expect(plan.sizes[0])
    for i, part in enumerate(parts):
        pieces = (*(x[part] for x in (*inputs, *entered)), *parameters)
        again = _Again(plan, pieces, here, autocast)
        after = tuple(d[part] for d in d_final) if line.source is None else line.take(plan.sizes[i])
        gradients = again.gradients((dy[part], *after))
        line.send(plan.split(gradients)[1])
        if i + 1 < len(parts):
            line.expect(plan.sizes[i + 1])
        del again  # before the next one is made
        for whole, d in zip(wholes, gradients, strict=True):
            whole.put(part, d)
    line.finish()
    d_state: Sequence[Tensor | None] = [None] * plan.num_states
    if any(needs[1]):
        d_state = line.spread(tuple(w.get() for w in d_entered) if parts else d_final)
    found = (
        [(w.get() if parts else torch.zeros_like(x)) if need else None for w, x, need in zip(*each, strict=True)]
        for each in ((d_inputs, inputs, needs[0]), (d_parameters, parameters, needs[2]))
    )
    of_inputs, of_parameters = found
    return [*of_inputs, *d_state, *of_parameters]
