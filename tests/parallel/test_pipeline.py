"""pipeline: any function on the whole, its gradients and its order, on several ranks with uneven and empty parts."""

import itertools

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # autograd.grad does so: once here, not on every rank
from torch.utils.checkpoint import checkpoint

from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext, pipeline
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [6, 3], 3: [4, 0, 5], 4: [1, 3, 0, 5], 5: [2, 0, 1, 1, 3], 8: [0, 3, 1, 2, 0, 0, 4, 0]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
B = 5


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed(inputs, state, parameters):
    """Two inputs, one of them of integers; complex states of two shapes; two parameters, one of them unused."""
    (x, index), (a, b), (weight, _) = inputs, state, parameters
    outputs = []
    for t in range(x.shape[1]):
        a = torch.tanh(a.abs()) * a + weight * x[:, t, :, None]
        b = b * a.mean(dim=(1, 2))[:, None] + index[:, t, None]
        outputs.append(a.real.sum(dim=2) + b.imag[:, :1])
    return (torch.stack(outputs, dim=1) if outputs else x), (a, b)


def mixed_arguments(T):
    a, b = (torch.view_as_complex(randn(*s, seed=i)) for i, s in enumerate([(B, 3, 2, 2), (B, 4, 2)]))
    index = torch.arange(B * T).view(B, T) % 3
    weight, unused = torch.view_as_complex(randn(2, 2, seed=5)), randn(3, seed=6)
    return (randn(B, T, 3, seed=4), index), (a, b), (weight, unused)


def mixed_run(ctx, T, needs, micro_batches):
    (x, index), state, parameters = mixed_arguments(T)
    x = ctx.split(x, 1).clone().requires_grad_(needs["x"])
    state = tuple(s.requires_grad_(needs["state"]) for s in state)
    parameters = tuple(p.requires_grad_(needs["parameters"]) for p in parameters)
    y, final = pipeline(
        mixed, (x, ctx.split(index, 1)), state, parameters, ctx=ctx, micro_batches=micro_batches, output_final=True
    )
    loss = (y * ctx.split(randn(B, T, 3, seed=7), 1)).sum()
    if any(needs.values()) or ctx.size > 1:
        (loss + sum((f.real * f.imag).sum() for f in final)).backward()
    real = [torch.view_as_real(f.detach().resolve_conj()) for f in final]
    grads = [x.grad, parameters[0].grad, parameters[1].grad, *(s.grad for s in state)]
    return y.detach(), real, [torch.view_as_real(g) if g is not None and g.is_complex() else g for g in grads]


def _mixed(group, cut, needs, micro_batches):
    ctx = SequenceContext.create(group, cut[group.rank()])
    return mixed_run(ctx, sum(cut), needs[group.rank() % len(needs)], micro_batches)


EVERYTHING = {"x": True, "state": True, "parameters": True}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_any_function_with_complex_states_integers_and_unused_parameters(micro_batches):
    cut = CUTS[4]
    results = run_ranks(4, _mixed, cut, [EVERYTHING], micro_batches)
    y, final, (dx, d_weight, d_unused, *d_state) = mixed_run(
        SequenceContext.single(sum(cut)), sum(cut), EVERYTHING, micro_batches
    )
    assert d_unused is None
    assert_close(torch.cat([r[0] for r in results], dim=1), y, "y")
    assert_close(torch.cat([r[2][0] for r in results], dim=1), dx, "dx")
    assert_close(sum(r[2][1] for r in results), d_weight, "d_weight")
    for _, last, grads in results:
        assert not grads[2].any()
        for actual, expected in zip([*last, *grads[3:]], [*final, *d_state], strict=True):
            assert_close(actual, expected, "final and initial state")


NOTHING = dict.fromkeys(EVERYTHING, False)
SOME = [
    [{**NOTHING, "x": True}, NOTHING],
    [NOTHING, {**NOTHING, "parameters": True}],
    [NOTHING],
    [{**NOTHING, "state": True}],
]


@pytest.mark.parametrize("needs", SOME, ids=["x of even ranks", "parameters of odd ranks", "nothing", "state"])
def test_every_rank_takes_part_in_the_backward_whatever_requires_a_gradient_there(needs):
    cut = CUTS[4]
    _, _, whole = mixed_run(SequenceContext.single(sum(cut)), sum(cut), EVERYTHING, 1)
    bounds = (0, *itertools.accumulate(cut))
    for rank, (_, _, grads) in enumerate(run_ranks(4, _mixed, cut, needs, 2)):
        need = needs[rank % len(needs)]
        assert (grads[0] is not None, grads[1] is not None) == (need["x"], need["parameters"])
        if need["x"]:
            assert_close(grads[0], whole[0][:, bounds[rank] : bounds[rank + 1]], "dx")
        for actual, expected in zip(grads[3:], whole[3:], strict=True):
            assert (actual is not None) == need["state"]
            if need["state"]:
                assert_close(actual, expected, "d_state")


