"""All ranks in one process: the twins at 16 and 1024 ranks, one order, and errors that say who waits for what."""

import time

import pytest
import torch
import torch.distributed as dist

from seqengine.parallel import comm
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.layout import offsets
from seqengine.parallel.ledger import Ledger
from seqengine.parallel.local_ranks import LocalRanks
from tests.parallel.twin_cases import MANY_RANKS, TWINS, differentiate
from tests.tolerances import assert_close

CUT_16 = [2, 0, 3, 1, 1, 0, 0, 4, 1, 2, 1, 1, 3, 0, 1, 2]


def check_parity(case, cut):
    def on_rank(group, tokens):
        if len(cut) > 100:  # the bounds are known
            return differentiate(case, SequenceContext(group, group.rank(), offsets(cut)))
        return differentiate(case, SequenceContext.create(group, tokens))

    outputs, gradients = case.join(LocalRanks(len(cut)).run(on_rank, cut))
    expected, expected_gradients = differentiate(case, SequenceContext.single(sum(cut)))
    for i, (actual, whole) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(actual, whole, f"output {i}")
    for n, whole in expected_gradients.items():
        assert_close(gradients[n], whole, f"d_{n}")


@pytest.mark.parametrize("name", TWINS)
def test_16_ranks_in_one_process_are_the_whole(name):
    check_parity(TWINS[name], CUT_16)
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", MANY_RANKS)
def test_1024_ranks_with_shards_of_0_to_2_tokens_are_the_whole(name):
    check_parity(MANY_RANKS[name], torch.randint(0, 3, (1024,), generator=torch.Generator().manual_seed(1)).tolist())


def test_one_rank_is_the_plain_kernel():
    check_parity(TWINS["gla log"], [5])


def test_two_runs_are_bitwise_the_same_and_take_turns_in_the_same_order():
    def trace(order):
        def function(group, tokens):
            ctx = SequenceContext.create(group, tokens)
            found = differentiate(TWINS["gla log"], ctx)
            order.append(group.rank())
            return found

        return LocalRanks(16).run(function, CUT_16)

    first, second = [], []
    for (y_a, d_a), (y_b, d_b) in zip(trace(first), trace(second), strict=True):
        assert all(torch.equal(a, b) for a, b in zip((*y_a, *d_a.values()), (*y_b, *d_b.values()), strict=True))
    assert first == second


def test_one_rank_runs_at_a_time():
    running, seen = [], []

    def function(group):
        for _ in range(3):
            running.append(group.rank())
            time.sleep(0.001)
            seen.append(len(running))
            running.pop()
            comm.barrier(group)

    LocalRanks(8).run(function)
    assert seen == [1] * 24


def test_collectives_of_comm():
    def function(group):
        ledger, rank = Ledger(), group.rank()
        x = torch.tensor([float(rank), 1.0])
        total = comm.all_reduce_sum(x.clone(), group, ledger)
        most = comm.all_reduce_max(x.clone(), group)
        objects = comm.gather_objects({"rank": rank}, group)
        everyone, works = comm.start_all_gather(x, group, ledger, "gather")
        sent = x.clone()
        works += comm.start_broadcast(sent, 2, group, ledger, "broadcast")
        for work in works:
            work.wait()
        return (
            total.tolist(),
            most.tolist(),
            [o["rank"] for o in objects],
            torch.stack(everyone)[:, 0].tolist(),
            sent[0],
        )

    for found in LocalRanks(4).run(function):
        assert found == ([6.0, 4.0], [3.0, 1.0], [0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0], 2.0)


def test_grad_mode_and_threads_are_those_of_the_caller():
    before = torch.get_num_threads()
    with torch.no_grad():
        assert LocalRanks(2).run(lambda _: torch.is_grad_enabled()) == [False, False]
    assert LocalRanks(2).run(lambda _: (torch.is_grad_enabled(), torch.get_num_threads())) == [(True, 1)] * 2
    assert torch.get_num_threads() == before


def message(group, sends, receives, size=3):
    comm.send_and_receive(
        [(peer, torch.zeros(size)) for peer in sends],
        [(peer, torch.empty(3)) for peer in receives],
        group,
        Ledger(),
        "halo",
    )


def test_a_send_without_a_receive_is_reported_with_both_ranks():
    with pytest.raises(
        RuntimeError, match=r"no rank can go on.\nrank 0 of 3: halo to rank 1 failed: it waits for rank 1"
    ):
        LocalRanks(3).run(lambda group: message(group, [1], []) if group.rank() == 0 else None)


def test_a_receive_without_a_send_is_reported_with_both_ranks():
    with pytest.raises(RuntimeError, match="rank 2 of 3: halo from rank 0 failed: it waits for a message of rank 0"):
        LocalRanks(3).run(lambda group: message(group, [], [0]) if group.rank() == 2 else None)


def test_a_receive_of_another_size_is_reported_with_both_sizes():
    with pytest.raises(RuntimeError, match="rank 0 sends 4 x float32 and rank 1 receives 3 x float32"):
        LocalRanks(2).run(
            lambda group: message(group, [1], [], size=4) if group.rank() == 0 else message(group, [], [0])
        )


def test_a_message_that_nobody_waits_for_is_reported():
    def function(group):
        if group.rank() == 1:
            comm.start_receive(torch.empty(3), 0, group, Ledger(), "ring")

    with pytest.raises(RuntimeError, match="rank 1 posted a receive from rank 0 of 3 x float32 that was not met"):
        LocalRanks(2).run(function)


def test_a_rank_that_skips_a_collective_is_named():
    with pytest.raises(RuntimeError, match=r"barrier between all ranks failed: it waits for rank 3 in a barrier"):
        LocalRanks(4).run(lambda group: comm.barrier(group) if group.rank() != 3 else None)


def test_different_collectives_are_named():
    def function(group):
        if group.rank() == 1:
            comm.barrier(group)
        else:
            comm.all_reduce_sum(torch.ones(1), group, Ledger())

    with pytest.raises(RuntimeError, match=r"rank 1 enters a barrier where rank 0 is in a all-reduce"):
        LocalRanks(2).run(function)


def test_a_collective_of_other_sizes_is_reported():
    with pytest.raises(RuntimeError, match="all-reduce: rank 0 brings 1 x float32, rank 1 2 x float32"):
        LocalRanks(2).run(lambda group: comm.all_reduce_sum(torch.ones(1 + group.rank()), group, Ledger()))


def test_an_error_of_a_rank_is_raised_as_it_is():
    def function(group):
        comm.barrier(group)
        if group.rank() == 2:
            raise KeyError("here")
        comm.barrier(group)

    with pytest.raises(KeyError, match="here") as caught:
        LocalRanks(4).run(function)
    assert caught.value.__notes__ == ["on rank 2 of 4"]


def test_an_error_in_a_backward_ends_all_ranks():
    def function(group, tokens):
        ctx = SequenceContext.create(group, tokens)
        case = TWINS["modal_conv log"]
        leaves = case.leaves(ctx)
        outputs = case.run(ctx, leaves)
        if group.rank() != 1:
            case.loss(ctx, outputs).backward()

    with pytest.raises(RuntimeError, match=r"no rank can go on.\nrank \d of 4: scan .* it waits for a message of rank"):
        LocalRanks(4).run(function, [2, 2, 2, 2])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size must be >= 1; got 0"):
        LocalRanks(0)
    with pytest.raises(ValueError, match="argument 1 must have 2 items; got 3"):
        LocalRanks(2).run(lambda *_: None, [1, 2], [1, 2, 3])
