"""What is measured over ranks: for each twin the kernel on the whole sequence, our calls, and the ways of the field.

    gather all      every rank gets all inputs, runs the kernel on the whole, and cuts its part out; in the backward the
                    gradients of all inputs go back to their owners and are added there
    gather tails    the last inputs of every rank to all ranks, each of which keeps its neighbour's: Flash Linear Attention
    four tensors    long convolutions by channels: input and both gates there, the result back; savanna, the trainer of Evo 2
    serial          the state from rank to rank, waited for before the kernel: LASP, Sun et al. 2024, arXiv:2404.02882
    fold            all states to all ranks, waited for, folded by each: LASP-2, Sun et al. 2025, arXiv:2502.07563, and
                    Flash Linear Attention
    plain ring      parts of attention as they lie, the first ranks idle: Ring Attention, Liu et al. 2023, arXiv:2310.01889

They are written with our kernels and exchanges, so that what differs is the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import attention as attention_benchmark
import loss as loss_benchmark
import opponents
import recurrence
import short_conv as short_conv_benchmark
import torch
from measure import Function, Inputs
from torch import Tensor

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes

CPU = torch.device("cpu")
Twin = Callable[[Inputs, SequenceContext], Tensor]
SHORT_TAPS, HALO_TAPS, MODES = 4, 128, 16
GATHER_ALL = "gather all"


@dataclass(frozen=True)
class Case:
    """Sizes; convolutions have heads * width channels, attention-like operators K = V = width."""

    operator: str
    ranks: int
    batch: int
    heads: int
    width: int
    length: int
    taps: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.operator} P {self.ranks}"

    @property
    def channels(self) -> int:
        return self.heads * self.width

    def sizes(self) -> str:
        more = f" L {self.taps}" if self.taps else f" V {self.vocabulary}" if self.vocabulary else ""
        return f"B {self.batch} H {self.heads} K {self.width} D {self.channels} T {self.length}{more} float32"


@dataclass(frozen=True)
class Operator:
    """A twin: inputs of the whole, and functions of them."""

    inputs: Inputs
    dy: Tensor
    plain: Function
    """The kernel on the whole."""
    sharded: Mapping[str, int]
    """The dimension of the tokens of those inputs that are split; the others are parameters."""
    ours: dict[str, Twin]
    """Of this rank's parts; the first is what a user gets."""
    peers: dict[str, Twin]
    output_dim: int | None
    """Of the tokens; None for a value that is the same on every rank."""


class _GatherAll(torch.autograd.Function):
    """The whole of even parts on every rank; backward: its gradients to their owners, and added there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceContext, dim: int) -> Tensor:
        ctx.context, ctx.dim = context, dim
        everyone, works = comm.start_all_gather(
            x.contiguous(), context.require_group(), context.ledger(), "gather everything"
        )
        for work in works:
            work.wait()
        return torch.cat(everyone, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        context = ctx.context
        parts = gradient.chunk(context.size, ctx.dim)
        shapes = [parts[0].shape] * context.size
        received = comm.all_to_all(parts, shapes, context.require_group(), context.ledger(), "return gradients")
        return torch.stack(received).sum(0), None, None


class _PartialSum(torch.autograd.Function):
    """x, of whose gradient, the same on all ranks, each keeps 1 / P: their sum is the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.size, None


def gathered(x: Tensor, ctx: SequenceContext, dim: int) -> Tensor:
    whole: Tensor = x if ctx.size == 1 else _GatherAll.apply(x, ctx, dim)  # type: ignore[no-untyped-call]
    return whole


def gather_all(plain: Function, sharded: Mapping[str, int], output_dim: int) -> Twin:
    def call(x: Inputs, ctx: SequenceContext) -> Tensor:
        whole = {n: gathered(t, ctx, sharded[n]) if n in sharded else t for n, t in x.items()}
        return ctx.split(plain(whole), output_dim)

    return call


def gather_tails(convolve: Callable[[Inputs, Tensor], Tensor], taps: int) -> Twin:
    """convolve: the kernel with the inputs before this rank's part, [B, D, taps - 1]."""

    def call(x: Inputs, ctx: SequenceContext) -> Tensor:
        u = x["pre_gate"] * x["u"] if "pre_gate" in x else x["u"]
        tails = gathered(u[..., u.shape[-1] - (taps - 1) :], ctx, 2)
        start = (ctx.rank - 1) * (taps - 1)
        before = tails[..., start : start + taps - 1] if ctx.rank > 0 else tails[..., : taps - 1] * 0
        return convolve(x, before)

    return call


