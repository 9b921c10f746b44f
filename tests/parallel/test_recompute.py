"""Checkpointed blocks send nothing again: same bytes, same gradients bit by bit, whatever runs between and around them."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

from seqengine.parallel.api import SequenceContext, halo, transpose
from seqengine.parallel.local_ranks import LocalRanks
from seqengine.parallel.recompute import checkpoint
from tests.parallel.twin_cases import EXCHANGES, TWINS, differentiate, randn
from tests.ranks import run_ranks

CUTS = {1: [9], 2: [6, 3], 3: [4, 0, 5], 5: [2, 0, 1, 1, 3]}


def bytes_and_result(case, ctx, run=None):
    """(entries of the ledger, outputs and gradients) of one forward and backward."""
    ctx.ledger().clear()
    outputs, gradients = differentiate(case, ctx, run)
    return list(ctx.ledger().entries), [*outputs, *gradients.values()]


def checkpointed(case, **options):
    def run(ctx, leaves):
        names = list(leaves)

        def block(*tensors):
            return case.run(ctx, dict(zip(names, tensors, strict=True)))

        return checkpoint(block, *leaves.values(), ctx=ctx, **options)

    return run


def compare_every_exchange(group, cut):
    """{name: what differs between the plain run and the checkpointed ones}, and sums for the bookkeeping of what is kept."""
    differing, kept = {}, {}
    ctx = SequenceContext.create(group, cut[group.rank()])
    for name, case in EXCHANGES.items():
        entries, expected = bytes_and_result(case, ctx)
        forward = checkpointed(case)
        for how, options in {"kept": {}, "offloaded": {"offload": True}}.items():
            again, actual = bytes_and_result(case, ctx, checkpointed(case, **options))
            if again != entries:
                differing[f"{name} {how}"] = "other calls", entries, again
            if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
                differing[f"{name} {how}"] = "other numbers"
        ctx.ledger().clear()
        outputs = forward(ctx, case.leaves(ctx))
        kept[name] = ctx.ledger().sent_bytes(), ctx.ledger().kept_bytes, "all_reduce" in ctx.ledger().counts()
        del outputs
        for _ in range(3):  # a graph that is let go may let another one go
            if ctx.ledger().kept_bytes:
                gc.collect()
        if ctx.ledger().kept_bytes:
            differing[name] = "kept for ever"
    return differing, kept


@pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
def test_gradients_and_bytes_of_every_exchange_are_those_without_a_checkpoint(cut):
    check_every_exchange(LocalRanks(len(cut)).run(compare_every_exchange, [cut] * len(cut)))


def test_the_same_over_processes():
    check_every_exchange(run_ranks(2, compare_every_exchange, CUTS[2]))


def check_every_exchange(results):
    assert [differing for differing, _ in results] == [{}] * len(results)
    for name in EXCHANGES:  # what is kept is what was sent, counted where it arrives
        ranks = [kept[name] for _, kept in results]
        if not any(reduces for *_, reduces in ranks):
            kept, sent = (sum(r[i] for r in ranks) for i in (1, 0))
            assert kept <= sent, name
            assert kept == sent or len(ranks) > 3, name  # a rank without heads has nothing to run again


def test_without_a_tape_the_recompute_would_send_again():
    def on_rank(group, tokens):
        ctx = SequenceContext.create(group, tokens)
        case = TWINS["long_conv transpose"]
        names = list(case.leaves(ctx))

        def run(ctx, leaves):
            return torch_checkpoint(
                lambda *t: case.run(ctx, dict(zip(names, t, strict=True))), *leaves.values(), use_reentrant=False
            )

        return len(bytes_and_result(case, ctx)[0]), len(bytes_and_result(case, ctx, run)[0])

    assert all(again > once for once, again in LocalRanks(3).run(on_rank, CUTS[3]))


class Stack(nn.Module):
    """Blocks of several exchanges, the second of which checkpoints parts of itself."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.weights = nn.ParameterList(randn(4, 4, seed=i) for i in range(4))
        self.taps = nn.ParameterList(randn(4, 3, seed=9 + i) for i in range(4))

    def layer(self, i, x, ctx):
        x = torch.tanh(torch.einsum("dc,bct->bdt", self.weights[i], x))
        columns = transpose(x, ctx=ctx, scatter=1, gather=2)
        x = transpose(torch.sin(columns).cumsum(dim=2), ctx=ctx, scatter=2, gather=1)
        wide = halo(x, 2, ctx=ctx, dim=2)
        taps = self.taps[i]
        return sum(taps[:, None, s].mT[..., None] * wide[..., s : s + x.shape[2]] for s in range(3)) * x

    def pair(self, i, x, ctx):
        inner = checkpoint if self.how == "nested" else plain
        for j in (i, i + 1):
            x = inner(self.layer, j, x, ctx, ctx=ctx)
        return torch.sigmoid(x)

    def forward(self, x, ctx):
        outer = plain if self.how == "plain" else checkpoint
        x = outer(self.pair, 0, x, ctx, ctx=ctx)
        return outer(self.pair, 2, x, ctx, ctx=ctx)


def plain(function, *arguments, ctx):
    return function(*arguments)