def _adjoint(group, cut):
    """The linear function s' = s + x, y = s: an A whose adjoint the backward has to be."""
    ctx = SequenceContext.create(group, cut[group.rank()])

    def add(inputs, state, parameters):
        (x,), (s,) = inputs, state
        sums = s[:, None] + x.cumsum(dim=1)
        return sums, (s + x.sum(dim=1),)

    x = ctx.split(randn(B, sum(cut), 3, seed=1), 1).clone().requires_grad_()
    s = randn(B, 3, seed=2).requires_grad_()
    y, (final,) = pipeline(add, (x,), (s,), ctx=ctx, micro_batches=2, output_final=True)
    weights, last = ctx.split(randn(B, sum(cut), 3, seed=3), 1), randn(B, 3, seed=4)
    ((y * weights).sum() + (final * last).sum()).backward()
    of_ranks = (y * weights).sum().item(), (x * x.grad).sum().item()
    return of_ranks, ((final * last).sum().item(), (s * s.grad).sum().item())


@ALL
def test_backward_is_the_adjoint(cut):
    results = run_ranks(len(cut), _adjoint, cut)
    forward, backward = (torch.tensor(sum(r[0][i] for r in results) + results[-1][1][i]) for i in (0, 1))
    assert abs(forward - backward) <= 1e-12 * abs(forward)


def _order(group, cut):
    """What each rank does, in its own order: computing, and what its ledger records."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    ctx.ledger().clear()
    events = ctx.ledger().entries

    def note(inputs, state, parameters):
        events.append("again" if torch.is_grad_enabled() else "run")
        return inputs[0] + state[0][:, None], state

    x = torch.zeros(3, ctx.local_tokens, 2, requires_grad=True)
    y, _ = pipeline(note, (x,), (torch.zeros(3, 2),), ctx=ctx, micro_batches=3)
    y.sum().backward()
    return [e if isinstance(e, str) else "send" for e in events]


def test_a_state_leaves_as_soon_as_it_is_known_and_the_backward_runs_again_one_micro_batch_at_a_time():
    first, middle, last = run_ranks(3, _order, [2, 2, 2])
    assert first == ["run", "send"] * 3 + ["again"] * 3
    assert middle == ["run", "send"] * 3 + ["again", "send"] * 3
    assert last == ["run"] * 3 + ["again", "send"] * 3


def cell(inputs, state, parameters):
    """h' = tanh(W h + x)."""
    (x,), (h,), (weight,) = inputs, state, parameters
    outputs = []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ weight + x[:, t])
        outputs.append(h)
    return (torch.stack(outputs, dim=1) if outputs else x), (h,)


def cell_twin(ctx, x):
    zero, weight = torch.zeros(B, 3, dtype=torch.float64), randn(3, 3, seed=2)
    return pipeline(cell, (x,), (zero,), (weight,), ctx=ctx, micro_batches=2)[0]


