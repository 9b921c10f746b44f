"""ring and Ring Self-Attention: values, adjoint, bytes, on 1 to 8 ranks with uneven and empty parts."""

import pytest
import torch

from seqengine.kernels.attention import reference
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext, ring
from seqengine.parallel.exchange.ring import Route, _Wire, return_ring, visit_ring
from seqengine.parallel.layout import offsets
from seqengine.parallel.ring_self_attention import linformer_self_attention, ring_self_attention
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")


def all_ranks(receiver, source):
    return True


def later_ranks(receiver, source):
    return source <= receiver


def neighbours(receiver, source):
    return abs(receiver - source) <= 1


def odd_ones(receiver, source):
    return (3 * receiver + source) % 5 == 1


def nobody(receiver, source):
    return False


NEEDS = (None, all_ranks, later_ranks, neighbours, odd_ones, nobody)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    return ctx


def _ring(group, cut):
    """For each rule: is what came right, <Ax, y>, <x, A'y>, bytes sent and expected."""
    ctx = context(group, cut)
    x = [randn(2, sum(cut), 3, seed=0), randn(2, sum(cut), 1, 2, seed=1)]
    found = []
    for needs in NEEDS:
        own = [ctx.split(t, 1).clone().requires_grad_() for t in x]
        ctx.ledger().clear()
        blocks = ring(own, ctx=ctx, needs=needs)
        forward = ctx.ledger().sent_bytes()
        wanted = [r == ctx.rank or needs is None or needs(ctx.rank, r) for r in range(ctx.size)]
        right = [block is not None for block in blocks] == wanted
        product, total = 0.0, torch.zeros((), dtype=torch.float64)
        for source, block in enumerate(blocks):
            for i, part in enumerate(block or ()):
                a, b = ctx.bounds[source], ctx.bounds[source + 1]
                right &= torch.equal(part, x[i][:, a:b])
                weight = randn(*part.shape, seed=100 * ctx.rank + 10 * source + i)
                product += float((part.detach() * weight).sum())
                total = total + (part * weight).sum()
        total.backward()
        back = sum(float((t.detach() * t.grad).sum()) for t in own)
        route = Route.of(range(ctx.size), ctx.sizes, needs)
        row = 2 * (3 + 2) * 8
        predicted = (
            cost.ring_bytes(route.sizes, route.spans, ctx.rank, row),
            cost.ring_backward_bytes(route.sizes, route.spans, ctx.rank, row, row, travels=False),
        )
        sent = (forward, ctx.ledger().sent_bytes() - forward)
        found.append((right, product, back, sent, predicted, set(ctx.ledger().counts())))
    return found


@ALL
def test_ring_brings_the_blocks_that_are_needed_and_its_backward_is_the_adjoint(cut):
    results = run_ranks(len(cut), _ring, cut)
    for i in range(len(NEEDS)):
        assert all(r[i][0] for r in results)
        there, back = (torch.tensor(sum(r[i][j] for r in results), dtype=torch.float64) for j in (1, 2))
        assert_close(there, back, "<Ax, y> = <x, A'y>")
        for r in results:
            assert r[i][3] == r[i][4]
            assert r[i][5] <= {"ring"}


def test_a_block_goes_no_further_than_it_is_needed():
    sizes = (2, 3, 4, 5)
    causal = Route.of(range(4), sizes, later_ranks)
    assert causal.spans == ((1, 3), (1, 2), (1, 1), (0, 0))
    assert [cost.ring_bytes(sizes, causal.spans, r, 1) for r in range(4)] == [2, 2 + 3, 2 + 3 + 4, 0]
    full = Route.of(range(4), sizes, None)
    assert [cost.ring_bytes(sizes, full.spans, r, 1) for r in range(4)] == [2 + 5 + 4, 3 + 2 + 5, 4 + 3 + 2, 5 + 4 + 3]
    assert sum(cost.ring_bytes(sizes, Route.of(range(4), sizes, nobody).spans, r, 1) for r in range(4)) == 0


