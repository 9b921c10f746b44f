"""transpose on two levels is the one on one level, bit for bit; groups of channels are one transpose; and their bytes."""

import itertools

import pytest
import torch

from seqengine.parallel import conv_cost
from seqengine.parallel.api import SequenceContext, transpose
from seqengine.parallel.exchange.transpose import transpose_through
from seqengine.parallel.layout import offsets, split_sizes
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
NODES = (1, 2, 3, 4, 8)
CHANNELS = (1, 5, 9)


def whole(cut, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, sum(cut), generator=generator, dtype=torch.float64)


def predicted(ctx, channels, node_size, back):
    """(within, across) of the way to channels or back."""
    if ctx.size == 1 or node_size == 1 or node_size >= ctx.size:
        return 0, 0
    sizes = (ctx.sizes, split_sizes(channels, ctx.size))
    return conv_cost.two_level_bytes(*(sizes[::-1] if back else sizes), ctx.rank, 2 * 8, node_size)


def sent(ctx):
    ledger = ctx.ledger()
    found = tuple(ledger.sent_bytes(f"transpose {level}") for level in ("within", "across"))
    ledger.clear()
    return found


def _two_levels(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for channels, node_size in itertools.product(CHANNELS, NODES):
        x = ctx.split(whole(cut, channels), 2).clone().requires_grad_()
        options = {"ctx": ctx, "scatter": 1, "gather": 2}
        options_back = {"ctx": ctx, "scatter": 2, "gather": 1, "channels": channels}
        there = transpose(x, **options)
        w, w_back = torch.rand_like(there), torch.rand_like(x)
        (dx,) = torch.autograd.grad(there, x, w)
        ctx.ledger().clear()
        there_2 = transpose(x, **options, node_size=node_size)
        counts = [sent(ctx)]
        (dx_2,) = torch.autograd.grad(there_2, x, w)
        counts.append(sent(ctx))
        y = there.detach().requires_grad_()
        back = transpose(y, **options_back, node_size=node_size)
        counts.append(sent(ctx))
        (dy,) = torch.autograd.grad(back, y, w_back)
        counts.append(sent(ctx))
        expected = [predicted(ctx, channels, node_size, b) for b in (False, True, True, False)]
        is_same = torch.equal(there, there_2) and torch.equal(dx, dx_2) and torch.equal(back, x)
        products = [(there_2 * w).sum(), (x * dx_2).sum(), (back * w_back).sum(), (y * dy).sum()]
        found.append((is_same, counts, expected, [p.detach() for p in products]))
    return found


@ALL
def test_two_levels_are_one_bit_for_bit_with_the_bytes_of_the_formula_and_the_adjoint_as_gradient(cut):
    results = run_ranks(len(cut), _two_levels, cut)
    for i, (channels, node_size) in enumerate(itertools.product(CHANNELS, NODES)):
        for is_same, counts, expected, _ in (r[i] for r in results):
            assert is_same, (channels, node_size)
            assert counts == expected, (channels, node_size)
        there, x, back, y = (sum(r[i][3][j] for r in results) for j in range(4))
        assert_close(there, x, "<Ax, y> = <x, A'y>")
        assert_close(back, y, "<Ax, y> = <x, A'y>, on the way back")


@pytest.mark.parametrize(("P", "node_size"), [(8, 4), (10, 4), (64, 8), (5, 2), (7, 3)])
def test_across_nodes_go_the_same_bytes_in_fewer_messages(P, node_size):
    held, cut = split_sizes(1000, P), split_sizes(333, P)
    across = [conv_cost.two_level_bytes(held, cut, r, 4, node_size)[1] for r in range(P)]
    direct = [
        sum(held[r] * cut[q] * 4 for q in range(P) if q // node_size != r // node_size)
        for r in range(P)
    ]  # fmt: skip
    assert sum(across) == sum(direct)
    pairs = {
        (conv_cost.relay(P, node_size, r, q), q)
        for r, q in itertools.product(range(P), repeat=2)
        if r // node_size != q // node_size
    }
    nodes = -(-P // node_size)
    assert len(pairs) == P * (nodes - 1)
    assert all(conv_cost.relay(P, node_size, r, q) // node_size == r // node_size for r in range(P) for q in range(P))


def _through(group, cut, channels, groups):
    ctx = SequenceContext.create(group, cut[group.rank()])
    x = ctx.split(whole(cut, channels), 2).clone().requires_grad_()
    scale = torch.arange(1.0, channels + 1, dtype=torch.float64)
    seen = []

    def work(columns, own):
        seen.append((own.start, own.stop, tuple(columns.shape)))
        return columns.cumsum(dim=2) * scale[own, None]

    ctx.ledger().clear()
    y = transpose_through(x, work, ctx=ctx, groups=groups)
    forward = ctx.ledger().sent_bytes("transpose")
    w = ctx.split(whole(cut, channels, seed=1), 2)
    y.backward(w)
    total = ctx.ledger().sent_bytes("transpose")
    formula = conv_cost.long_conv_bytes(ctx.bounds, ctx.rank, channels, 2 * 8)
    assert (forward, total - forward) == (formula, formula)
    return y.detach(), x.grad, seen


@pytest.mark.parametrize("P", [2, 3, 5])
@pytest.mark.parametrize(("channels", "groups"), [(1, 2), (7, 3), (12, 2)])
def test_groups_of_channels_are_one_transpose_of_the_same_bytes(P, channels, groups):
    cut = CUTS[P]
    results = run_ranks(P, _through, cut, channels, groups)
    x = whole(cut, channels).requires_grad_()
    y = x.cumsum(dim=2) * torch.arange(1.0, channels + 1, dtype=torch.float64)[:, None]
    y.backward(whole(cut, channels, seed=1))
    assert_close(torch.cat([r[0] for r in results], dim=2), y)
    assert_close(torch.cat([r[1] for r in results], dim=2), x.grad)
    edges = offsets(split_sizes(channels, P))
    for rank, (_, _, seen) in enumerate(results):
        assert len(seen) == groups
        assert [c for start, stop, _ in seen for c in range(start, stop)] == list(range(edges[rank], edges[rank + 1]))
        assert all(shape == (2, stop - start, sum(cut)) for start, stop, shape in seen)


def test_more_groups_where_the_exchange_is_longer():
    bounds = offsets(split_sizes(1 << 20, 64))
    groups = conv_cost.long_conv_groups
    assert groups(bounds, 4096, 1, 2) > groups(bounds, 64 * 5, 1, 2) >= 1
    assert groups(offsets(split_sizes(1000, 4)), 64, 1, 4) == 1
    assert groups(bounds, 64, 8, 2) == 1  # a rank has one channel
    assert groups(bounds, 1 << 16, 8, 4) == conv_cost.MOST_GROUPS


def test_bad_node_size_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))
    with pytest.raises(ValueError, match="node_size must be >= 1"):
        transpose(torch.zeros(2, 3, 4), ctx=ctx, scatter=1, gather=2, node_size=0)