def four_tensors(x: Inputs, ctx: SequenceContext) -> Tensor:
    bounds = offsets(split_sizes(x["u"].shape[1], ctx.size))
    mine = slice(bounds[ctx.rank], bounds[ctx.rank + 1])
    u, pre, post = (parallel.transpose(x[n], ctx=ctx, scatter=1, gather=2) for n in ("u", "pre_gate", "post_gate"))
    y = kernels.long_conv(u, x["k"][mine], skip=x["skip"][mine], pre_gate=pre, post_gate=post)[0]
    return parallel.transpose(y, ctx=ctx, scatter=2, gather=1, channels=x["u"].shape[1])


def _call(function: Callable[..., Any], **options: Any) -> Twin:
    """A twin whose arguments have our names; a result and a state, or a result alone."""

    def call(x: Inputs, ctx: SequenceContext) -> Tensor:
        found = function(**x, ctx=ctx, **options)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return y

    return call


def short_conv(case: Case) -> Operator:
    sizes = short_conv_benchmark.Case(case.batch, case.channels, case.length, case.taps, "float32")
    inputs, dy = short_conv_benchmark.draw_inputs(sizes, CPU)
    sharded = {"u": 2}

    def plain(x: Inputs, before: Tensor | None = None) -> Tensor:
        return kernels.short_conv(**x, activation="silu", initial_state=before)[0]  # type: ignore[arg-type]

    ours = {"ours": _call(parallel.short_conv, activation="silu")}
    peers = {GATHER_ALL: gather_all(plain, sharded, 2), "gather tails": gather_tails(plain, case.taps)}
    return Operator(inputs, dy, plain, sharded, ours, peers, 2)


