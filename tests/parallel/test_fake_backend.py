"""4096 ranks, of which one runs: every twin, forward and backward, sends what the formula says; and all sends have a receive.

The fake backend sends nothing and leaves what is received as it was, so that results mean nothing here, only bytes.
"""

import random
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from seqengine.parallel import api as parallel
from seqengine.parallel import attention_cost, conv_cost, cost
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.attention_plan import Mask
from seqengine.parallel.exchange.ring import Route
from seqengine.parallel.layout import halo_sources, halo_targets, offsets
from tests.parallel.twin_cases import SAME, SUMMED, TWINS, _boundaries

P = 4096
RING_P = 256
"""Of rings: that many steps run, and the routes of all ranks are looked at."""
GENERATOR = random.Random(7)
BOUNDS = offsets([GENERATOR.choice([0, 1, 1, 2, 3]) for _ in range(P)])
RING_BOUNDS = BOUNDS[: RING_P + 1]
DOUBLE = 8


@pytest.fixture
def fake_group():
    """Makes the group of one rank."""
    made = []

    def make(rank, size):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        made.append(rank)
        return dist.group.WORLD

    assert not dist.is_initialized()
    yield make
    if made:
        dist.destroy_process_group()


class Silent:
    """A group that sends nothing, for what the fake backend refuses: an all-to-all of a rank that gets but does not send."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size

    def _start(self, *_):
        return []

    start_all_to_all = start_messages = start_all_gather = start_broadcast = start_all_reduce = _start


def all_reduce(numbers):
    return 2 * (P - 1) * numbers * DOUBLE // P


def conv(taps):
    def predict(bounds, rank):
        row = 2 * 4 * DOUBLE
        needed = conv_cost.windows(bounds, taps - 1)
        forward = conv_cost.window_bytes(bounds, needed, rank, row)
        final = conv_cost.final_state_bytes(bounds, rank, (0, bounds[-1]), taps - 1, row)
        return forward + final, conv_cost.window_backward_bytes(bounds, needed, rank, row) + all_reduce(8 * (taps - 1))

    return predict


def by_channels(bounds, rank):
    taps = bounds[-1]
    sent = conv_cost.long_conv_bytes(bounds, rank, 4, 2 * DOUBLE)
    final = conv_cost.final_state_bytes(bounds, rank, (0, bounds[-1]), taps - 1, 2 * 4 * DOUBLE)
    return sent + final, sent + all_reduce(8 * (taps - 1))


def scanned(algorithm, state, transition=0, node_size=None):
    def predict(bounds, rank):
        shared = (P, rank, algorithm, state * DOUBLE, transition * DOUBLE)
        forward = cost.scan_bytes(*shared, output_final=True, node_size=node_size)
        return forward, cost.scan_backward_bytes(*shared, initial_gradient=True, node_size=node_size)

    return predict


def packed(bounds, rank):
    documents = _boundaries(bounds[-1]).tolist()
    shared = (bounds, rank, "log", 24 * DOUBLE, 8 * DOUBLE)
    return (
        cost.gla_bytes(*shared, output_final=True, documents=documents),
        cost.gla_backward_bytes(*shared, initial_gradient=True, documents=documents),
    )


def piped(bounds, rank):
    state = 4 * 3 * 2 * 3 * DOUBLE
    return (
        cost.pipeline_bytes(bounds, rank, state, output_final=True),
        cost.pipeline_backward_bytes(bounds, rank, state, initial_gradient=True),
    )


def attended(algorithm, balance=False, window=None):
    def predict(bounds, rank):
        mask, sizes = Mask(True, window, (0, bounds[-1])), attention_cost.Sizes(2, 4, 2, 3, 3, DOUBLE, DOUBLE)
        plan = attention_cost.choose(bounds, rank, mask, sizes, "cpu", algorithm, None, balance)
        return attention_cost.attention_bytes(plan, sizes), attention_cost.attention_backward_bytes(plan, sizes)

    return predict


def published_ring(bounds, rank):
    route, row = Route.of(range(RING_P), [b - a for a, b in pairwise(bounds)], None), 2 * 4 * 3 * DOUBLE
    how = (route.sizes, route.spans, rank)
    return cost.ring_bytes(*how, 2 * row), cost.ring_backward_bytes(*how, 2 * row, 2 * row)


PREDICTED = {
    "short_conv": conv(4),
    "long_conv halo": conv(5),
    "modal_conv gather": scanned("gather", 24),
    "modal_conv log": scanned("log", 24),
    "modal_conv serial": scanned("serial", 24),
    "modal_conv hierarchical": scanned("hierarchical", 24, node_size=2),
    "gla gather": scanned("gather", 48, 16),
    "gla log": scanned("log", 48, 16),
    "gla packed": packed,
    "simple_gla": scanned("serial", 48, 4),
    "delta_rule gather": scanned("gather", 48, 64),
    "delta_rule log": scanned("log", 48, 64),
    "rnn": piped,
    "attention ring": attended("ring"),
    "attention balanced ring": attended("ring", balance=True),
    "attention ulysses": attended("ulysses"),
    "attention gather": attended("gather", window=4),
    "ring_self_attention": published_ring,
    "linformer": lambda bounds, rank: (all_reduce(96), all_reduce(96)),
    "linear_cross_entropy": lambda bounds, rank: (all_reduce(2), 0),
    "long_conv transpose": by_channels,
}
RINGS = ("attention ring", "attention balanced ring", "ring_self_attention")
ONE_SIDED = ("short_conv", "long_conv halo", "long_conv transpose", "gla packed", "attention ulysses")
CASES = [(name, place) for name in TWINS for place in ("first", "second", "middle", "last")]


def test_every_twin_has_a_formula():
    assert set(PREDICTED) == set(TWINS)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_bytes_are_those_of_the_formula(name, place, fake_group):
    size, bounds = (RING_P, RING_BOUNDS) if name in RINGS else (P, BOUNDS)
    rank = {"first": 0, "second": 1, "middle": size // 2, "last": size - 1}[place]
    group = Silent(rank, size) if name in ONE_SIDED else fake_group(rank, size)
    case, ctx, leaves = TWINS[name], SequenceContext(group, rank, bounds), {}
    for n, shape in case.shapes(ctx.total_tokens).items():  # the part alone: the whole would be large
        where, shape = case.places[n], list(shape)
        if where not in (SUMMED, SAME):
            shape[where] = ctx.local_tokens
        leaves[n] = torch.full(shape, -0.5, dtype=torch.float64, requires_grad=True)
    outputs = case.run(ctx, leaves)
    forward = ctx.ledger().sent_bytes()
    sum(x.sum() for x in outputs).backward()
    assert (forward, ctx.ledger().sent_bytes() - forward) == PREDICTED[name](ctx.bounds, ctx.rank)


ONE_LAYER = {"tokens": 1 << 20, "channels": 4096, "ranks": 64}


@pytest.mark.parametrize("rank", [0, 1, 31, 63])
def test_a_modal_scan_of_a_million_tokens_sends_less_than_2_mb_a_rank(rank, fake_group):
    ctx = SequenceContext.even(fake_group(rank, ONE_LAYER["ranks"]), ONE_LAYER["tokens"])
    D = ONE_LAYER["channels"]
    with FakeTensorMode():
        u = torch.zeros(1, D, ctx.local_tokens, dtype=torch.bfloat16)
        parallel.modal_conv(u, torch.zeros(D, 16), torch.zeros(D, 16), ctx=ctx)
    algorithm = cost.scan_algorithm(ctx.size, D * 16 * 4)
    assert ctx.ledger().sent_bytes() == cost.scan_bytes(ctx.size, rank, algorithm, D * 16 * 4)
    assert ctx.ledger().sent_bytes() <= 2_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [0, 63])
def test_a_transposed_convolution_of_a_million_tokens_sends_two_tensors(rank, dtype, fake_group):
    (T, D, ranks), bits = ONE_LAYER.values(), dtype.itemsize
    ctx = SequenceContext.even(fake_group(rank, ranks), T)
    with FakeTensorMode():
        u = torch.zeros(1, D, ctx.local_tokens, dtype=dtype)
        parallel.long_conv(u, torch.zeros(D, T), ctx=ctx, algorithm="transpose")
    S = ctx.local_tokens
    assert ctx.ledger().sent_bytes() == 2 * (ranks - 1) * S * D * bits // ranks
    assert ctx.ledger().sent_bytes() == conv_cost.long_conv_bytes(ctx.bounds, rank, D, bits)


@pytest.mark.parametrize("left", [1, 3, 50, 10**6])
def test_halo_sends_and_receives_of_all_ranks_match(left):
    bounds = BOUNDS if left < 10**6 else BOUNDS[:257]
    ranks = range(len(bounds) - 1)
    sent = {(r, *target) for r in ranks for target in halo_targets(bounds, r, left)}
    received = {(owner, r, start, stop) for r in ranks for owner, start, stop in halo_sources(bounds, r, left)}
    assert sent == received
    assert sum(stop - start for *_, start, stop in sent) == sum(min(left, bounds[r]) for r in ranks)


def log_scan_messages(size):
    """(sends, receives) as (from, to, round) of an exclusive scan of `size` elements, from its definition."""
    sends, receives = set(), set()
    for i in range(size):
        sends |= {(i, i + 1, 0)} if i + 1 < size else set()
        receives |= {(i - 1, i, 0)} if i > 0 else set()
        stride, turn = 1, 1
        while stride < size - 1:
            sends |= {(i, i + stride, turn)} if i >= 1 and i + stride < size else set()
            receives |= {(i - stride, i, turn)} if i - stride >= 1 else set()
            stride, turn = 2 * stride, turn + 1
    return sends, receives


def test_log_scan_sends_and_receives_of_all_ranks_match_and_are_those_of_the_formula():
    sends, receives = log_scan_messages(P)
    assert sends == receives
    counted = [0] * P
    for source, *_ in sends:
        counted[source] += 1
    assert counted == [cost.scan_bytes(P, r, "log", 1) for r in range(P)]
    assert counted[::-1] == [cost.scan_bytes(P, r, "log", 1, reverse=True) for r in range(P)]


@pytest.mark.parametrize("balanced", [False, True])
def test_ring_sends_and_receives_of_all_ranks_match(balanced):
    sizes = [b - a for a, b in pairwise(BOUNDS)]
    reach = [GENERATOR.randrange(P) if size else 0 for size in sizes]
    spans = [(min(1 + balanced * 3, last), last) for last in reach]
    route = Route(tuple(range(P)), tuple(sizes), tuple(spans))
    for step in (0, 1, 2, 3, P // 2, P - 2):
        sends, receives = set(), set()
        for i in range(P):
            source, following = (i - step) % P, (i - step - 1) % P
            sends |= {(i, (i + 1) % P, source)} if route.hops(source, step) else set()
            receives |= {((i - 1) % P, i, following)} if route.hops(following, step) else set()
            on, home = route.gradient_hops(source, step), route.gradient_ends(source, step)
            sends |= {(i, (i + 1) % P, source, "gradient")} if on else set()
            sends |= {(i, source, "home")} if home else set()
            receives |= {((i - 1) % P, i, following, "gradient")} if route.gradient_hops(following, step) else set()
            receives |= {((i + step) % P, i, "home")} if route.gradient_ends(i, step) else set()
            assert not (on and home)
        assert sends == receives
    for i in (0, 1, P // 2, P - 1):
        held = [(i - s) % P for s in range(P)]
        assert cost.ring_bytes(sizes, spans, i, 1) == sum(sizes[j] for s, j in enumerate(held) if route.hops(j, s))
