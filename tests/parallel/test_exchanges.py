"""halo, transpose, split and join: values, adjoints, bytes, on 1 to 8 ranks with uneven and empty parts."""

import pytest
import torch

from seqengine.parallel import conv_cost, cost
from seqengine.parallel.api import SequenceContext, halo, transpose
from seqengine.parallel.layout import offsets, split_sizes
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")


def whole(cut, channels=5, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, sum(cut), generator=generator, dtype=torch.float64)


def context(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    return ctx


def _context_facts(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    positions = ctx.positions()
    x = whole(cut)
    joined = ctx.join(ctx.split(x, 2), 2)
    return ctx.bounds, ctx.rank, ctx.size, positions.tolist(), torch.equal(joined, x), ctx.ledger().counts()


@ALL
def test_context_knows_who_holds_what_after_one_collective(cut):
    results = run_ranks(len(cut), _context_facts, cut)
    for rank, (bounds, own_rank, size, positions, is_same, counts) in enumerate(results):
        assert bounds == offsets(cut)
        assert (own_rank, size) == (rank if len(cut) > 1 else 0, len(cut))
        assert positions == list(range(bounds[rank], bounds[rank + 1]))
        assert is_same
        assert counts.get("gather_integers", 0) == (1 if len(cut) > 1 else 0)


def _join_gradient(group, cut):
    ctx = context(group, cut)
    x = whole(cut)
    part = ctx.split(x, 2).clone().requires_grad_()
    weights = whole(cut, seed=1)
    (ctx.join(part, 2) * weights).sum().backward()
    return torch.equal(part.grad, ctx.split(weights, 2))


def test_gradient_of_join_is_this_ranks_part_counted_once():
    assert all(run_ranks(3, _join_gradient, CUTS[3]))


def _halo(group, cut, left):
    ctx = context(group, cut)
    x = ctx.split(whole(cut), 2).clone().requires_grad_()
    extended = halo(x, left, ctx=ctx, dim=2)
    sent = ctx.ledger().sent_bytes("halo")
    y = whole([left + n for n in cut], seed=2)
    start = sum(cut[: ctx.rank]) + ctx.rank * left
    mine = y[:, :, start : start + left + cut[ctx.rank]]
    forward_product = (extended.detach() * mine).sum()
    ctx.ledger().clear()
    (extended * mine).sum().backward()
    backward_product = (x.detach() * x.grad).sum()
    row = 2 * 5 * 8
    expected = (
        cost.halo_bytes(ctx.bounds, ctx.rank, left, row),
        cost.halo_backward_bytes(ctx.bounds, ctx.rank, left, row),
    )
    return extended.detach(), forward_product, backward_product, (sent, ctx.ledger().sent_bytes("halo")), expected


@ALL
@pytest.mark.parametrize("left", [0, 1, 2, 6, 30])
def test_halo_brings_what_precedes_and_its_backward_is_the_adjoint(cut, left):
    results = run_ranks(len(cut), _halo, cut, left)
    padded = torch.nn.functional.pad(whole(cut), (left, 0))
    bounds = offsets(cut)
    for rank, (extended, *_) in enumerate(results):
        assert torch.equal(extended, padded[:, :, bounds[rank] : bounds[rank + 1] + left])
    assert_close(sum(r[1] for r in results), sum(r[2] for r in results), "<Ax, y> = <x, A'y>")
    for *_, sent, expected in results:
        assert sent == (expected if len(cut) > 1 else (0, 0))


def _transpose(group, cut, channels):
    ctx = context(group, cut)
    x = ctx.split(whole(cut, channels), 2).clone().requires_grad_()
    there = transpose(x, ctx=ctx, scatter=1, gather=2)
    sent_there = ctx.ledger().sent_bytes("transpose")
    back = transpose(there, ctx=ctx, scatter=2, gather=1, channels=channels)
    guessed = transpose(there, ctx=ctx, scatter=2, gather=1)
    bounds = offsets(split_sizes(channels, ctx.size))
    y = whole(cut, channels, seed=3)[:, bounds[ctx.rank] : bounds[ctx.rank + 1]]
    ctx.ledger().clear()
    (there * y).sum().backward()
    products = (there.detach() * y).sum(), (x.detach() * x.grad).sum()
    sent = sent_there, ctx.ledger().sent_bytes("transpose")
    element = 2 * 8
    expected = (
        conv_cost.to_channels_bytes(ctx.bounds, ctx.rank, channels, element),
        conv_cost.to_tokens_bytes(ctx.bounds, ctx.rank, channels, element),
    )
    return there.detach(), torch.equal(back, x) and torch.equal(guessed, x), products, sent, expected


@ALL
@pytest.mark.parametrize("channels", [1, 5, 8])
def test_transpose_gives_all_tokens_of_some_channels_and_comes_back(cut, channels):
    results = run_ranks(len(cut), _transpose, cut, channels)
    bounds = offsets(split_sizes(channels, len(cut)))
    for rank, (there, is_same, _, sent, expected) in enumerate(results):
        assert torch.equal(there, whole(cut, channels)[:, bounds[rank] : bounds[rank + 1]])
        assert is_same
        assert sent == (expected if len(cut) > 1 else (0, 0))
    assert_close(sum(r[2][0] for r in results), sum(r[2][1] for r in results), "<Ax, y> = <x, A'y>")


def _transpose_heads(group, cut):
    ctx = context(group, cut)
    x = torch.arange(sum(cut) * 4 * 3, dtype=torch.float32).view(1, sum(cut), 4, 3)
    there = transpose(ctx.split(x, 1), ctx=ctx, scatter=2, gather=1)
    bounds = offsets(split_sizes(4, ctx.size))
    return torch.equal(there, x[:, :, bounds[ctx.rank] : bounds[ctx.rank + 1]])


def test_transpose_of_heads_takes_tokens_in_dim_1():
    assert all(run_ranks(3, _transpose_heads, CUTS[3]))


def test_rejects_wrong_parts_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))
    x = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="rank 0 holds 4 tokens of 9"):
        halo(x, 1, ctx=ctx, dim=2)
    with pytest.raises(ValueError, match="rank 0 holds 4 tokens of 9"):
        transpose(x, ctx=ctx, scatter=1, gather=2)
    with pytest.raises(ValueError, match="must hold all 9 tokens"):
        transpose(x, ctx=ctx, scatter=2, gather=1)
    with pytest.raises(ValueError, match="one of them the tokens'"):
        transpose(x, ctx=ctx, scatter=0, gather=1)
    with pytest.raises(ValueError, match="left must be >= 0"):
        halo(x[:, :, :4], -1, ctx=ctx, dim=2)
    with pytest.raises(ValueError, match="local_tokens must be >= 0"):
        SequenceContext.create(None, -1)


def _silent_rank(group):
    ctx = SequenceContext.even(group, 8)
    if group.rank() == 1:
        return "left without a word"
    try:
        halo(torch.zeros(1, 1, 4), 2, ctx=ctx, dim=2).sum()
        transpose(torch.zeros(1, 2, 4), ctx=ctx, scatter=1, gather=2)
    except RuntimeError as error:
        return f"raised {type(error).__name__}"
    return "no error"


def test_a_rank_that_leaves_makes_the_other_raise():
    assert run_ranks(2, _silent_rank)[0].startswith("raised")