class Recorder:
    """In place of the messages of a ring: what each rank would send and receive, by the place in its program."""

    def __init__(self):
        self.sends, self.receives, self.calls = [], [], 0

    def start(self, wire, sends, receives):
        for pairs, found in ((sends, self.sends), (receives, self.receives)):
            found += [(self.calls, peer, t.numel()) for peer, t in pairs if t.numel() > 0]
        self.calls += 1
        return []


def programs(monkeypatch, sizes, needs):
    """The recorders of all ranks, after a forward and a backward."""
    route, bounds, found = Route.of(range(len(sizes)), sizes, needs), offsets(sizes), []
    for rank, n in enumerate(sizes):
        recorder = Recorder()
        monkeypatch.setattr(_Wire, "start", lambda wire, sends, receives, r=recorder: r.start(wire, sends, receives))
        ctx, x = SequenceContext(None, rank, bounds), torch.zeros(n, 2)

        def looks(source, rank=rank):
            return source == rank or needs is None or needs(rank, source)

        def part(source, blocks, looks=looks):
            return list(blocks) if looks(source) else None

        visit_ring(lambda *_: None, (x,), route=route, ctx=ctx, dim=0)
        return_ring(part, (x,), route=route, ctx=ctx, dim=0, dtype=x.dtype)
        found.append(recorder)
    return found


@pytest.mark.parametrize("sizes", [(1, 2), (3, 0, 2), (1, 2, 3, 4, 5), (1, 0, 2, 0, 0, 3, 1, 1, 4, 1, 0, 2, 1)])
@pytest.mark.parametrize("needs", NEEDS)
def test_every_send_has_its_receive_at_the_same_place_of_the_program(monkeypatch, sizes, needs):
    found = programs(monkeypatch, sizes, needs)
    assert len({recorder.calls for recorder in found}) == 1
    sends = {(call, rank, peer): n for rank, r in enumerate(found) for call, peer, n in r.sends}
    receives = {(call, peer, rank): n for rank, r in enumerate(found) for call, peer, n in r.receives}
    assert sends == receives
    assert len(sends) == sum(len(r.sends) for r in found)  # no two messages of a call between one pair of ranks


def test_the_next_block_is_on_its_way_before_the_work_on_this_one(monkeypatch):
    order = []
    monkeypatch.setattr(_Wire, "start", lambda *_: order.append("start") or [])
    ctx, x = SequenceContext(None, 0, (0, 1, 2, 3)), torch.zeros(1, 2)
    route = Route.of(range(3), (1, 1, 1), None)
    visit_ring(lambda *_: order.append("work"), (x,), route=route, ctx=ctx, dim=0)
    assert order == ["start", "work"] * 3


def _visits(group, cut):
    """A sum over all blocks, one at a time: the order of visits, the result, and the gradients."""
    ctx = context(group, cut)
    route = Route.of(range(ctx.size), ctx.sizes, later_ranks)
    x = randn(sum(cut), 2, seed=0)
    own, order, total = ctx.split(x, 0).clone(), [], torch.zeros(2, dtype=torch.float64)

    def look(source, blocks):
        order.append(source)
        assert source <= ctx.rank
        total.add_(blocks[0].square().sum(0))

    def gradient(source, blocks):
        return [2 * blocks[0] * (ctx.rank + 1)] if source <= ctx.rank else None

    visit_ring(look, (own,), route=route, ctx=ctx, dim=0)
    (found,) = return_ring(gradient, (own,), route=route, ctx=ctx, dim=0, dtype=torch.float64)
    return order, total, found


@ALL
def test_visits_come_nearest_first_and_gradients_return_to_their_owner(cut):
    P, x, bounds = len(cut), randn(sum(cut), 2, seed=0), offsets(cut)
    for rank, (order, total, found) in enumerate(run_ranks(P, _visits, cut)):
        came = [rank, *(s for s in reversed(range(rank)) if cut[s] > 0)]
        assert order == came
        assert_close(total, x[: bounds[rank + 1]].square().sum(0))
        weight = sum(r + 1 for r in range(rank, P))
        assert_close(found, 2 * weight * x[bounds[rank] : bounds[rank + 1]])


