"""Who does what of an attention over ranks: every pair of query and key once, by integers alone, and what auto chooses."""

import random

import pytest
import torch

from seqengine.kernels.attention.bounds import key_intervals
from seqengine.parallel import attention_cost
from seqengine.parallel.attention_plan import Mask, gather_plan, head_ranges, ring_plan, zigzag
from seqengine.parallel.layout import offsets


def whole_mask(T, mask):
    """[T, T] of what each query sees, by the kernel's own rule."""
    ends = None if len(mask.documents) == 2 else torch.tensor(mask.documents)
    low, high = key_intervals(T, T, mask.causal, mask.window, ends, torch.device("cpu"))
    return visible(T, low, high)


def visible(S, low, high):
    columns = torch.arange(S)
    return ((columns >= low[:, None]) & (columns < high[:, None])).int()


def draw(plan, T, source):
    """[T, T]: how often the pieces of one block compute each pair of query and key, as the kernel reads them."""
    found = torch.zeros(T, T, dtype=torch.int)
    held = [torch.cat([torch.arange(a, b) for a, b in x]) for x in (plan.queries[plan.rank], plan.keys[source])]
    for piece in plan.pieces(plan.route.members.index(source)):
        rows, columns = held[0][slice(*piece.queries)], held[1][slice(*piece.keys)]
        if piece.turned:
            rows, columns = rows.flip(0), columns.flip(0)
        ends = None if piece.documents is None else torch.tensor(piece.documents)
        window, shape = piece.window, (len(rows), len(columns))
        low, high = key_intervals(*shape, piece.causal, window, ends, torch.device("cpu"))
        sees = visible(shape[1], low, high)
        assert bool(sees.any(dim=1).all()), "every query of a piece sees a key of it"
        found[rows[:, None], columns] += sees
    return found


def test_pieces_compute_each_pair_that_is_seen_once_and_no_other():
    rng = random.Random(0)
    for _ in range(150):
        P, T = rng.choice([2, 3, 4, 6]), rng.choice([1, 7, 16, 29])
        bounds = (0, *sorted(rng.randrange(T + 1) for _ in range(P - 1)), T)
        documents = tuple(sorted({0, T, *(rng.randrange(T + 1) for _ in range(rng.choice([0, 0, 1, 4])))}))
        mask = Mask(rng.random() < 0.6, rng.choice([None, None, *range(1, T)]), documents)
        expected = whole_mask(T, mask)
        u = rng.choice([u for u in range(1, P + 1) if P % u == 0])
        for balance in (False, True):
            found = torch.zeros(T, T, dtype=torch.int)
            for rank in range(0, P, u):
                plan = ring_plan(bounds, rank, mask, 4, 2, u, balance)
                found += sum(draw(plan, T, source) for source in plan.route.members)
            assert torch.equal(found, expected), (bounds, mask, u, balance)
        gathered = [
            draw(gather_plan(bounds, rank, mask, 4, 2), T, rank) for rank in range(P) if bounds[rank + 1] > bounds[rank]
        ]
        assert torch.equal(sum(gathered), expected), (bounds, mask)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 4), (6, 2), (8, 1), (12, 3)])
def test_each_head_has_one_rank_which_has_its_group(ranks, H, G):
    heads, groups = head_ranges(ranks, H, G)
    assert [h for a, b in heads for h in range(a, b)] == list(range(H))
    for (a, b), (c, d) in zip(heads, groups, strict=True):
        assert {h // (H // G) for h in range(a, b)} == set(range(c, d))
        assert (b - a) % max(1, d - c) == 0


def test_zigzag_gives_each_rank_the_same_share_of_a_causal_triangle():
    for tokens, ranks in ((64, 4), (48, 3), (16, 8)):
        work = [sum(b * (b + 1) - a * (a + 1) for a, b in held) // 2 for held in zigzag(tokens, ranks)]
        assert len(set(work)) == 1
        assert sum(work) == tokens * (tokens + 1) // 2


@pytest.mark.parametrize("balance", [True, False])
def test_in_every_step_of_a_balanced_ring_all_ranks_have_the_same_work(balance):
    P, T = 4, 64
    plans = [ring_plan(offsets([T // P] * P), rank, Mask(True, None, (0, T)), 4, 4, 1, balance) for rank in range(P)]
    steps = [[int(draw(plans[r], T, (r - s) % P).sum()) for r in range(P)] for s in range(P)]
    assert sum(map(sum, steps)) == T * (T + 1) // 2
    assert all((max(work) == min(work)) == (balance or i == 0) for i, work in enumerate(steps))
    busiest = sum(max(work) for work in steps) / (T * (T + 1) / 2 / P)
    assert busiest == pytest.approx(1.0) if balance else busiest > 1.6


SIZES = attention_cost.Sizes(1, 32, 8, 128, 128, 2, 4)


def test_auto_takes_gather_for_short_spans_and_else_the_fewest_bytes():
    def chosen(shard, P, sizes=SIZES, window=None, documents=(), causal=True):
        bounds = offsets([shard] * P)
        return attention_cost.algorithm(bounds, Mask(causal, window, (0, *documents, bounds[-1])), sizes)

    assert chosen(4096, 8, window=1024) == "gather"
    assert chosen(4096, 8, documents=range(1024, 4096 * 8, 1024)) == "gather"
    assert chosen(4096, 8, window=4096 * 4) == "ulysses"
    assert chosen(4096, 8) == "ulysses"
    assert chosen(4096, 16, sizes=SIZES._replace(heads=8)) == "ring_ulysses"
    assert chosen(4096, 7) == "ring"  # the busiest of seven ranks would have two of eight groups
    assert chosen(4096, 7, sizes=SIZES._replace(heads=4, groups=1)) == "ring"


def test_heads_are_shared_by_ranks_that_get_nearly_the_same_number():
    assert [u for u in range(1, 9) if attention_cost.shares_heads(u, 32, 8)] == [1, 2, 3, 4, 5, 8]
    assert not attention_cost.shares_heads(5, 4, 4)
    assert attention_cost.widest_head_ranks(6, 32, 8) == 3
    assert attention_cost.widest_head_ranks(16, 32, 8) == 8
    assert attention_cost.widest_head_ranks(6, 4, 1) == 1


def test_balance_pays_for_long_causal_sequences_alone():
    def pays(shard, P, window=None, documents=(), causal=True):
        bounds = offsets([shard] * P)
        return attention_cost.should_balance(bounds, Mask(causal, window, (0, *documents, bounds[-1])), SIZES, "cuda")

    assert pays(32768, 8)
    assert not pays(256, 8)
    assert not pays(32768, 8, causal=False)
    assert not pays(32768, 8, window=4096)
    assert not pays(32768, 8, documents=(5,))
    assert not pays(32768, 1)


def test_a_causal_ring_sends_less_than_one_that_sees_all_and_a_window_no_more_than_its_neighbour():
    bounds = offsets([8] * 4)

    def sent(mask):
        plans = [ring_plan(bounds, r, mask, 32, 8, 1, False) for r in range(4)]
        return [attention_cost.attention_bytes(p, SIZES) for p in plans]

    block = 8 * 8 * (128 + 128) * 2
    assert sent(Mask(False, None, (0, 32))) == [3 * block] * 4
    assert sent(Mask(True, None, (0, 32))) == [block, 2 * block, 3 * block, 0]
    assert sent(Mask(True, 5, (0, 32))) == [block, block, block, 0]
    assert sent(Mask(True, None, (0, 16, 32))) == [block, 0, block, 0]
