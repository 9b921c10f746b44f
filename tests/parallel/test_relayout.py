"""relayout from any cut to any other, and every twin in a zigzag context: the kernel on the whole, bytes as predicted."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext, relayout
from seqengine.parallel.exchange.relayout import on_contiguous
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.ring_self_attention import ring_self_attention
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [9, 4], 3: [4, 0, 7], 4: [1, 3, 0, 7], 5: [2, 2, 1, 1, 15], 8: [3, 0, 1, 2, 0, 0, 16, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contexts(group, cut):
    """Of one sequence: contiguous as cut, contiguous the other way round, zigzag balanced, and zigzag uneven."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    backwards = SequenceContext(ctx.group, ctx.rank, offsets(cut[::-1]))
    middles = [a + (b - a) // 3 for a, b in itertools.pairwise(ctx.bounds)]
    uneven = (0, *(x for pair in zip(middles, ctx.bounds[1:], strict=True) for x in pair))
    return [ctx, backwards, ctx.zigzag(), SequenceContext(ctx.group, ctx.rank, uneven, "zigzag")]


def _moves(group, cut):
    found, T = [], sum(cut)
    whole = randn(2, 3, T, seed=0)
    kinds = [whole.int(), whole.to(torch.bfloat16), torch.complex(whole, whole), whole > 0]
    for ctx, to in itertools.permutations(contexts(group, cut), 2):
        x = ctx.split(whole, 2).clone().requires_grad_()
        ctx.ledger().clear()
        y = relayout(x, ctx=ctx, to=to, dim=-1)
        sent = ctx.ledger().sent_bytes()
        assert torch.equal(y, to.split(whole, 2))
        assert torch.equal(relayout(y, ctx=to, to=ctx, dim=2), x)
        for kind in kinds:
            assert torch.equal(relayout(ctx.split(kind, 2), ctx=ctx, to=to, dim=2), to.split(kind, 2))
        weights = randn(*y.shape, seed=1 + ctx.rank).requires_grad_()
        ctx.ledger().clear()
        (dx,) = torch.autograd.grad(y, x, weights, create_graph=True)
        back = ctx.ledger().sent_bytes()
        (again,) = torch.autograd.grad(dx, weights, x.detach())
        assert torch.equal(again, y)
        row = 2 * 3 * 8
        assert sent == cost.relayout_bytes(ctx.parts, to.parts, ctx.rank, row)
        assert back == cost.relayout_bytes(to.parts, ctx.parts, ctx.rank, row)
        found.append(((y * weights).sum().detach(), (x * dx).sum().detach()))
    return found


@ALL
def test_relayout_is_a_permutation_with_its_inverse_and_adjoint_and_sends_what_is_predicted(cut):
    for products in zip(*run_ranks(len(cut), _moves, cut), strict=True):
        assert_close(sum(there for there, _ in products), sum(back for _, back in products), "<Ax, y> = <x, A'y>")


def gates(*shape, seed):
    moderate = -(randn(*shape, seed=seed) ** 2) / 10
    return torch.where(randn(*shape, seed=seed + 1) > 1.5, -torch.inf, moderate)


def cases(T):
    """name: (function of an api, arguments, token dims of them, token dim of the output, has states)"""
    B, H, K, V, D, N = 2, 2, 4, 3, 3, 2
    qkv = {
        "q": randn(B, T, H, K, seed=1),
        "k": F.normalize(randn(B, T, H, K, seed=2), dim=-1),
        "v": randn(B, T, H, V, seed=3),
    }
    linear, state = dict.fromkeys("qkvg", 1), {"initial_state": randn(B, H, K, V, seed=4)}
    delta = {"g": gates(B, T, H, seed=5), "beta": randn(B, T, H, seed=7).sigmoid()}
    modal = {n: randn(B, D, T, seed=8 + i) for i, n in enumerate(("u", "pre_gate", "post_gate"))}
    modal |= {"log_poles": -(randn(D, N, seed=11) ** 2), "residues": randn(D, N, seed=12), "skip": randn(D, seed=13)}
    rnn = {"gates": randn(B, T, 4, H, K, seed=14), "recurrent": randn(4, H, K, K, seed=15) / 2}
    rnn_state = {"initial_state": tuple(randn(B, H, K, seed=16 + i) for i in range(2))}
    return {
        "gla": (lambda api: api.gla, qkv | state | {"g": gates(B, T, H, K, seed=5)}, linear, 1, {}),
        "simple_gla": (lambda api: api.simple_gla, qkv | state | {"g": gates(B, T, H, seed=5)}, linear, 1, {}),
        "fixed": (lambda api: api.simple_gla, qkv | state | {"g": -randn(H, seed=5) ** 2}, dict.fromkeys("qkv", 1), 1, {}),
        "delta_rule": (lambda api: api.delta_rule, qkv | state | delta, linear | {"beta": 1}, 1, {}),
        "modal": (
            lambda api: api.modal_conv,
            modal | {"initial_state": randn(B, D, N, seed=18)},
            {"u": 2, "pre_gate": 2, "post_gate": 2},
            2,
            {},
        ),
        "rnn": (lambda api: api.rnn, rnn | rnn_state, {"gates": 1}, 1, {"cell": "lstm"}),
    }  # fmt: skip


def run(function, a, dims, weights, options):
    """(y, final states, gradients by argument) of a loss of both."""
    leaf = {n: x if isinstance(x, tuple) else x.clone().requires_grad_() for n, x in a.items()}
    leaf = {n: tuple(s.clone().requires_grad_() for s in x) if isinstance(x, tuple) else x for n, x in leaf.items()}
    y, final = function(**leaf, output_final_state=True, **options)
    finals = final if isinstance(final, tuple) else (final,)
    ((y * weights).sum() + sum(s.square().sum() for s in finals)).backward()
    gradients = {n: [s.grad for s in (x if isinstance(x, tuple) else (x,))] for n, x in leaf.items()}
    return y.detach(), [s.detach() for s in finals], gradients


def _twins(group, cut):
    found = []
    _, _, *zigzags = contexts(group, cut)
    for ctx in zigzags:
        results = {}
        for name, (choose, whole, dims, dim, options) in cases(sum(cut)).items():
            weights = ctx.split(randn(*output_shape(name, whole), seed=30), dim)
            a = {n: ctx.split(x, dims[n]) if n in dims else x for n, x in whole.items()}
            ctx.ledger().clear()
            y, finals, gradients = run(choose(parallel), a, dims, weights, {"ctx": ctx, **options})
            sent = ctx.ledger().sent_bytes()
            there = ctx.contiguous()
            b = {n: there.split(x, dims[n]) if n in dims else x for n, x in whole.items()}
            there.ledger().clear()
            plain = there.split(randn(*output_shape(name, whole), seed=30), dim)
            run(choose(parallel), b, dims, plain, {"ctx": there, **options})
            rows = [x.numel() // sum(cut) * 8 for n, x in whole.items() if n in dims]
            rows.append(output_shape(name, whole).numel() // sum(cut) * 8)
            ways = [(ctx.parts, there.parts), (there.parts, ctx.parts)]
            moved = sum(cost.relayout_bytes(*way, ctx.rank, sum(rows)) for way in ways)
            assert sent == there.ledger().sent_bytes() + moved, name
            joined = {n: ctx.join(g[0], dims[n]) for n, g in gradients.items() if n in dims}
            rest = {n: g for n, g in gradients.items() if n not in dims}
            results[name] = (ctx.join(y, dim), finals, joined, rest)
        found.append(results)
    return found


def output_shape(name, whole):
    if name == "modal":
        return whole["u"].shape
    x = whole["gates"].select(2, 0) if name == "rnn" else whole["v"]
    return x.shape


@ALL
def test_twins_in_a_zigzag_context_are_the_kernel_on_the_whole_with_every_gradient_and_the_bytes_of_two_relayouts(cut):
    results = run_ranks(len(cut), _twins, cut)
    for name, (choose, whole, dims, _, options) in cases(sum(cut)).items():
        y, finals, gradients = run(choose(kernels), whole, dims, randn(*output_shape(name, whole), seed=30), options)
        for layout in range(2):
            everyone = [r[layout][name] for r in results]
            for found_y, found_finals, joined, _ in everyone:
                assert_close(found_y, y, name)
                for found, final in zip(found_finals, finals, strict=True):
                    assert_close(found, final, f"{name} final")
                for n in dims:
                    assert_close(joined[n], gradients[n][0], f"{name} d_{n}")
            for n in [n for n in gradients if n not in dims]:
                for i, expected in enumerate(gradients[n]):
                    parts = [rest[n][i] for *_, rest in everyone]
                    for part in parts if n == "initial_state" else [sum(parts)]:
                        assert_close(part, expected, f"{name} d_{n}")


def _native(group, cut):
    """What needs no relayout: the loss, attention, and Ring Self-Attention."""
    T, found = sum(cut), []
    hidden, weight, labels = randn(T, 4, seed=1), randn(6, 4, seed=2), torch.arange(T) % 6
    q, k, v = (randn(1, T, 2, 4, seed=i) for i in range(3))
    for ctx in contexts(group, cut):
        ctx.ledger().clear()
        x = ctx.split(hidden, 0).clone().requires_grad_()
        nats, tokens = parallel.linear_cross_entropy(x, weight, ctx.split(labels, 0), ctx=ctx)
        nats.backward()
        parts = [ctx.split(x, 1).clone().requires_grad_() for x in (q, k, v)]
        out = parallel.attention(*parts, ctx=ctx)
        (out * ctx.split(v, 1)).sum().backward()
        own = [ctx.split(x, 1).clone().requires_grad_() for x in (q, k, v)]
        scores = ring_self_attention(*own, ctx=ctx, causal=True)
        (scores * ctx.split(v, 1)).sum().backward()
        assert ctx.ledger().sent_bytes("relayout") == 0
        gradients = [ctx.join(p.grad, 1) for p in parts + own]
        found.append(
            (nats.detach(), tokens, ctx.join(x.grad, 0), [ctx.join(y, 1).detach() for y in (out, scores)], gradients)
        )
    return found  # fmt: skip


@ALL
def test_pointwise_and_attention_twins_take_any_layout_as_it_is(cut):
    T = sum(cut)
    hidden, weight = randn(T, 4, seed=1).requires_grad_(), randn(6, 4, seed=2)
    nats, tokens = kernels.linear_cross_entropy(hidden, weight, torch.arange(T) % 6)
    nats.backward()
    q, k, v = (randn(1, T, 2, 4, seed=i).requires_grad_() for i in range(3))
    out = kernels.attention(q, k, v)
    (out * v.detach()).sum().backward()
    for found in run_ranks(len(cut), _native, cut):
        for found_nats, found_tokens, d_hidden, outputs, gradients in found:
            assert_close(found_nats, nats)
            assert found_tokens == tokens
            assert_close(d_hidden, hidden.grad)
            for y in outputs:
                assert_close(y, out)
            for found_gradient, x in zip(gradients, (q, k, v) * 2, strict=True):
                assert_close(found_gradient, x.grad)


def _packed(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()]).zigzag().with_documents([0, 2, 5, 5, sum(cut)])
    a = {n: randn(1, sum(cut), 2, 4, seed=i) for i, n in enumerate("qkv")} | {"beta": randn(1, sum(cut), 2, seed=4)}
    a["k"], a["beta"] = F.normalize(a["k"], dim=-1), a["beta"].sigmoid()
    state = randn(4, 2, 4, 4, seed=5).requires_grad_()
    parts = {n: ctx.split(x, 1).clone().requires_grad_() for n, x in a.items()}
    o, final = parallel.delta_rule(**parts, ctx=ctx, initial_state=state, output_final_state=True)
    (o.sum() + final.square().sum()).backward()
    whole = {n: x.clone().requires_grad_() for n, x in a.items()}
    first = state.detach().clone().requires_grad_()
    options = {"cu_seqlens": torch.tensor(ctx.documents), "output_final_state": True}
    y, last = kernels.delta_rule(**whole, initial_state=first, **options)
    (y.sum() + last.square().sum()).backward()
    found = [ctx.join(x, 1) for x in (o, *(p.grad for p in parts.values()))] + [final, state.grad]
    return [x.detach() for x in found], [x.detach() for x in (y, *(p.grad for p in whole.values()), last, first.grad)]


def test_documents_and_zigzag_together():
    for found, expected in run_ranks(5, _packed, CUTS[5]):
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y)


def test_balanced_zigzag_moves_what_the_cuts_say():
    P, T = 4, 64
    bounds = offsets(split_sizes(T, P))
    ctx = SequenceContext(None, 0, bounds)
    sent = [cost.relayout_bytes(ctx.parts, ctx.zigzag().parts, rank, 8) for rank in range(P)]
    assert sent == [8 * 8, 8 * 16, 8 * 8, 8 * 16]  # chunks of 8 tokens: ranks 0 and 2 keep one of their two


@on_contiguous({"x": 1}, output=1, documents=False)
def _doubled(x, scale, *, ctx):
    assert ctx.layout == "contiguous"
    return x * scale


def _plain_output(group, cut):
    _, _, *zigzags = contexts(group, cut)
    x = randn(2, sum(cut), seed=0)
    return [torch.equal(_doubled(ctx.split(x, 1), 2.0, ctx=ctx), ctx.split(2.0 * x, 1)) for ctx in zigzags]


def test_a_twin_may_return_one_tensor():
    assert all(map(all, run_ranks(3, _plain_output, CUTS[3])))


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    x = torch.zeros(2, 4)
    bad = [
        ("rank 0 holds 4 tokens of 9", torch.zeros(2, 5), ctx.zigzag()),
        ("both contexts must be of one group and 9 tokens", x, SequenceContext(None, 0, (0, 4, 8))),
        ("both contexts must be of one group and 9 tokens", x, SequenceContext(None, 0, (0, 4, 6, 9))),
        ("both contexts must be of one group and 9 tokens", x, SequenceContext(None, 1, (0, 4, 9))),
    ]
    for message, given, to in bad:
        with pytest.raises(ValueError, match=message):
            relayout(given, ctx=ctx, to=to, dim=1)
    assert relayout(x, ctx=ctx, to=SequenceContext(None, 0, (0, 4, 9)), dim=1) is x
    zigzag = ctx.zigzag()
    with pytest.raises(ValueError, match=f"gla: rank 0 holds {zigzag.local_tokens} tokens of 9"):
        parallel.gla(*(torch.zeros(1, 9, 2, 4),) * 4, ctx=zigzag)
    with pytest.raises(TypeError, match="ctx"):
        parallel.gla(x, x, x, x)
