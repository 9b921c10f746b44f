"""rnn on 1 to 8 ranks is the kernel on the whole: results, every gradient, bytes, messages."""

import itertools

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # autograd.grad does so: once here, not on every rank

from seqengine.kernels import api as kernels
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES
from seqengine.parallel import api as parallel
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [6, 3], 3: [4, 0, 5], 4: [1, 3, 0, 5], 5: [2, 0, 1, 1, 3], 8: [0, 3, 1, 2, 0, 0, 4, 0]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
ODD_CUTS = [[0, 0, 5], [5, 0, 0], [0, 4, 0], [0, 0], [1, 1, 1, 1]]
CELLS = ("slstm", "lstm", "gru", "elman")
B, H, K = 5, 2, 3


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(cell, T, dtype=torch.float64, batch=B):
    """gates, recurrent, initial state: one that a few tokens made, for not every state of an sLSTM is one."""
    gates = randn(batch, T, NUM_GATES[cell], H, K, seed=1, dtype=dtype)
    recurrent = randn(NUM_GATES[cell], H, K, K, seed=2, dtype=dtype)
    past = randn(batch, 2, NUM_GATES[cell], H, K, seed=3, dtype=dtype)
    return gates, recurrent, kernels.rnn(past, recurrent, cell=cell, output_final_state=True)[1]


def loss_of(h, weights, final, cell):
    """The final state counts once: on every rank this loss has the same gradient for it."""
    loss = (h * weights).sum()
    for i, s in enumerate(final or ()):
        loss = loss + (s * randn(*s.shape, seed=20 + i, dtype=s.dtype)).sum()
    return loss


def run(function, shard, cell, T, has_state, output_final, dtype=torch.float64, batch=B):
    """Results and gradients of rnn on a shard of T tokens, or on all of them."""
    gates, recurrent, state = tensors(cell, T, dtype, batch)
    gates, recurrent = shard(gates).clone().requires_grad_(), recurrent.requires_grad_()
    state = tuple(s.detach().requires_grad_() for s in state) if has_state else None
    h, final = function(gates, recurrent, cell=cell, initial_state=state, output_final_state=output_final)
    loss_of(h, shard(randn(batch, T, H, K, seed=9, dtype=dtype)), final, cell).backward()
    return {
        "h": h.detach(),
        "final": [s.detach() for s in final or ()],
        "d_gates": gates.grad,
        "d_recurrent": recurrent.grad,
        "d_initial": [s.grad for s in state or ()],
    }