def attention_tensors(T, R=3):
    shapes = [(2, T, 3, 4), (2, T, 3, 4), (2, T, 3, 2), (2, T, 3, 2), (R, T), (R, T)]
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def linformer(q, k, v, e, f):
    keys, values = torch.einsum("rt,bthk->brhk", e, k), torch.einsum("rt,bthk->brhk", f, v)
    weights = torch.softmax(torch.einsum("bthk,brhk->bhtr", q, keys) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("bhtr,brhv->bthv", weights, values)


def _published(group, cut):
    ctx = context(group, cut)
    *inputs, dout, e, f = attention_tensors(sum(cut))
    dout, found = ctx.split(dout, 1), []
    route = Route.of(range(ctx.size), ctx.sizes, None)
    row = 2 * 3 * (4 + 2) * 8
    predicted = [
        cost.ring_bytes(route.sizes, route.spans, ctx.rank, row),
        cost.ring_backward_bytes(route.sizes, route.spans, ctx.rank, row, row),
    ]
    for form in (False, True, "linformer"):
        own = [ctx.split(x, 1).clone().requires_grad_() for x in inputs]
        if form == "linformer":
            own += [ctx.split(x, 1).clone().requires_grad_() for x in (e, f)]
            all_reduce = 2 * (ctx.size - 1) * (2 * 3 * 3 * 6 * 8) // ctx.size
            predicted = [all_reduce, all_reduce]
        ctx.ledger().clear()
        if form == "linformer":
            out = linformer_self_attention(*own, ctx=ctx)
        else:
            out = ring_self_attention(*own, ctx=ctx, causal=form)
        forward = ctx.ledger().sent_bytes()
        gradients = torch.autograd.grad(out, own, dout)
        assert [forward, ctx.ledger().sent_bytes() - forward] == predicted
        found.append((out.detach(), *gradients))
    return found


@ALL
def test_ring_self_attention_and_its_sparse_form_are_the_definition_on_the_whole(cut):
    results = run_ranks(len(cut), _published, cut)
    *inputs, dout, e, f = attention_tensors(sum(cut))
    for i, form in enumerate((False, True, "linformer")):
        leaves = [x.clone().requires_grad_() for x in (*inputs, *((e, f) if form == "linformer" else ()))]
        if form == "linformer":
            out = linformer(*leaves)
        else:
            out, _ = reference.attention(*leaves, None, form, None, 4**-0.5)
        expected = (out, *torch.autograd.grad(out, leaves, dout))
        for j, name in enumerate(("out", "dq", "dk", "dv", "de", "df")[: len(expected)]):
            assert_close(torch.cat([r[i][j] for r in results], dim=1), expected[j], f"{form} {name}")


def test_rejects_wrong_parts_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))
    good, long = torch.zeros(2, 4, 3, 2), torch.zeros(2, 5, 3, 2)
    with pytest.raises(ValueError, match="rank 0 holds 4 tokens of 9"):
        ring(long, ctx=ctx)
    with pytest.raises(ValueError, match="blocks must have one dtype"):
        ring([good, good.double()], ctx=ctx)
    with pytest.raises(ValueError, match="at least one"):
        ring([], ctx=ctx)
    with pytest.raises(ValueError, match="rank 0 holds 4 tokens of 9"):
        ring_self_attention(good, long, good, ctx=ctx)
    with pytest.raises(ValueError, match="k must be"):
        ring_self_attention(good, good[..., :1], good, ctx=ctx)
    with pytest.raises(ValueError, match="project_v must be"):
        linformer_self_attention(good, good, good, torch.zeros(3, 4), torch.zeros(3, 5), ctx=ctx)


def _silent_rank(group):
    ctx = SequenceContext.even(group, 9)
    if group.rank() == 1:
        return "left without a word"
    try:
        for _ in range(2):
            ring(torch.zeros(1, 3), ctx=ctx)
    except RuntimeError as error:
        return f"raised {type(error).__name__}"
    return "no error"


def test_a_rank_that_leaves_makes_the_others_raise():
    found = run_ranks(3, _silent_rank)
    assert all(found[r].startswith("raised") for r in (0, 2)), found
