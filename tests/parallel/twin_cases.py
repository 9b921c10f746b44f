"""Every twin once, small, with states where it has them: what the tests of traffic, recompute and simulation run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # a first backward imports it: once here, not on every rank

from seqengine.parallel import api as parallel
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.ring_self_attention import linformer_self_attention, ring_self_attention
from seqengine.parallel.summary import Decay, Summary

SUMMED, SAME = "summed", "same"
"""Tensors that every rank holds: gradients are partial sums (parameters), or the same on every rank (states)."""


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """places: by tensor, the dim of its tokens, or SUMMED or SAME. outputs: likewise of what `call` returns, flat."""

    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    places: dict[str, Any]
    call: Callable[[SequenceContext, dict[str, torch.Tensor]], Any]
    outputs: tuple[Any, ...]

    def leaves(self, ctx):
        """This rank's part of the tensors, which require gradients."""
        found = {}
        for i, (name, shape) in enumerate(self.shapes(ctx.total_tokens).items()):
            whole, place = randn(*shape, seed=i), self.places[name]
            if name in ("g", "log_poles", "log_decay"):
                whole = -whole.abs() / 4
            if name == "beta":
                whole = torch.sigmoid(whole)
            if name in ("q", "k") and "beta" in self.places:
                whole = torch.nn.functional.normalize(whole, dim=-1)
            mine = whole if place in (SUMMED, SAME) else ctx.split(whole, place)
            found[name] = mine.detach().clone().requires_grad_()
        return found

    def run(self, ctx, leaves):
        """Outputs, flat."""
        found = self.call(ctx, leaves)
        flat = []
        for x in found if isinstance(found, tuple) else (found,):
            flat += x if isinstance(x, tuple) else [x]
        assert len(flat) == len(self.outputs)
        return tuple(flat)

    def loss(self, ctx, outputs):
        """A sum with weights of the whole, of which each rank has its own part."""
        total = torch.zeros((), dtype=torch.float64)
        for i, (x, place) in enumerate(zip(outputs, self.outputs, strict=True)):
            shape = list(x.shape)
            if place != SAME:
                shape[place] = ctx.total_tokens
            weights = randn(*shape, seed=50 + i)
            total = total + (x * (weights if place == SAME else ctx.split(weights, place))).sum()
        return total

    def join(self, results):
        """(outputs, gradients) of all ranks -> those of the whole."""
        outputs = [_join([r[0][i] for r in results], place) for i, place in enumerate(self.outputs)]
        gradients = {n: _join([r[1][n] for r in results], place) for n, place in self.places.items()}
        return outputs, gradients


def _join(parts, place):
    if place == SAME:
        for p in parts[1:]:
            torch.testing.assert_close(p, parts[0], rtol=1e-12, atol=1e-12)
        return parts[0]
    return sum(parts) if place == SUMMED else torch.cat(parts, dim=place)


def differentiate(case, ctx, run=None):
    """(outputs, gradients by name) of a case on this rank."""
    leaves = case.leaves(ctx)
    outputs = (run or case.run)(ctx, leaves)
    case.loss(ctx, outputs).backward()
    return [x.detach() for x in outputs], {n: t.grad for n, t in leaves.items()}


