"""Contexts: both layouts, and documents: who holds what, where positions are, what raises, and what twins make of them."""

import itertools

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.layout import offsets
from seqengine.parallel.summary import Decay, Summary
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boundaries(T):
    """Of documents: one; one of each token; some, with empty ones at the ends and between."""
    return [(0, T), tuple(range(T + 1)), (0, 0, T // 3, T // 3, T // 2, T, T)]


def uneven_zigzag(ctx):
    """Twice as many chunks as a contiguous context has, some of them empty."""
    middles = [a + (b - a) // 3 for a, b in itertools.pairwise(ctx.bounds)]
    cuts = (0, *(x for pair in zip(middles, ctx.bounds[1:], strict=True) for x in pair))
    return SequenceContext(ctx.group, ctx.rank, cuts, "zigzag")


def _facts(group, cut):
    """Of each layout: (sizes, positions, positions within documents, facts that must hold)."""
    ctx, T = SequenceContext.create(group, cut[group.rank()]), sum(cut)
    found = []
    for layout in (ctx, ctx.zigzag(), uneven_zigzag(ctx)):
        x = randn(2, T, 3, seed=0)
        own = layout.split(x, 1).clone().requires_grad_()
        layout.ledger().clear()
        joined = layout.join(own, 1)
        sent = layout.ledger().sent_bytes("join")
        weights = randn(2, T, 3, seed=1)
        (joined * weights).sum().backward()
        layout.check_local("test", own, 1)
        holds = [
            torch.equal(joined, x),
            torch.equal(own.grad, layout.split(weights, -2)),
            sent == (layout.size - 1) * own.numel() * 8,
            torch.equal(own.detach(), x[:, layout.positions()]),
            layout.local_tokens == own.shape[1] == layout.sizes[layout.rank],
            layout.total_tokens == T,
            torch.equal(layout.positions(within_documents=True), layout.positions()),
        ]
        within = [layout.with_documents(d).positions(within_documents=True).tolist() for d in boundaries(T)]
        found.append((layout.sizes, layout.positions().tolist(), within, holds))
    there = ctx.with_documents([0, T]).zigzag()
    same = [
        there.contiguous() == ctx.with_documents(torch.tensor([0, T])),
        there.ledger() is ctx.ledger(),
        there.documents == (0, T),
        there.with_documents(None) == ctx.zigzag(),
        there.zigzag() is there,
        ctx.contiguous() is ctx,
        uneven_zigzag(ctx).contiguous() == SequenceContext.even(group, T) or ctx.size == 1,
    ]
    return found, same


@ALL
def test_both_layouts_know_who_holds_what_and_join_what_they_split(cut):
    results = run_ranks(len(cut), _facts, cut)
    T = sum(cut)
    for _, same in results:
        assert all(same), same
    for layout in range(3):
        sizes = results[0][0][layout][0]
        everyone = [r[0][layout] for r in results]
        assert [len(positions) for _, positions, _, _ in everyone] == sizes
        assert sorted(p for _, positions, _, _ in everyone for p in positions) == list(range(T))
        for _, positions, within, holds in everyone:
            assert all(holds), (layout, holds)
            for documents, found in zip(boundaries(T), within, strict=True):
                starts = [max(d for d in documents[:-1] if d <= p) for p in positions]
                assert found == [p - start for p, start in zip(positions, starts, strict=True)]


def _halo(group, cut):
    ctx, T, found = SequenceContext.create(group, cut[group.rank()]), sum(cut), []
    whole, row = randn(2, 3, T, seed=0), 2 * 3 * 8
    for documents, left in itertools.product(boundaries(T), (0, 1, 3, 2 * T)):
        packed = ctx.with_documents(documents)
        packed.ledger().clear()
        x = packed.split(whole, 2).clone().requires_grad_()
        extended = parallel.halo(x, left, ctx=packed, dim=2)
        forward = packed.ledger().sent_bytes()
        first = ctx.bounds[ctx.rank]
        begin = max(d for d in documents if d <= first)
        expected = torch.cat([whole.new_zeros(2, 3, left), whole[..., : first + x.shape[2]]], dim=2)
        expected = expected[..., expected.shape[2] - left - x.shape[2] :].clone()
        expected[..., : max(0, left - (first - begin))] = 0
        assert torch.equal(extended, expected)
        y = randn(*extended.shape, seed=ctx.rank)
        (extended * y).sum().backward()
        shared = (ctx.bounds, ctx.rank, left, row, documents)
        assert forward == (cost.halo_bytes(*shared) if ctx.size > 1 else 0)
        assert packed.ledger().sent_bytes() - forward == (cost.halo_backward_bytes(*shared) if ctx.size > 1 else 0)
        found.append(((extended.detach() * y).sum(), (x.detach() * x.grad).sum()))
    return found


@ALL
def test_halo_brings_nothing_of_another_document_and_its_backward_is_the_adjoint(cut):
    for products in zip(*run_ranks(len(cut), _halo, cut), strict=True):
        assert_close(sum(there for there, _ in products), sum(back for _, back in products), "<Ax, y> = <x, A'y>")


def packed_inputs(T):
    a = {n: randn(1, T, 2, 4, seed=i) for i, n in enumerate("qkv")}
    return a, {"g": -(randn(1, T, 2, 4, seed=3) ** 2)}, {"beta": randn(1, T, 2, seed=4).sigmoid()}


def packed_calls(api, T, documents, state, of_context, split):
    """Outputs and final states of every function that knows documents: by cu_seqlens, or by its context alone."""
    a, g, beta = ({n: split(x) for n, x in part.items()} for part in packed_inputs(T))
    a["k"] = torch.nn.functional.normalize(a["k"], dim=-1)
    options = of_context or {"cu_seqlens": torch.tensor(documents)}
    states = {"initial_state": state, "output_final_state": True}
    pairs = [
        api.gla(**a, **g, **states, **options),
        api.simple_gla(**a, **states, **options),
        api.delta_rule(**a, **beta, **states, **options),
    ]
    outputs = [api.attention(**a, **options), api.attention(**a, causal=False, window=3, **options)]
    return [o for o, _ in pairs] + outputs, [final for _, final in pairs]


def _packed(group, cut):
    ctx, T, found = SequenceContext.create(group, cut[group.rank()]), sum(cut), []
    for documents in boundaries(T):
        state = randn(len(documents) - 1, 2, 4, 4, seed=5)
        for layout in (ctx, ctx.zigzag()):
            packed = layout.with_documents(documents)
            options = {"ctx": packed}
            outputs, finals = packed_calls(parallel, T, documents, state, options, lambda x, p=packed: p.split(x, 1))
            found.append([packed.join(o, 1) for o in outputs] + finals)
    return found


@ALL
def test_twins_take_the_documents_of_their_context(cut):
    T, results = sum(cut), run_ranks(len(cut), _packed, cut)
    for i, documents in enumerate(boundaries(T)):
        state = randn(len(documents) - 1, 2, 4, 4, seed=5)
        outputs, finals = packed_calls(kernels, T, documents, state, None, lambda x: x)
        for found in (r[2 * i + layout] for r in results for layout in range(2)):
            for number, (x, y) in enumerate(zip(found, outputs + finals, strict=True)):
                assert_close(x, y, f"{documents} {number}")


PARTS = [SequenceContext(None, 0, (0, 4, 9)), SequenceContext(None, 0, (0, 1, 4, 8, 9), "zigzag")]
"""Without a group: a message would raise something else."""


@pytest.mark.parametrize("ctx", [*PARTS, SequenceContext.single(9)], ids=["contiguous", "zigzag", "single"])
def test_what_knows_no_documents_or_other_ones_raises_before_any_message(ctx):
    T, packed = ctx.local_tokens, ctx.with_documents([0, 3, 9])
    x, poles = torch.zeros(1, T, 2, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="modal_conv: there is no form for packed documents"):
        parallel.modal_conv(torch.zeros(1, 2, T), poles, poles, ctx=packed)
    with pytest.raises(ValueError, match="rnn: there is no form for packed documents"):
        parallel.rnn(torch.zeros(1, T, 1, 2, 4), torch.zeros(1, 2, 4, 4), cell="elman", ctx=packed)
    if ctx.layout == "contiguous":  # else q, k and v are moved before they are looked at
        for call in (parallel.gla, parallel.simple_gla, parallel.delta_rule, parallel.attention):
            extra = {"gla": {"g": x}, "delta_rule": {"beta": x[..., 0]}}.get(call.__name__, {})
            with pytest.raises(ValueError, match="cu_seqlens must be None or those of the context"):
                call(x, x, x, **extra, ctx=packed, cu_seqlens=torch.tensor([0, 4, 9]))


def test_a_zigzag_context_cannot_pass_for_a_contiguous_one():
    ctx = PARTS[1]
    x = torch.zeros(1, 2, ctx.local_tokens)
    with pytest.raises(ValueError, match=r"bounds: the context must be contiguous.*relayout"):
        _ = ctx.bounds
    with pytest.raises(ValueError, match=r"halo: the context must be contiguous.*relayout"):
        parallel.halo(x, 1, ctx=ctx, dim=2)
    with pytest.raises(ValueError, match=r"scan: the context must be contiguous.*relayout"):
        parallel.scan(Summary(Decay(torch.zeros(1, 2)), torch.zeros(1, 2, 3)), ctx=ctx)
    with pytest.raises(ValueError, match="rank 0 holds 2 tokens of 9"):
        ctx.join(torch.zeros(3), 0)
    assert "bounds" not in repr(ctx)
    assert ctx != PARTS[0]


def test_contexts_that_cannot_be_are_refused():
    ctx = PARTS[0]
    for bad in ([0, 4], [1, 9], [0, 5, 4, 9], [0.0, 9.0], [[0, 9]], [0], []):
        with pytest.raises(ValueError, match="with_documents: cu_seqlens must"):
            ctx.with_documents(bad)
    with pytest.raises(ValueError, match="zigzag needs the boundaries of 2 P chunks"):
        SequenceContext(None, 0, (0, 4, 8, 9), "zigzag")
    with pytest.raises(ValueError, match="layout must be"):
        SequenceContext(None, 0, (0, 4, 9), "striped")
    with pytest.raises(ValueError, match="cuts must be a tuple"):
        SequenceContext(None, 0, (0,))
    single = SequenceContext.single(5)
    assert single.zigzag() is single
    assert offsets(single.sizes) == single.bounds