def long_conv(case: Case, algorithm: str) -> Operator:
    sizes = opponents.Case(case.batch, case.channels, case.length, case.taps, "float32", gated=True)
    inputs, dy = opponents.draw_inputs(sizes, CPU)
    sharded = {"u": 2, "pre_gate": 2, "post_gate": 2}

    def plain(x: Inputs, before: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {**x}
        return kernels.long_conv(**options, initial_state=before)[0]

    more: dict[str, Twin] = {}
    peers: dict[str, Twin] = {GATHER_ALL: gather_all(plain, sharded, 2), "four tensors": four_tensors}
    if algorithm == "halo":
        peers["gather tails"] = gather_tails(plain, case.taps)
    else:
        more["ours, fft"] = _call(parallel.long_conv, algorithm="fft")
    ours = {"ours": _call(parallel.long_conv, algorithm=algorithm), **more}
    return Operator(inputs, dy, plain, sharded, ours, peers, 2)


def modal_conv(case: Case) -> Operator:
    """Real poles with memories of 10 to 10,000 tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.channels, case.length)
    u, dy = (torch.randn(*shape, generator=generator) for _ in range(2))
    decays = 10.0 ** -(1 + 3 * torch.rand(case.channels, MODES, generator=generator))
    residues = torch.randn(case.channels, MODES, generator=generator) / MODES
    inputs = {
        "u": u,
        "log_poles": -decays,
        "residues": residues,
        "skip": torch.randn(case.channels, generator=generator),
    }
    return _scanned(parallel.modal_conv, kernels.modal_conv, inputs, dy, {"u": 2}, {"channel_groups": 1})


def linear(case: Case) -> Operator:
    """gla, simple_gla and delta_rule."""
    sizes = recurrence.Case(case.operator, case.batch, case.heads, case.width, case.length, "float32", case.length)
    inputs, dy = recurrence.draw_inputs(sizes, CPU)
    one = {} if case.operator == "delta_rule" else {"head_groups": 1}
    twin, kernel = getattr(parallel, case.operator), getattr(kernels, case.operator)
    return _scanned(twin, kernel, inputs, dy, dict.fromkeys(inputs, 1), one)


def _scanned(
    twin: Callable[..., Any],
    kernel: Callable[..., Any],
    inputs: Inputs,
    dy: Tensor,
    sharded: dict[str, int],
    not_overlapped: dict[str, int],
) -> Operator:
    """Twins with a scan. not_overlapped: the options with which an exchange ends before its kernel begins."""
    token_dim = next(iter(sharded.values()))

    def plain(x: Inputs) -> Tensor:
        y: Tensor = kernel(**x)[0]
        return y

    peers = {
        GATHER_ALL: gather_all(plain, sharded, token_dim),
        "serial": _call(twin, algorithm="serial", **not_overlapped),
        "fold": _call(twin, algorithm="gather", **not_overlapped),
    }
    ours = {"ours": _call(twin), "ours, log": _call(twin, algorithm="log")}
    return Operator(inputs, dy, plain, sharded, ours, peers, token_dim)


def rnn(case: Case) -> Operator:
    """sLSTM. Without micro-batches the pipeline is a serial ring."""
    sizes = recurrence.Case("slstm", case.batch, case.heads, case.width, case.length, "float32", case.length)
    inputs, dy = recurrence.draw_inputs(sizes, CPU)
    sharded = {"gates": 1}

    def plain(x: Inputs) -> Tensor:
        return kernels.rnn(**x, cell="slstm")[0]  # type: ignore[arg-type]

    peers = {
        GATHER_ALL: gather_all(plain, sharded, 1),
        "serial": _call(parallel.rnn, cell="slstm", micro_batches=1),
    }
    ours = {
        "ours": _call(parallel.rnn, cell="slstm"),
        "ours, B micro-batches": _call(parallel.rnn, cell="slstm", micro_batches=case.batch),
    }
    return Operator(inputs, dy, plain, sharded, ours, peers, 1)


def attention(case: Case) -> Operator:
    """Causal."""
    sizes = attention_benchmark.Case("causal", case.batch, case.heads, case.heads, case.width, case.length, "float32")
    inputs, dy = attention_benchmark.draw_inputs(sizes, CPU)
    sharded = dict.fromkeys(inputs, 1)

    def plain(x: Inputs) -> Tensor:
        return kernels.attention(x["q"], x["k"], x["v"])

    peers = {
        GATHER_ALL: gather_all(plain, sharded, 1),
        "plain ring": _call(parallel.attention, algorithm="ring", balance=False),
    }
    ours = {"ours": _call(parallel.attention)}
    ours |= {f"ours, {name}": _call(parallel.attention, algorithm=name) for name in ("ulysses", "gather")}
    ours["ours, ring"] = _call(parallel.attention, algorithm="ring", balance=True)
    return Operator(inputs, dy, plain, sharded, ours, peers, 1)


def linear_cross_entropy(case: Case) -> Operator:
    """Labels are gathered with the rest."""
    sizes = loss_benchmark.Case(case.length, case.channels, case.vocabulary, "float32")
    inputs, dy = loss_benchmark.draw_inputs(sizes, CPU)
    labels = loss_benchmark.draw_labels(sizes, CPU)

    def plain(x: Inputs, all_labels: Tensor = labels) -> Tensor:
        return kernels.linear_cross_entropy(x["hidden"], x["weight"], all_labels)[0]

    def ours(x: Inputs, ctx: SequenceContext) -> Tensor:
        return parallel.linear_cross_entropy(x["hidden"], x["weight"], ctx.split(labels, 1), ctx=ctx)[0]

    def gather(x: Inputs, ctx: SequenceContext) -> Tensor:
        weight = _PartialSum.apply(x["weight"], ctx.size)  # type: ignore[no-untyped-call]
        return plain({"hidden": ctx.join(x["hidden"], 1), "weight": weight}, ctx.join(ctx.split(labels, 1), 1))

    return Operator(inputs, dy, plain, {"hidden": 1}, {"ours": ours}, {GATHER_ALL: gather}, None)


@dataclass(frozen=True)
class Defaults:
    """How an operator is made, and its sizes where the command line has none."""

    make: Callable[[Case], Operator]
    length: int
    batch: int = 1
    taps: Callable[[int], int] = field(default=lambda length: 0)
    vocabulary: int = 0


OPERATORS: dict[str, Defaults] = {
    "short_conv": Defaults(short_conv, 2**14, taps=lambda length: SHORT_TAPS),
    "long_conv_halo": Defaults(
        partial(long_conv, algorithm="halo"), 2**14, taps=lambda length: min(HALO_TAPS, max(1, length // 8))
    ),
    "long_conv_transpose": Defaults(partial(long_conv, algorithm="transpose"), 2**14, taps=lambda length: length),
    "modal_conv": Defaults(modal_conv, 2**14),
    "gla": Defaults(linear, 2**12),
    "simple_gla": Defaults(linear, 2**12),
    "delta_rule": Defaults(linear, 2**12),
    "rnn": Defaults(rnn, 2**9, batch=4),
    "attention": Defaults(attention, 2**11),
    "linear_cross_entropy": Defaults(linear_cross_entropy, 2**11, vocabulary=2**12),
}