def _boundaries(tokens):
    return torch.tensor(sorted({0, tokens // 3, tokens // 2, tokens}))


def _conv(name, taps, final=True, **options):
    def call(ctx, a):
        y, last = getattr(parallel, name)(
            a["u"], a["w"], ctx=ctx, initial_state=a["state"], output_final_state=final, **options
        )
        return (y, last) if final else y

    shapes = lambda T: {"u": (2, 4, T), "w": (4, taps(T)), "state": (2, 4, taps(T) - 1)}  # noqa: E731
    return Case(shapes, {"u": 2, "w": SUMMED, "state": SAME}, call, (2, SAME) if final else (2,))


def _modal(algorithm, **options):
    def call(ctx, a):
        return parallel.modal_conv(
            a["u"], a["log_poles"], a["residues"], ctx=ctx, initial_state=a["state"], output_final_state=True,
            algorithm=algorithm, **options,
        )  # fmt: skip

    shapes = lambda T: {"u": (2, 4, T), "log_poles": (4, 3), "residues": (4, 3), "state": (2, 4, 3)}  # noqa: E731
    return Case(shapes, {"u": 2, "log_poles": SUMMED, "residues": SUMMED, "state": SAME}, call, (2, SAME))


def _linear(name, algorithm, packed=False, **options):
    def call(ctx, a):
        tokens = (a["q"], a["k"], a["v"], *([a["beta"]] if "beta" in a else []), a["g"])
        documents = {"cu_seqlens": _boundaries(ctx.total_tokens)} if packed else {}
        return getattr(parallel, name)(
            *tokens, ctx=ctx, initial_state=a["state"], output_final_state=True, algorithm=algorithm, **documents, **options
        )  # fmt: skip

    def shapes(T):
        B, states = (1, len(_boundaries(T)) - 1) if packed else (2, 2)
        found = {"q": (B, T, 2, 4), "k": (B, T, 2, 4), "v": (B, T, 2, 3)}
        if name == "delta_rule":
            found["beta"] = (B, T, 2)
        return found | {"g": (B, T, 2, 4) if name == "gla" else (B, T, 2), "state": (states, 2, 4, 3)}

    places = dict.fromkeys(shapes(9), 1) | {"state": SAME}
    return Case(shapes, places, call, (1, SAME))


def _rnn():
    def call(ctx, a):
        state = tuple(s.abs() + 0.5 if i == 2 else s for i, s in enumerate(a["state"].unbind()))
        return parallel.rnn(
            a["gates"],
            a["recurrent"],
            ctx=ctx,
            cell="slstm",
            initial_state=state,
            output_final_state=True,
            micro_batches=2,
        )

    shapes = lambda T: {"gates": (3, T, 4, 2, 3), "recurrent": (4, 2, 3, 3), "state": (4, 3, 2, 3)}  # noqa: E731
    return Case(shapes, {"gates": 1, "recurrent": SUMMED, "state": SAME}, call, (1, SAME, SAME, SAME, SAME))


def _attention(function=parallel.attention, groups=2, outputs=(1,), **options):
    def call(ctx, a):
        return function(a["q"], a["k"], a["v"], ctx=ctx, **options)

    shapes = lambda T: {"q": (2, T, 4, 3), "k": (2, T, groups, 3), "v": (2, T, groups, 3)}  # noqa: E731
    return Case(shapes, {"q": 1, "k": 1, "v": 1}, call, outputs)


def _linformer():
    def call(ctx, a):
        return linformer_self_attention(a["q"], a["k"], a["v"], a["e"], a["f"], ctx=ctx)

    shapes = lambda T: {"q": (2, T, 2, 3), "k": (2, T, 2, 3), "v": (2, T, 2, 3), "e": (4, T), "f": (4, T)}  # noqa: E731
    return Case(shapes, {"q": 1, "k": 1, "v": 1, "e": 1, "f": 1}, call, (1,))


def _loss():
    def call(ctx, a):
        labels = ctx.split(torch.arange(ctx.total_tokens) % 5, 0)
        return parallel.linear_cross_entropy(a["hidden"], a["weight"], labels, ctx=ctx)[0]

    return Case(lambda T: {"hidden": (T, 3), "weight": (5, 3)}, {"hidden": 0, "weight": SUMMED}, call, (SAME,))


def _scan():
    def call(ctx, a):
        alive = ctx.local_tokens > 0
        summary = Summary(Decay(a["log_decay"].sum(dim=0)), a["x"].sum(dim=0) if alive else a["x"].new_zeros(4, 3))
        before, final = parallel.scan(
            summary, ctx=ctx, initial=a["state"], output_final=True, algorithm="hierarchical", node_size=2
        )
        return a["x"] + before, final

    # Not a twin: what it returns on each rank depends on the cut. Its gradients are compared run against run.
    shapes = lambda T: {"x": (T, 4, 3), "log_decay": (T, 4, 3), "state": (4, 3)}  # noqa: E731
    return Case(shapes, {"x": 0, "log_decay": 0, "state": SAME}, call, (0, SAME))


TWINS = {
    "short_conv": _conv("short_conv", lambda T: 4, activation="silu"),
    "long_conv halo": _conv("long_conv", lambda T: 5, algorithm="halo"),
    "long_conv transpose": _conv("long_conv", lambda T: T, algorithm="transpose"),
    "modal_conv gather": _modal("gather"),
    "modal_conv log": _modal("log", channel_groups=2),
    "modal_conv serial": _modal("serial"),
    "modal_conv hierarchical": _modal("hierarchical", node_size=2),
    "gla gather": _linear("gla", "gather"),
    "gla log": _linear("gla", "log", head_groups=2),
    "gla packed": _linear("gla", "log", packed=True),
    "simple_gla": _linear("simple_gla", "serial"),
    "delta_rule gather": _linear("delta_rule", "gather"),
    "delta_rule log": _linear("delta_rule", "log"),
    "rnn": _rnn(),
    "attention ring": _attention(algorithm="ring", balance=False),
    "attention balanced ring": _attention(algorithm="ring", balance=True),
    "attention ulysses": _attention(algorithm="ulysses"),
    "attention gather": _attention(algorithm="gather", window=4),
    "ring_self_attention": _attention(ring_self_attention, groups=4, causal=True),
    "linformer": _linformer(),
    "linear_cross_entropy": _loss(),
}
MANY_RANKS = {  # without what every rank gets of every other
    "short_conv": _conv("short_conv", lambda T: 4, final=False),
    "modal_conv": _modal("log", channel_groups=1),
    "gla": _linear("gla", "log", head_groups=1),
}
EXCHANGES = TWINS | {"scan": _scan()}
