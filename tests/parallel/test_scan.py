"""scan: states, gradients, adjoints and bytes of every algorithm and kind of summary, on 1 to 8 ranks."""

import itertools

import pytest
import torch

from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext, halo, scan
from seqengine.parallel.exchange.scan import start_scan
from seqengine.parallel.summary import Decay, Dense, FixedDecay, Summary
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [1, 3, 0, 5], 5: [2, 2, 1, 1, 3], 8: [3, 0, 1, 2, 0, 0, 4, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
B, H, K, V = 2, 3, 4, 2
WIDE = {torch.float32: torch.complex64, torch.float64: torch.complex128}
KINDS = (
    "scalar",
    "diagonal",
    "complex",
    "complex state",
    "fixed",
    "fixed complex",
    "retention",
    "dense",
    "dense complex",
)
WAYS = [("serial", None), ("gather", None), ("log", None), ("auto", None), ("auto", 2)]
WAYS += [("hierarchical", size) for size in (1, 2, 3, 8)]


def randn(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(
        dtype
    )


def log_decay(*shape, seed, dtype, scale=1.0):
    """Real parts from 0 to -inf in any mixture."""
    log = randn(*shape, seed=seed, dtype=dtype) * scale
    real = -log.real.abs()
    real.view(-1)[seed % 3 :: 5] = -torch.inf
    real.view(-1)[seed % 2 :: 7] = 0.0
    return torch.complex(real, log.imag) if dtype.is_complex else real


def kinds(kind, rank, tokens, dtype):
    """(class, value, state) of one rank; that of a rank without tokens is the identity."""
    wide, seed = WIDE[dtype], 17 * rank
    state_dtype = wide if "complex" in kind else dtype
    if kind.startswith("fixed"):
        value = log_decay(H, K, seed=2, dtype=state_dtype, scale=0.3)
        state = randn(B, H, K, seed=seed, dtype=state_dtype)
        made = FixedDecay, value, state
    elif kind == "retention":
        made = FixedDecay, log_decay(H, seed=3, dtype=dtype), randn(B, H, K, V, seed=seed, dtype=dtype)
    elif kind.startswith("dense"):
        value = randn(B, H, K, K, seed=seed + 1, dtype=state_dtype) / 2
        made = Dense, value, randn(B, H, K, V, seed=seed, dtype=state_dtype)
    else:
        shape = (B, H) if kind in ("scalar", "complex state") else (B, H, K)
        value = log_decay(*shape, seed=seed + 1, dtype=wide if kind == "complex" else dtype)
        made = Decay, value, randn(B, H, K, V, seed=seed, dtype=state_dtype)
    kind_of, value, state = made
    if tokens == 0:
        state = torch.zeros_like(state)
        if kind_of is Decay:
            value = torch.zeros_like(value)
        if kind_of is Dense:
            value = torch.eye(K, dtype=value.dtype).expand(value.shape)
    return kind_of, value.clone().requires_grad_(), state.requires_grad_()


def build(kind_of, value, state, tokens):
    return Summary(FixedDecay(value, tokens) if kind_of is FixedDecay else kind_of(value), state)


def example(kind, dtype):
    return kinds(kind, 0, 1, dtype)[2]


def upstream(kind, seed, dtype):
    state = example(kind, dtype)
    return randn(*state.shape, seed=1000 + seed, dtype=state.dtype)


def product(x, w):
    """Re <x, w>, a real number."""
    return (x * w.conj()).real.sum()


def by_definition(cut, kind, reverse, has_initial, dtype=torch.float64):
    """The recurrence over ranks, one after the other: states, final state and gradients, rank by rank."""
    leaves = [kinds(kind, r, n, dtype) for r, n in enumerate(cut)]
    initial = upstream(kind, 99, dtype).requires_grad_()
    state = initial if has_initial else torch.zeros_like(initial)
    loss, before = 0.0, {}
    for rank in reversed(range(len(cut))) if reverse else range(len(cut)):
        before[rank] = state
        loss = loss + product(state, upstream(kind, rank, dtype))
        state = build(*leaves[rank], cut[rank])(state)
    loss = loss + product(state, upstream(kind, 50, dtype))
    loss.backward()
    grads = [(value.grad, x.grad) for _, value, x in leaves]
    return [before[r].detach() for r in range(len(cut))], state.detach(), grads, initial.grad


def _scan(ctx, kind, reverse, way, has_initial, dtype):
    """Results, gradients and (sent, predicted) bytes, forward and backward."""
    ctx.ledger().clear()
    algorithm, node_size = way
    kind_of, value, state = kinds(kind, ctx.rank, ctx.local_tokens, dtype)
    initial = upstream(kind, 99, dtype).requires_grad_() if has_initial else None
    before, final = scan(
        build(kind_of, value, state, ctx.local_tokens),
        ctx=ctx,
        initial=initial,
        reverse=reverse,
        algorithm=algorithm,
        output_final=True,
        node_size=node_size,
    )
    forward = ctx.ledger().sent_bytes("scan")
    loss = product(before, upstream(kind, ctx.rank, dtype)) + product(final, upstream(kind, 50, dtype))
    loss.backward()
    sent = forward, ctx.ledger().sent_bytes("scan") - forward
    sizes = (state.nbytes, 0 if kind_of is FixedDecay else value.nbytes)
    if algorithm == "auto":
        algorithm = cost.scan_algorithm(ctx.size, *sizes, output_final=True, node_size=node_size)
    shared = (ctx.size, ctx.rank, algorithm, *sizes)
    predicted = (
        cost.scan_bytes(*shared, reverse=reverse, output_final=True, node_size=node_size),
        cost.scan_backward_bytes(*shared, reverse=reverse, initial_gradient=has_initial, node_size=node_size),
    )
    d_initial = initial.grad if has_initial else None
    return before.detach(), final.detach(), value.grad, state.grad, d_initial, sent, predicted


def _scans(group, cut, cases, dtype):
    ctx = SequenceContext.create(group, cut[group.rank()])
    return [_scan(ctx, *case, dtype) for case in cases]


def check(cut, cases, dtype=torch.float64, tolerance=1e-13):
    results = run_ranks(len(cut), _scans, cut, cases, dtype)
    for i, (kind, reverse, way, has_initial) in enumerate(cases):
        expected, final, grads, d_initial = by_definition(cut, kind, reverse, has_initial, dtype)
        for rank, found in enumerate(r[i] for r in results):
            what = f"{kind}, {way}, reverse={reverse}, rank {rank}: "
            before, last, d_value, d_state, d_first, sent, predicted = found
            _close(before, expected[rank], what + "before", tolerance)
            _close(last, final, what + "final", tolerance)
            _close(d_value, grads[rank][0], what + "d_value", tolerance)
            _close(d_state, grads[rank][1], what + "d_state", tolerance)
            if has_initial:
                _close(d_first, d_initial, what + "d_initial", tolerance)
            assert sent == predicted, what + "bytes"


def _close(actual, expected, what, tolerance):
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert_close(actual, expected, what, tolerance)


@ALL
def test_every_algorithm_is_the_recurrence_with_its_gradients_and_the_bytes_of_the_formula(cut):
    ways = WAYS if len(cut) > 1 else [("auto", None)]
    cases = [*itertools.product(KINDS, (False, True), ways, (True,)), ("diagonal", False, ("log", None), False)]
    check(
        cut, cases[:: {3: 2, 4: 2, 5: 4, 8: 4}.get(len(cut), 1)]
    )  # nine ways: every second or fourth case still meets all of them


def test_float32():
    cases = [(kind, False, way, True) for kind in KINDS for way in (("gather", None), ("log", None))]
    check(CUTS[5], cases, torch.float32, 1e-5)


def _adjoint(group, cut, way):
    ctx = SequenceContext.create(group, cut[group.rank()])
    kind_of, value, state = kinds("complex", ctx.rank, ctx.local_tokens, torch.float64)
    initial = upstream("complex", 99, torch.float64).requires_grad_()
    summary = build(kind_of, value.detach(), state, ctx.local_tokens)
    algorithm, node_size = way
    before, final = scan(summary, ctx=ctx, initial=initial, algorithm=algorithm, output_final=True, node_size=node_size)
    weights, last = (upstream("complex", seed, torch.float64) for seed in (ctx.rank, 50))
    (product(before, weights) + product(final, last)).backward()
    of_ranks = product(before, weights).detach(), product(state, state.grad).detach()
    return of_ranks, (product(final, last).detach(), product(initial, initial.grad).detach())


@pytest.mark.parametrize("way", [("serial", None), ("gather", None), ("log", None), ("hierarchical", 2)])
def test_backward_is_the_adjoint(way):
    results = run_ranks(4, _adjoint, CUTS[4], way)
    forward, backward = (sum(r[0][i] for r in results) + results[0][1][i] for i in (0, 1))
    assert_close(forward, backward, "<Ax, y> = <x, A'y>")


def _twice(group, cut, way):
    ctx = SequenceContext.create(group, cut[group.rank()])
    first, again = (_scan(ctx, "diagonal", False, way, True, torch.float64)[:5] for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("way", [("gather", None), ("hierarchical", 2)])
def test_two_runs_are_bitwise_the_same(way):
    assert all(run_ranks(4, _twice, CUTS[4], way))


class _Work(torch.autograd.Function):
    """Something that happens between start and finish, and notes when."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        events.append("work")
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append("work")
        return gradient * 2, None


def _overlap(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    events = ctx.ledger().entries  # what is sent, and what is done, in one list
    kind_of, value, state = kinds("diagonal", ctx.rank, ctx.local_tokens, torch.float64)
    one, two = (build(kind_of, value * factor, state, ctx.local_tokens) for factor in (1, 2))
    pending = [start_scan(s, ctx=ctx, algorithm="gather") for s in (one, two)]
    worked = _Work.apply(state, events)
    befores = [p.finish()[0] for p in pending]
    split = len(events)
    (befores[0] + 3 * befores[1] + worked).sum().backward()
    alone = [scan(s, ctx=ctx, algorithm="log")[0] for s in (one, two)]
    same = all(torch.allclose(a, b, rtol=1e-13, atol=1e-13) for a, b in zip(befores, alone, strict=True))
    order = ["work" if e == "work" else "sent" for e in events]
    return order[:split], order[split : split + 3], same


def test_messages_leave_before_the_work_between_start_and_finish_forward_and_backward():
    for forward, backward, same in run_ranks(3, _overlap, CUTS[3]):
        assert forward == ["sent", "sent", "work"]
        assert backward == ["sent", "sent", "work"]
        assert same


def _between(group, cut, ways):
    """Scans that run whole, and a halo, while another scan is under way; forward and backward."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for (algorithm, node_size), other in itertools.product(ways, ways):
        kind_of, value, state = kinds("diagonal", ctx.rank, ctx.local_tokens, torch.float64)
        outer = build(kind_of, value, state, ctx.local_tokens)
        pending = start_scan(outer, ctx=ctx, algorithm=algorithm, node_size=node_size, output_final=True)
        inner, _ = scan(Summary(outer.transition, 2 * state), ctx=ctx, algorithm=other[0], node_size=other[1])
        inputs = state.new_ones(1, ctx.local_tokens).requires_grad_()
        halos = halo(inputs, 2, ctx=ctx, dim=1)
        before, final = pending.finish()
        (product(before, inner) + final.sum() + halos.sum()).backward()
        found.append((before.detach(), inner.detach(), value.grad, state.grad, inputs.grad))
    return found


def test_other_exchanges_may_run_while_a_scan_is_under_way():
    ways = [("serial", None), ("gather", None), ("log", None), ("hierarchical", 2)]
    for found in run_ranks(5, _between, CUTS[5], ways):
        for case in found:
            for x, first in zip(case, found[0], strict=True):
                _close(x, first, "whatever the algorithms", 1e-13)
            _close(case[1], 2 * case[0], "inner", 1e-13)


def _forms(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    _, value, state = kinds("scalar", ctx.rank, ctx.local_tokens, torch.float64)
    whole, _ = scan(Summary(Decay(value), state), ctx=ctx)
    short, final = scan((value, state), ctx=ctx)
    nothing, _ = scan((value[:0], state[:0]), ctx=ctx)
    (once,) = torch.autograd.grad(whole.square().sum(), state, retain_graph=True)
    (d_state,) = torch.autograd.grad(whole.square().sum(), state, create_graph=True)
    try:
        d_state.sum().backward()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    is_same = torch.equal(whole, short) and torch.equal(once, d_state)
    return is_same, final is None, nothing.shape[0], ctx.ledger().counts(), message


def test_pairs_empty_states_and_second_derivatives():
    for is_same, has_no_final, rows, counts, message in run_ranks(2, _forms, CUTS[2]):
        assert is_same
        assert has_no_final
        assert rows == 0
        assert counts == {"scan": 4}  # two scans and a backward run twice: an empty state sends nothing
        assert "once_differentiable" in message


def test_one_rank_is_the_map_itself_and_differentiable_twice():
    ctx = SequenceContext.single(3)
    _, value, state = kinds("diagonal", 0, 3, torch.float64)
    initial = upstream("diagonal", 99, torch.float64)
    before, final = scan((value, state), ctx=ctx, initial=initial, output_final=True)
    assert torch.equal(before, initial)
    assert torch.equal(final, Summary(Decay(value), state)(initial))
    assert ctx.ledger().entries == []
    finite = value.detach().clamp(min=-3).requires_grad_()

    def function(value, state, initial):
        return scan((value, state), ctx=ctx, initial=initial, output_final=True)[1]

    assert torch.autograd.gradgradcheck(function, (finite, state, initial.requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_monoid_is_associative_and_composes_maps(kind):
    maps = [build(*kinds(kind, r, 1 + r, torch.float64), 1 + r) for r in range(3)]
    state = upstream(kind, 7, torch.float64)
    a, b, c = maps
    step_by_step = c(b(a(state)))
    left, right = a.then(b).then(c), a.then(b.then(c))
    _close(left(state), step_by_step, "left", 1e-14)
    _close(right(state), step_by_step, "right", 1e-14)
    constant = Summary(None, state)
    _close(constant.then(a)(torch.full_like(state, torch.nan)), a(state), "constant", 1e-14)


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    state = torch.zeros(2, 3, 4)
    decay = torch.zeros(2, 3)
    bad = [
        ("algorithm must be one of", (decay, state), {"algorithm": "tree"}),
        ("hierarchical needs a node_size", (decay, state), {"algorithm": "hierarchical"}),
        ("node_size must be >= 1", (decay, state), {"node_size": 0}),
        ("must be float32 or float64", (decay, state.bfloat16()), {}),
        ("Decay must be float32 or float64", (decay.half(), state), {}),
        ("Decay must have the precision of the state", (decay.double(), state), {}),
        ("Decay must be real for a real state", (decay.to(torch.complex64), state), {}),
        ("Decay must fit the state", (torch.zeros(2, 4), state), {}),
        ("Dense must fit the state", Summary(Dense(torch.zeros(2, 4, 4)), state), {}),
        ("FixedDecay must fit the state", Summary(FixedDecay(decay, 4), state), {}),
        ("FixedDecay must be over the 4 tokens", Summary(FixedDecay(torch.zeros(3), 5), state), {}),
        ("must have a transition", Summary(None, state), {}),
        ("initial must be like the state", (decay, state), {"initial": state.double()}),
        ("initial must be like the state", (decay, state), {"initial": state[:1]}),
    ]
    for message, summary, options in bad:
        with pytest.raises(ValueError, match=message):
            scan(summary, ctx=ctx, **options)


@pytest.mark.parametrize("P", [*range(2, 20), 33, 64])
def test_bytes_are_the_closed_forms(P):
    S, A = 1000, 7
    strides = [1 << k for k in range(10)]
    for rank in range(P):
        position = P - 1 - rank
        assert cost.scan_bytes(P, rank, "serial", S, A) == (S if rank < P - 1 else 0)
        assert cost.scan_bytes(P, rank, "gather", S, A) == (P - 1) * (S + A)
        assert cost.scan_backward_bytes(P, rank, "gather", S, A) == (P - 1) * S
        for at, reverse in ((rank, False), (position, True)):
            to = [at + s for s in strides if at >= 1 and at + s < P]
            sends = int(at < P - 1) + len(to)
            sent = cost.scan_bytes(P, rank, "log", S, A, reverse=reverse)
            assert sent // S == sends
            assert sends <= 1 + (P - 2).bit_length()
        for size in (1, 2, 5, P, 2 * P):
            sent = cost.scan_bytes(P, rank, "hierarchical", S, 0, node_size=size)
            final = cost.scan_bytes(P, rank, "hierarchical", S, 0, node_size=size, output_final=True)
            assert final - sent == (S * (P - 1) if rank == P - 1 else 0)
            if size == 1:
                assert sent == cost.scan_bytes(P, rank, "log", S)
            if size >= P:
                assert sent == S * position


def test_auto_follows_the_cost_model():
    assert cost.scan_algorithm(2, 1 << 10) == "gather"
    assert cost.scan_algorithm(8, 1 << 18, 1 << 10) == "gather"
    assert cost.scan_algorithm(64, 1 << 22, 1 << 16) == "log"
    assert cost.scan_algorithm(64, 1 << 22, 1 << 16, node_size=8) == "hierarchical"
    assert cost.scan_algorithm(2, 1 << 20, 1 << 30) == "serial"
    free = cost.Link(0.0, 1.0)
    assert cost.scan_algorithm(8, 100, across=free) == "log"


def _silent_rank(group):
    ctx = SequenceContext.even(group, 8)
    if group.rank() == 1:
        return "left without a word"
    try:
        scan((torch.zeros(1, 1), torch.zeros(1, 1, 4)), ctx=ctx, algorithm="gather")
    except RuntimeError as error:
        return f"raised {type(error).__name__}"
    return "no error"


def test_a_rank_that_leaves_makes_the_other_raise():
    assert run_ranks(2, _silent_rank)[0].startswith("raised")