def _graphs(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    x = ctx.split(randn(B, sum(cut), 3, seed=1), 1).clone().requires_grad_()
    h = cell_twin(ctx, x)
    (first,) = torch.autograd.grad(h.square().sum(), x, retain_graph=True)
    (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    with torch.no_grad():
        plain = cell_twin(ctx, x)
    return torch.equal(first, dx), torch.equal(plain, h), plain.requires_grad, message


def test_the_backward_runs_twice_and_second_derivatives_raise():
    for is_same, is_plain_same, requires_grad, message in run_ranks(2, _graphs, CUTS[2]):
        assert is_same
        assert is_plain_same
        assert not requires_grad
        assert "once_differentiable" in message


def _checkpointed(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for is_checkpointed in (False, True):
        x = ctx.split(randn(B, sum(cut), 3, seed=1), 1).clone().requires_grad_()

        def layer(x):
            return cell_twin(ctx, torch.tanh(x))

        h = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        h.square().sum().backward()
        found.append(x.grad)
    return torch.equal(*found)


def test_under_activation_checkpointing_nothing_hangs_and_gradients_are_the_same():
    checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)  # what it imports, before the fork
    assert all(run_ranks(4, _checkpointed, CUTS[4]))


def _autocast(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    weight, total = randn(3, 3, seed=2, dtype=torch.float32), randn(B, sum(cut), 3, seed=1, dtype=torch.float32)
    found = []
    for enabled, context in itertools.product((False, True), (ctx, SequenceContext.single(sum(cut)))):
        x = context.split(total, 1).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = pipeline(cell, (x,), (torch.zeros(B, 3),), (weight,), ctx=context, micro_batches=2)
        y.square().sum().backward()
        found.append(ctx.split(x.grad, 1) if context is not ctx else x.grad)
    return found


def test_what_runs_again_runs_under_the_autocast_of_the_forward():
    for twin, whole, half_twin, half_whole in run_ranks(2, _autocast, CUTS[2]):
        assert_close(twin, whole)
        assert_close(half_twin, half_whole)
        assert (half_whole - whole).abs().max() > 1e-4


def _sums(group):
    ctx = SequenceContext.even(group, 2)
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    x = torch.tensor([256.0, 1, 1, 1, 1]).view(5, 1)

    def scale(inputs, state, parameters):
        return inputs[0] * parameters[0].float(), state

    pipeline(scale, (x,), (torch.zeros(5),), (weight,), ctx=ctx, micro_batches=5)[0].sum().backward()
    return weight.grad


def test_gradients_of_parameters_are_added_up_in_float32():
    assert all(g.dtype == torch.bfloat16 and g == 260 for g in run_ranks(2, _sums))


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    x, s = torch.zeros(2, 4, 3), torch.zeros(2, 3)
    bad = [
        ("there must be inputs and a state", (), (s,), 1),
        ("there must be inputs and a state", (x,), (), 1),
        ("micro_batches must be >= 1", (x,), (s,), 0),
        ("the state must be floating point", (x,), (s.long(),), 1),
        ("the state must be floating point", (x,), (s.sum(),), 1),
        ("all of the state must be", (x,), (s, s.double()), 1),
        ("all of the state must be", (x,), (s, s[:1]), 1),
        (r"inputs must be \[B, T, ...\] with B = 2", (x, x[:1]), (s,), 1),
        (r"inputs must be \[B, T, ...\] with B = 2", (x[:, 0, 0],), (s,), 1),
        ("rank 0 holds 4 tokens of 9", (x, x[:, :3]), (s,), 1),
    ]
    for message, inputs, state, micro_batches in bad:
        with pytest.raises(ValueError, match=message):
            pipeline(mixed, inputs, state, ctx=ctx, micro_batches=micro_batches)
    for function in (
        lambda x, s, p: (x[0], (s[0].double(),)),
        lambda x, s, p: (x[0], (s[0], s[0])),
        lambda x, s, p: (x[0], (s[0][:1],)),
    ):
        with pytest.raises(ValueError, match="function must return a state like the one it got"):
            pipeline(function, (x,), (s,), ctx=SequenceContext(None, 0, (0, 4, 4)), micro_batches=1)
    with pytest.raises(ValueError, match=r"function must return y \[2, ...\]"):
        pipeline(lambda x, s, p: (x[0][:1], s), (x,), (s,), ctx=SequenceContext(None, 0, (0, 4, 4)), micro_batches=1)


def _failing(group, when):
    ctx = SequenceContext.even(group, 8)
    calls = []

    def function(inputs, state, parameters):
        calls.append(torch.is_grad_enabled())
        if ctx.rank == 1 and calls[-1] == when and calls.count(when) == 2:
            raise ArithmeticError("of this rank alone")
        return inputs[0] + state[0][:, None], (state[0] * 2,)

    try:
        x = torch.zeros(3, ctx.local_tokens, 2, requires_grad=True)
        y, _ = pipeline(function, (x,), (torch.zeros(3, 2),), ctx=ctx, micro_batches=3, output_final=True)
        y.sum().backward()
        SequenceContext.create(group, 1)
    except (ArithmeticError, RuntimeError) as error:
        return type(error).__name__
    return "no error"


@pytest.mark.parametrize("when", [False, True], ids=["forward", "backward"])
def test_a_rank_whose_function_raises_makes_the_others_raise(when):
    names = run_ranks(4, _failing, when)
    assert names[1] == "ArithmeticError"
    assert set(names) <= {"ArithmeticError", "RuntimeError", "DistBackendError", "DistNetworkError"}


def test_bytes_are_the_closed_forms():
    for P in (1, 2, 3, 7, 64):
        bounds = tuple(range(0, 2 * P + 1, 2))
        for rank in range(P):
            assert cost.pipeline_bytes(bounds, rank, 10) == (10 if rank < P - 1 else 0)
            assert cost.pipeline_backward_bytes(bounds, rank, 10) == (10 if rank > 0 else 0)
            all_of_it = 10 if rank < P - 1 else 10 * (P - 1)
            assert cost.pipeline_bytes(bounds, rank, 10, output_final=True) == all_of_it
            assert cost.pipeline_backward_bytes(bounds, P - 1 - rank, 10, initial_gradient=True) == all_of_it
    with_gaps = (0, 0, 3, 3, 5, 5)
    assert [cost.pipeline_bytes(with_gaps, r, 10, output_final=True) for r in range(5)] == [0, 10, 0, 40, 0]
    assert [cost.pipeline_backward_bytes(with_gaps, r, 10) for r in range(5)] == [0, 0, 0, 10, 0]
    assert cost.holders(with_gaps) == [1, 3]
    assert [cost.pipeline_bytes((0, 0, 0), r, 10, output_final=True) for r in range(2)] == [0, 0]
