"""Every twin on P ranks is the kernel on the whole: forward, every input gradient, every parameter gradient, bytes."""

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import conv_cost, cost
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [6, 3], 3: [4, 0, 5], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
SHARDED = ("u", "pre_gate", "post_gate", "hidden")


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(tensors):
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def compare(cut, on_rank, on_whole, *arguments, tolerance=None):
    """Shards of y and of input gradients joined, and parameter gradients summed, against the whole."""
    expected = on_whole(*arguments)
    results = run_ranks(len(cut), on_rank, cut, *arguments)
    for name, value in expected.items():
        parts = [r[name] for r in results]
        is_sharded = name == "y" or name.removeprefix("d_") in SHARDED
        actual = torch.cat(parts, dim=1 if name == "d_hidden" else 2) if is_sharded else sum(parts)
        assert_close(actual, value, name, tolerance)
    return results


def conv_tensors(T, L, filters, dtype):
    k = {"shared": (4, L), "grouped": (2, L), "batch": (2, 4, L)}[filters]
    shapes = {"u": (2, 4, T), "k": k, "skip": (4,), "pre_gate": (2, 4, T), "post_gate": (2, 4, T)}
    return {name: randn(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def long_whole(T, L, filters, dtype):
    a = leaves(conv_tensors(T, L, filters, dtype))
    y, _ = kernels.long_conv(a["u"], a["k"], skip=a["skip"], pre_gate=a["pre_gate"], post_gate=a["post_gate"])
    (y * randn(2, 4, T, seed=9, dtype=dtype)).sum().backward()
    return {"y": y.detach(), **{f"d_{n}": t.grad for n, t in a.items()}}


def long_rank(group, cut, T, L, filters, dtype, made=False):
    """By the transpose of channels and tokens."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    a = conv_tensors(T, L, filters, dtype)
    a = leaves({n: ctx.split(t, 2) if n in SHARDED else t for n, t in a.items()})
    made_for = []

    def make(channels):
        made_for.append(channels.stop - channels.start)
        return a["k"][channels]

    y, state = parallel.long_conv(
        a["u"], make if made else a["k"], ctx=ctx, skip=a["skip"], pre_gate=a["pre_gate"], post_gate=a["post_gate"],
        algorithm="transpose",
    )  # fmt: skip
    assert state is None
    forward = ctx.ledger().sent_bytes()
    (y * ctx.split(randn(2, 4, T, seed=9, dtype=dtype), 2)).sum().backward()
    total = ctx.ledger().sent_bytes()
    element = 2 * y.element_size()
    predicted = conv_cost.long_conv_bytes(ctx.bounds, ctx.rank, 4, element) if ctx.size > 1 else 0
    assert (forward, total - forward) == (predicted, predicted)
    return {"y": y.detach(), "made": made_for, **{f"d_{n}": t.grad for n, t in a.items()}}


@ALL
@pytest.mark.parametrize("L", [1, 3, "T", "3T"])
def test_long_conv(cut, L):
    T = sum(cut)
    taps = {"T": T, "3T": 3 * T}.get(L, L)
    compare(cut, long_rank, long_whole, T, taps, "shared", torch.float64)


@pytest.mark.parametrize("filters", ["grouped", "batch"])
@pytest.mark.parametrize("P", [2, 3, 5])
def test_long_conv_filters(P, filters):
    compare(CUTS[P], long_rank, long_whole, sum(CUTS[P]), 5, filters, torch.float64)


def test_long_conv_float32():
    compare(CUTS[3], long_rank, long_whole, 9, 9, "shared", torch.float32)


@pytest.mark.parametrize("P", [1, 3, 8])
def test_long_conv_makes_only_this_ranks_filters(P):
    cut = CUTS[P]
    expected = long_whole(sum(cut), 7, "shared", torch.float64)
    results = run_ranks(P, long_rank, cut, sum(cut), 7, "shared", torch.float64, True)
    assert_close(sum(r["d_k"] if r["d_k"] is not None else torch.zeros(4, 7) for r in results), expected["d_k"])
    assert sum(sum(r["made"]) for r in results) == 4


def state_tensors(T, L):
    a = conv_tensors(T, L, "grouped", torch.float64)
    return {**a, "initial_state": randn(2, 4, L - 1, seed=7)}


def states_whole(T, L):
    a = leaves(state_tensors(T, L))
    y, final = kernels.long_conv(**a, output_final_state=True)
    (y * randn(2, 4, T, seed=9)).sum().backward(retain_graph=True)
    (final * randn(2, 4, L - 1, seed=8)).sum().backward()
    return {"y": y.detach(), "final": final.detach(), **{f"d_{n}": t.grad for n, t in a.items()}}


def states_rank(group, cut, T, L, algorithm):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = leaves({n: ctx.split(t, 2) if n in SHARDED else t for n, t in state_tensors(T, L).items()})
    ctx.ledger().clear()
    y, final = parallel.long_conv(**a, ctx=ctx, output_final_state=True, algorithm=algorithm)
    if algorithm == "halo" and ctx.size > 1:
        assert ctx.ledger().sent_bytes("halo") == cost.halo_bytes(ctx.bounds, ctx.rank, L - 1, 2 * 4 * 8)
    whole = (y * ctx.split(randn(2, 4, T, seed=9), 2)).sum() + (final * randn(2, 4, L - 1, seed=8)).sum()
    whole.backward()
    return {"y": y.detach(), "final": final.detach(), **{f"d_{n}": t.grad for n, t in a.items()}}


@ALL
@pytest.mark.parametrize(
    ("L", "algorithm"), [(1, "halo"), (4, "halo"), (20, "halo"), (4, "transpose"), (20, "transpose")]
)
def test_long_conv_with_states(cut, L, algorithm):
    T = sum(cut)
    expected = states_whole(T, L)
    results = run_ranks(len(cut), states_rank, cut, T, L, algorithm)
    for name, value in expected.items():
        parts = [r[name] for r in results]
        if name in ("final", "d_initial_state"):  # the same on every rank
            for part in parts:
                assert_close(part, value, name)
            continue
        is_sharded = name == "y" or name.removeprefix("d_") in SHARDED
        assert_close(torch.cat(parts, dim=2) if is_sharded else sum(parts), value, name)


def test_a_short_filter_takes_the_halo_and_a_long_one_the_transpose():
    bounds = (0, 1000, 2000, 3000, 4000)
    assert conv_cost.long_conv_algorithm(bounds, 128) == "halo"
    assert conv_cost.long_conv_algorithm(bounds, 1501) == "transpose"
    assert conv_cost.long_conv_algorithm(bounds, 4000) == "transpose"


def short_states_rank(group, cut, T, W):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = short_tensors(T, W)
    a = leaves(
        {n: ctx.split(t, 2) if n == "u" else t for n, t in {**a, "initial_state": randn(2, 3, W - 1, seed=5)}.items()}
    )
    y, final = parallel.short_conv(**a, ctx=ctx, activation="silu", output_final_state=True)
    ((y * ctx.split(randn(2, 3, T, seed=9), 2)).sum() + (final**2).sum()).backward()
    return {"y": y.detach(), "final": final.detach(), "d_u": a["u"].grad, "d_state": a["initial_state"].grad}


@pytest.mark.parametrize("P", [1, 3, 8])
@pytest.mark.parametrize("W", [2, 12])
def test_short_conv_with_states(P, W):
    cut, T = CUTS[P], sum(CUTS[P])
    a = leaves({**short_tensors(T, W), "initial_state": randn(2, 3, W - 1, seed=5)})
    y, final = kernels.short_conv(**a, activation="silu", output_final_state=True)
    ((y * randn(2, 3, T, seed=9)).sum() + (final**2).sum()).backward()
    results = run_ranks(P, short_states_rank, cut, T, W)
    assert_close(torch.cat([r["y"] for r in results], 2), y)
    assert_close(torch.cat([r["d_u"] for r in results], 2), a["u"].grad)
    for r in results:
        assert_close(r["final"], final)
        assert_close(r["d_state"], a["initial_state"].grad)


def short_tensors(T, W):
    shapes = {"u": (2, 3, T), "w": (3, W), "bias": (3,)}
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def short_whole(T, W):
    a = leaves(short_tensors(T, W))
    y, _ = kernels.short_conv(**a, activation="silu")
    (y * randn(2, 3, T, seed=9)).sum().backward()
    return {"y": y.detach(), **{f"d_{n}": t.grad for n, t in a.items()}}


def short_rank(group, cut, T, W):
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    a = leaves({n: ctx.split(t, 2) if n == "u" else t for n, t in short_tensors(T, W).items()})
    y, _ = parallel.short_conv(**a, ctx=ctx, activation="silu")
    row = 2 * 3 * 8
    predicted = cost.halo_bytes(ctx.bounds, ctx.rank, W - 1, row) if ctx.size > 1 else 0
    assert ctx.ledger().sent_bytes() == predicted
    (y * ctx.split(randn(2, 3, T, seed=9), 2)).sum().backward()
    return {"y": y.detach(), **{f"d_{n}": t.grad for n, t in a.items()}}


@ALL
@pytest.mark.parametrize("W", [1, 3, 8])
def test_short_conv(cut, W):
    compare(cut, short_rank, short_whole, sum(cut), W)


def loss_tensors(T):
    labels = torch.randint(0, 7, (2, T), generator=torch.Generator().manual_seed(5))
    labels[:, ::3] = -100
    return {"hidden": randn(2, T, 4, seed=0), "weight": randn(7, 4, seed=1)}, labels


def loss_whole(T, z_loss):
    a, labels = loss_tensors(T)
    a = leaves(a)
    nats, count, squares = kernels.linear_cross_entropy(**a, labels=labels, output_squares=True)
    ((nats + z_loss * squares) / count).backward()
    return {"d_hidden": a["hidden"].grad, "d_weight": a["weight"].grad}, nats.detach(), int(count), squares.detach()


def loss_rank(group, cut, T, z_loss):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a, labels = loss_tensors(T)
    a = leaves({"hidden": ctx.split(a["hidden"], 1), "weight": a["weight"]})
    mine = ctx.split(labels, 1)
    nats, count, *squares = parallel.linear_cross_entropy(**a, labels=mine, ctx=ctx, output_squares=z_loss > 0)
    ((nats + z_loss * sum(squares)) / count).backward()
    gradients = {"d_hidden": a["hidden"].grad, "d_weight": a["weight"].grad}
    return gradients | {"nats": nats.detach(), "count": int(count), "squares": [s.detach() for s in squares]}


@ALL
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_linear_cross_entropy(cut, z_loss):
    expected, nats, count, squares = loss_whole(sum(cut), z_loss)
    results = compare(cut, loss_rank, lambda T, _: expected, sum(cut), z_loss)
    for r in results:
        assert_close(r["nats"], nats)
        assert r["count"] == count
        assert len(r["squares"]) == (z_loss > 0)
        for each in r["squares"]:
            assert_close(each, squares)
