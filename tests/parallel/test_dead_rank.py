"""A rank that dies, or does not take part, makes all others raise in time, with an error that names rank and operation."""

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from seqengine.parallel import api as parallel
from seqengine.parallel import comm
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.ledger import Ledger
from tests.parallel.twin_cases import randn
from tests.ranks import run_ranks, run_ranks_to_their_end

TIMEOUT = 6
MARGIN = 40
"""Seconds beyond the timeout, for machines that do much else."""


def step(ctx, parameters, die=lambda where: None):
    """One training step through a convolution, linear attention, attention and the loss."""
    w, taps, head = parameters
    x = ctx.split(randn(1, 8, ctx.total_tokens, seed=1), 2)
    labels = ctx.split(torch.arange(ctx.total_tokens) % 5, 0)
    x, _ = parallel.short_conv(x, taps, ctx=ctx, activation="silu")
    tokens = torch.einsum("bdt,de->bte", x, w)
    q, k, v, g = tokens.unflatten(2, (4, 2, -1)).unbind(2)
    o, _ = parallel.gla(q, k, v, -g.abs(), ctx=ctx, algorithm="log")
    die("in the forward")
    o = parallel.attention(o, k, v, ctx=ctx, algorithm="ring", balance=False)
    nats, count = parallel.linear_cross_entropy(o.flatten(2)[0], head, labels, ctx=ctx)
    if nats.grad_fn is not None:
        o.register_hook(lambda _: die("in the backward"))
    (nats / count).backward()
    for p in parameters:
        comm.all_reduce_sum(p.grad, ctx.group, ctx.ledger())


def train(group, where):
    ctx = SequenceContext.create(group, [5, 3, 4][group.rank()])
    parameters = [randn(*s, seed=i).requires_grad_() for i, s in enumerate([(8, 16), (8, 3), (5, 4)])]
    step(ctx, parameters)  # a good one first

    def die(here):
        if group.rank() == 1 and here == where:
            os.kill(os.getpid(), signal.SIGKILL)

    step(ctx, parameters, die)
    return "went on"


def outcomes_in_time(function, *arguments):
    start = time.monotonic()
    outcomes = run_ranks_to_their_end(3, function, *arguments, timeout_seconds=TIMEOUT, limit_seconds=TIMEOUT + MARGIN)
    assert time.monotonic() - start < TIMEOUT + MARGIN
    return outcomes


def assert_named(outcome, rank):
    """An error of comm.py, chained to the one of torch."""
    assert outcome.error is not None, outcome
    assert outcome.exit_code == 1
    assert f"rank {rank} of 3: " in outcome.error
    assert "The last exchanges of this rank: " in outcome.error
    assert "The above exception was the direct cause of the following exception" in outcome.error


@pytest.mark.parametrize("where", ["in the forward", "in the backward"])
def test_a_killed_rank_in_a_training_step_ends_the_others(where):
    outcomes = outcomes_in_time(train, where)
    assert outcomes[1].exit_code == -signal.SIGKILL
    for rank in (0, 2):
        assert_named(outcomes[rank], rank)


def call(operation, group, ledger):
    x = torch.ones(3)
    if operation == "all_to_all":
        comm.all_to_all([x] * 3, [x.shape] * 3, group, ledger, "transpose")
    elif operation == "all_gather":
        comm.gather_integers(1, group, ledger)
    elif operation == "all_reduce":
        comm.all_reduce_sum(x, group, ledger)
    elif operation == "broadcast":
        for work in comm.start_broadcast(x, 1, group, ledger, "scan"):
            work.wait()
    elif operation == "send":
        comm.send_and_receive([(1, x)], [], group, ledger, "halo")
    elif operation == "receive":
        comm.send_and_receive([], [(1, x)], group, ledger, "ring")
    elif operation == "barrier":
        comm.barrier(group)
    elif operation == "objects":
        comm.gather_objects("x", group)


OPERATIONS = {
    "all_to_all": "transpose between all ranks",
    "all_gather": "gather_integers between all ranks",
    "all_reduce": "all_reduce between all ranks",
    "broadcast": "scan from rank 1",
    "send": "halo to rank 1",
    "receive": "ring from rank 1",
    "barrier": "barrier between all ranks",
    "objects": "gather_objects between all ranks",
}


def skip(world):
    """Rank 1 leaves out one operation of each group; all groups at the same time, for each takes its timeout."""
    groups = {name: dist.new_group(timeout=timedelta(seconds=TIMEOUT)) for name in OPERATIONS}
    ledgers, found = {name: Ledger() for name in groups}, {}
    for name, group in groups.items():
        comm.all_reduce_sum(torch.ones(3), group, ledgers[name])

    def attempt(name):
        start = time.monotonic()
        try:
            call(name, groups[name], ledgers[name])
        except RuntimeError as error:
            found[name] = str(error), time.monotonic() - start, type(error.__cause__).__name__

    threads = [threading.Thread(target=attempt, args=(name,)) for name in groups if world.rank() != 1]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    comm.barrier(world)
    return found


def test_a_skipped_operation_makes_the_others_raise_within_the_timeout():
    results = run_ranks(3, skip)
    for rank in (0, 2):
        assert set(results[rank]) == set(OPERATIONS)
        for name, (message, seconds, cause) in results[rank].items():
            assert message.startswith(f"rank {rank} of 3: {OPERATIONS[name]} failed: "), message
            assert seconds < 2 * TIMEOUT
            assert cause in ("RuntimeError", "DistBackendError")
            has_ledger = name not in ("barrier", "objects")
            assert ("The last exchanges of this rank: all_reduce (16 bytes to 2)" in message) == has_ledger