def on_rank(group, cut, cases, dtype, batch):
    """[(results, (bytes sent), (bytes predicted), messages forward)] of every case."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    ledger, found = ctx.ledger(), []
    for cell, micro_batches, has_state, output_final in cases:
        ledger.clear()
        forward = []

        def twin(*arguments, many=micro_batches, done=forward, **options):
            result = parallel.rnn(*arguments, ctx=ctx, micro_batches=many, **options)
            done += [ledger.sent_bytes(), len(ledger.entries)]
            return result

        values = run(twin, lambda x: ctx.split(x, 1), cell, sum(cut), has_state, output_final, dtype, batch)
        state_bytes = NUM_STATES[cell] * batch * H * K * values["h"].element_size()
        predicted = (
            cost.pipeline_bytes(ctx.bounds, ctx.rank, state_bytes, output_final=output_final),
            cost.pipeline_backward_bytes(ctx.bounds, ctx.rank, state_bytes, initial_gradient=has_state),
        )
        found.append((values, (forward[0], ledger.sent_bytes("pipeline") - forward[0]), predicted, forward[1]))
    return found


def check(cut, cases, dtype=torch.float64, batch=B):
    results = run_ranks(len(cut), on_rank, cut, cases, dtype, batch)
    holders = cost.holders((0, *itertools.accumulate(cut)))
    for i, case in enumerate(cases):
        cell, micro_batches, has_state, output_final = case
        whole = run(kernels.rnn, lambda x: x, cell, sum(cut), has_state, output_final, dtype, batch)
        parts = [r[i][0] for r in results]
        for name in ("h", "d_gates"):
            assert_close(torch.cat([p[name] for p in parts], dim=1), whole[name], f"{case}: {name}")
        assert_close(sum(p["d_recurrent"] for p in parts), whole["d_recurrent"], f"{case}: d_recurrent")
        for rank, part in enumerate(parts):
            for name in ("final", "d_initial"):
                for actual, expected in zip(part[name], whole[name], strict=True):
                    assert_close(actual, expected, f"{case}: {name} on rank {rank}")
            _, sent, predicted, messages = results[rank][i]
            assert sent == predicted, f"{case}: bytes of rank {rank}"
            if len(cut) > 1 and micro_batches is not None and batch > 0:
                is_sender = rank in holders[:-1]
                spread = output_final and len(holders) > 0
                assert messages == is_sender * min(micro_batches, batch) + spread, f"{case}: messages of rank {rank}"


@ALL
def test_twin_of_every_cell_is_the_kernel_with_its_gradients_and_the_bytes_of_the_formula(cut):
    check(cut, [(cell, many, True, True) for cell in CELLS for many in (1, 2, B)])


@ALL
def test_without_states_and_with_more_micro_batches_than_samples(cut):
    check(
        cut,
        [("slstm", 3, False, True), ("gru", 4, True, False), ("lstm", 99, False, False), ("slstm", None, True, True)],
    )


@pytest.mark.parametrize("cut", ODD_CUTS, ids=str)
def test_empty_ranks_at_the_ends_one_holder_no_tokens_and_shards_of_one(cut, poisoned_memory):
    check(cut, [(cell, many, has, has) for cell in ("slstm", "gru") for many in (1, 2) for has in (True, False)])


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_and_a_batch_of_one(batch):
    check(CUTS[4], [("slstm", many, True, True) for many in (1, 2)], batch=batch)


def test_float32():
    check(CUTS[4], [(cell, 2, True, True) for cell in CELLS], torch.float32)


def _half(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    gates, recurrent, state = tensors("slstm", sum(cut), torch.bfloat16)
    whole, last = kernels.rnn(gates, recurrent, cell="slstm", initial_state=state, output_final_state=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h, final = parallel.rnn(
            ctx.split(gates, 1), recurrent, ctx=ctx, cell="slstm", initial_state=state, output_final_state=True
        )
    is_same = all(torch.equal(a, b) for a, b in zip(final, last, strict=True))
    return torch.equal(h, ctx.split(whole, 1)), is_same, final[0].dtype, h.requires_grad


def test_bfloat16_passes_the_state_on_in_float32():
    assert all(r == (True, True, torch.float32, False) for r in run_ranks(3, _half, CUTS[3]))


def _twice(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])

    def twin(*arguments, **options):
        return parallel.rnn(*arguments, ctx=ctx, micro_batches=2, **options)

    first, again = (run(twin, lambda x: ctx.split(x, 1), "slstm", sum(cut), True, True) for _ in range(2))
    same = [torch.equal(first[n], again[n]) for n in ("h", "d_gates", "d_recurrent")]
    return same + [torch.equal(a, b) for n in ("final", "d_initial") for a, b in zip(first[n], again[n], strict=True)]


def test_two_runs_are_bitwise_the_same():
    assert all(all(r) for r in run_ranks(4, _twice, CUTS[4]))


def _streamed(group, cuts):
    """The sequence in two pieces, each of them on all ranks, the state handed on."""
    piece = [SequenceContext.create(group, cut[group.rank()]) for cut in cuts]
    lengths = [sum(cut) for cut in cuts]
    gates, recurrent, _ = tensors("slstm", sum(lengths))
    weights = randn(B, sum(lengths), H, K, seed=9)
    mine = [c.split(g, 1).clone().requires_grad_() for c, g in zip(piece, gates.split(lengths, 1), strict=True)]
    recurrent.requires_grad_()
    loss, state = 0, None
    for ctx, x, w in zip(piece, mine, weights.split(lengths, 1), strict=True):
        h, state = parallel.rnn(
            x, recurrent, ctx=ctx, cell="slstm", initial_state=state, output_final_state=True, micro_batches=2
        )
        loss = loss + (h * ctx.split(w, 1)).sum()
    loss_of(h[:, :0], weights[:, :0], state, "slstm").backward(retain_graph=True)
    loss.backward()
    return [x.grad for x in mine], recurrent.grad


def test_pieces_one_after_the_other_are_the_whole_gradients_through_the_states_included():
    cuts = [[3, 1, 2], [0, 2, 3]]
    results = run_ranks(3, _streamed, cuts)
    whole = run(kernels.rnn, lambda x: x, "slstm", 11, False, True)
    actual = torch.cat([torch.cat([r[0][i] for r in results], dim=1) for i in (0, 1)], dim=1)
    assert_close(actual, whole["d_gates"], "d_gates")
    assert_close(sum(r[1] for r in results), whole["d_recurrent"], "d_recurrent")


def _state_asked_for_on_one_rank(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    gates, recurrent, state = tensors("gru", sum(cut))
    state = tuple(s.requires_grad_(ctx.rank == 1) for s in state)
    h, _ = parallel.rnn(ctx.split(gates, 1), recurrent, ctx=ctx, cell="gru", initial_state=state, micro_batches=2)
    h.sum().backward()
    return state[0].grad


def test_a_gradient_of_the_initial_state_that_one_rank_wants_is_there():
    cut = CUTS[3]
    gates, recurrent, (state,) = tensors("gru", sum(cut))
    kernels.rnn(gates, recurrent, cell="gru", initial_state=(state.requires_grad_(),))[0].sum().backward()
    found = run_ranks(3, _state_asked_for_on_one_rank, cut)
    assert found[0] is None
    assert found[2] is None
    assert_close(found[1], state.grad)


def test_bad_arguments_of_rnn_raise_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))
    gates, recurrent, state = tensors("lstm", 4)
    bad = [
        ("cell must be", gates, recurrent, {"cell": "rnn"}),
        ("gates must be", gates[0, 0, 0, 0], recurrent, {}),
        ("gates must be", gates, recurrent, {"cell": "gru"}),
        ("recurrent must be", gates, recurrent[:, :1], {}),
        ("backend must be", gates, recurrent, {"backend": "cuda"}),
        ("backend 'triton'", gates, recurrent, {"backend": "triton"}),
        ("initial_state must be a tuple of 2", gates, recurrent, {"initial_state": state[:1]}),
        ("initial_state must be a tuple of 2", gates, recurrent, {"initial_state": torch.stack(state)}),
        (r"initial_state\[0\] must be", gates, recurrent, {"initial_state": tuple(s[:1] for s in state)}),
        ("rank 0 holds 4 tokens of 9", gates[:, :3], recurrent, {}),
        ("micro_batches must be >= 1", gates, recurrent, {"micro_batches": 0}),
    ]
    for message, x, weights, options in bad:
        with pytest.raises(ValueError, match=message):
            parallel.rnn(x, weights, ctx=ctx, **{"cell": "lstm", **options})


def _silent_rank(group):
    ctx = SequenceContext.even(group, 8)
    if group.rank() == 1:
        return "left without a word"
    try:
        parallel.rnn(
            torch.zeros(1, 4, 1, 1, 2), torch.zeros(1, 1, 2, 2), ctx=ctx, cell="elman", output_final_state=True
        )
    except RuntimeError as error:
        return f"raised {type(error).__name__}"
    return "no error"


def test_a_rank_that_leaves_makes_the_other_raise():
    assert run_ranks(2, _silent_rank)[0].startswith("raised")


def test_micro_batches_follow_the_cost_model():
    assert cost.rnn_micro_batches(8, 0, 100, 1 << 16, 0, "cpu") == 1
    assert cost.rnn_micro_batches(8, 4, 4096, 4 * 4 * 64 * 64, 1 << 12, "cuda") == 1
    assert cost.rnn_micro_batches(1, 64, 4096, 4 * 4 * 256 * 256, 1 << 18, "cpu") == 1
    many = cost.rnn_micro_batches(8, 64, 4096, 4 * 4 * 256 * 256, 1 << 18, "cpu")
    assert 4 < many <= 64
    assert cost.pipeline_seconds(8, 4, 1.0, 0.5) == 16.5
