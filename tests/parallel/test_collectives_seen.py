"""Whatever torch.distributed is told to send on this rank, the ledger knows: counted below every Python call."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from seqengine.parallel import comm
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.recompute import checkpoint
from tests.parallel.twin_cases import EXCHANGES, TWINS, differentiate
from tests.ranks import run_ranks

CUT = [3, 0, 4]


class Seen(TorchDispatchMode):
    """Bytes that leave this rank, by c10d operator, from the operators' own arguments."""

    def __init__(self, group):
        super().__init__()
        self.rank, self.peers = group.rank(), group.size() - 1
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] += 1
            self.bytes[name] += self.sent(name, args)
        return func(*args, **(kwargs or {}))

    def sent(self, name, args):
        if name == "alltoall_base_":
            _, outgoing, _, _, sizes = args[:5]
            return sum(n for j, n in enumerate(sizes) if j != self.rank) * outgoing.element_size()
        if name == "send":
            return sum(t.nbytes for t in args[0])
        if name == "recv_":
            return 0
        if name == "allgather_":
            return sum(t.nbytes for t in args[1]) * self.peers
        if name == "broadcast_":
            return sum(t.nbytes for t in args[0]) * self.peers if args[2] == self.rank else 0
        if name == "allreduce_":
            return sum(2 * self.peers * t.nbytes // (self.peers + 1) for t in args[0])
        raise AssertionError(f"an operator that comm.py does not use: {name}")

    def total(self):
        return sum(self.bytes.values())


def checkpointed(case):
    def run(ctx, leaves):
        return checkpoint(
            lambda *t: case.run(ctx, dict(zip(leaves, t, strict=True))), *leaves.values(), ctx=ctx
        )  # fmt: skip

    return run


def count_every_exchange(group, cut):
    """{name: (seen, ledger)} with and without a checkpoint, the collective that makes the context included."""
    found, names = {}, Counter()
    for name, case in EXCHANGES.items():
        for how, run in {"": None, " checkpointed": checkpointed(case)}.items():
            with Seen(group) as seen:
                ctx = SequenceContext.create(group, cut[group.rank()])
                differentiate(case, ctx, run)
            found[name + how] = seen.total(), ctx.ledger().sent_bytes()
            names += seen.calls
    return found, set(names)


def test_every_collective_of_every_exchange_is_in_the_ledger():
    results = run_ranks(len(CUT), count_every_exchange, CUT)
    for found, names in results:
        assert {n: pair for n, pair in found.items() if pair[0] != pair[1]} == {}
        assert names >= {"alltoall_base_", "send", "recv_", "allgather_", "broadcast_", "allreduce_"}
    for name in EXCHANGES:  # and something was sent at all
        assert sum(found[name][0] for found, _ in results) > 8 * len(CUT) * (len(CUT) - 1), name


def bypass(group, cut, how):
    """A twin that also sends by itself."""
    with Seen(group) as seen:
        ctx = SequenceContext.create(group, cut[group.rank()])
        differentiate(TWINS["gla log"], ctx)
        x = torch.ones(5)
        if how == "all_reduce":
            dist.all_reduce(x, group=group)
        elif how == "send":
            peer, to = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
            works = [dist.isend(x, group=group, group_dst=peer), dist.irecv(x.clone(), group=group, group_src=to)]
            for work in works:
                work.wait()
        elif how == "all_to_all":
            dist.all_to_all_single(torch.empty(3), torch.ones(3), [1] * 3, [1] * 3, group=group)
        else:
            comm.all_reduce_sum(x, group)  # without a ledger
    return seen.total() - ctx.ledger().sent_bytes()


@pytest.mark.parametrize("how", ["all_reduce", "send", "all_to_all", "no ledger"])
def test_a_collective_that_bypasses_the_ledger_is_seen(how):
    assert all(difference > 0 for difference in run_ranks(3, bypass, CUT, how))