def stack_run(group, tokens, how, backwards, early_stop):
    ctx = SequenceContext.create(group, tokens)
    ctx.ledger().clear()
    model = Stack(how).double()
    x = ctx.split(randn(2, 4, ctx.total_tokens, seed=77), 2).clone().requires_grad_()
    with set_checkpoint_early_stop(early_stop):
        y = model(x, ctx)
        held = ctx.ledger().kept_bytes
        for i in range(backwards):
            (y * y).sum().backward(retain_graph=i + 1 < backwards)
    freed = ctx.ledger().kept_bytes
    return list(ctx.ledger().entries), [y.detach(), x.grad, *(p.grad for p in model.parameters())], held, freed


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("backwards", [1, 3])
@pytest.mark.parametrize("how", ["blocks", "nested"])
def test_blocks_in_a_row_and_in_one_another_with_several_backwards(how, backwards, early_stop):
    def run(how):
        return LocalRanks(3).run(stack_run, [2, 1, 4], [how] * 3, [backwards] * 3, [early_stop] * 3)

    for (sent, expected, *_), (again, actual, held, freed) in zip(run("plain"), run(how), strict=True):
        assert again == sent
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert held > 0
        assert freed == 0


def test_two_contexts_in_one_block():
    def on_rank(group, tokens, other_tokens, wraps):
        one, two = SequenceContext.create(group, tokens), SequenceContext.create(group, other_tokens)
        x, z = (c.split(randn(2, 6, seed=5 + i), 1).clone().requires_grad_() for i, c in enumerate((one, two)))

        def block(x, z):
            a = halo(torch.sin(x), 2, ctx=one, dim=1)
            b = halo(torch.sin(z), 1, ctx=two, dim=1)
            return halo(torch.tanh(x * a[:, 2:]), 1, ctx=one, dim=1).exp().sum() * b.cos().sum()

        for ledger in (one.ledger(), two.ledger()):
            ledger.clear()
        y = checkpoint(block, x, z, ctx=(one, two)) if wraps else block(x, z)
        y.backward()
        return [x.grad, z.grad], [one.ledger().entries, two.ledger().entries]

    runs = [LocalRanks(3).run(on_rank, [2, 2, 2], [1, 5, 0], [wraps] * 3) for wraps in (False, True)]
    for (expected, sent), (actual, again) in zip(*runs, strict=True):
        assert again == sent
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_without_gradients_nothing_is_kept():
    def on_rank(group, tokens):
        ctx = SequenceContext.create(group, tokens)
        with torch.no_grad():
            checkpoint(lambda x: halo(x, 2, ctx=ctx, dim=0), torch.ones(tokens), ctx=ctx)
        return ctx.ledger().kept_bytes, ctx.ledger().tapes

    assert LocalRanks(2).run(on_rank, [3, 3]) == [(0, [])] * 2


def changing(second):
    """A block whose second run exchanges something else."""

    def on_rank(group, tokens):
        ctx = SequenceContext.create(group, tokens)
        runs = []

        def block(x):
            runs.append(1)
            if len(runs) == 1:
                return torch.sin(halo(torch.sin(x), 2, ctx=ctx, dim=0)[-3:]).sum()
            return second(torch.sin(x), ctx)

        x = torch.ones(tokens, requires_grad=True)
        checkpoint(block, x, ctx=ctx).backward()

    return on_rank


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            lambda x, ctx: torch.sin(halo(x, 1, ctx=ctx, dim=0)[-3:]).sum(),
            r"asks for halo .*\(1,\).* where exchange 0 .*\(2,\)",
        ),
        (
            lambda x, ctx: torch.sin(halo(x.double(), 2, ctx=ctx, dim=0)[-3:].float()).sum(),
            "asks for halo .*float64.* where .*float32",
        ),
        (
            lambda x, ctx: torch.sin(ctx.join(x, 0)[-3:]).sum(),
            r"asks for join .* where exchange 0 of its first run was halo",
        ),
        (
            lambda x, ctx: halo(halo(x, 2, ctx=ctx, dim=0)[-3:], 2, ctx=ctx, dim=0)[-3:].sin().sum(),
            "asks for halo .* where its first run had no further exchange",
        ),
    ],
    ids=["shape", "dtype", "operation", "more"],
)
def test_a_second_run_that_exchanges_something_else_raises(second, message):
    with pytest.raises(RuntimeError, match=message):
        LocalRanks(2).run(changing(second), [3, 3])


def test_an_exchange_that_was_never_waited_for_raises():
    from seqengine.parallel import comm

    def on_rank(group):
        ctx = SequenceContext.even(group, 4)

        def block(x):
            comm.start_all_gather(x.detach(), group, ctx.ledger(), "gather")
            return torch.sin(x).sum()

        checkpoint(block, torch.ones(2, requires_grad=True), ctx=ctx).backward()

    with pytest.raises(RuntimeError, match=r"the block started gather .* and never waited for it"):
        LocalRanks(2).run(on_rank)


def test_random_numbers_are_the_same_again():
    def on_rank(group, tokens):
        ctx = SequenceContext.create(group, tokens)
        x = torch.ones(tokens, dtype=torch.float64, requires_grad=True)

        def block(x):
            return halo(torch.nn.functional.dropout(torch.sin(x), 0.5), 2, ctx=ctx, dim=0)

        y = checkpoint(block, x, ctx=ctx)
        torch.rand(3)
        y.sum().backward()
        own = y[2:].detach() != 0
        return bool(((x.grad != 0) >= own).all())

    assert LocalRanks(2).run(on_rank, [8, 8]) == [True, True]
