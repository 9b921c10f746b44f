"""Bytes that a rank sends in an attention over ranks, as integers from the layout alone, and the rules that choose by them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from seqengine.parallel import cost
from seqengine.parallel.attention_exchange import Places, common
from seqengine.parallel.attention_plan import Mask, Plan, gather_plan, head_ranges, keys_seen, ring_plan
from seqengine.parallel.layout import Intervals, Layout, count, parts_of

FLOPS = {"cpu": 5e10, "cuda": 4e14}
"""Assumed arithmetic per second of one rank in attention."""


class Sizes(NamedTuple):
    """Of one call: B, H, G, K, V, and the bytes of an element of q and of lse (those of sums too)."""

    batch: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    element_bytes: int
    sum_bytes: int


def distribute_bytes(places: Places, parts: Sequence[Intervals], rank: int, row_bytes: Sequence[int]) -> int:
    """`distribute`. row_bytes: by tensor, one token of one head, batch included."""
    return sum(
        (stop - start) * (heads[other][1] - heads[other][0]) * n
        for other in range(len(parts))
        if other != rank
        for (start, stop), _ in common(places, rank, other, parts)
        for heads, n in zip(places.heads, row_bytes, strict=True)
    )


def collect_bytes(places: Places, parts: Sequence[Intervals], rank: int, row_bytes: Sequence[int]) -> int:
    """`collect`, and the backward of `distribute`."""
    return sum(
        (stop - start) * (heads[rank][1] - heads[rank][0]) * n
        for other in range(len(parts))
        if other != rank
        for (start, stop), _ in common(places, other, rank, parts)
        for heads, n in zip(places.heads, row_bytes, strict=True)
    )


def query_places(plan: Plan, total: int) -> Places:
    """Of q and of all that has its heads."""
    return Places(plan.queries, (plan.heads,), (total,))


def key_places(plan: Plan, total: int) -> Places:
    """Of k and v."""
    return Places(plan.keys, (plan.groups, plan.groups), (total, total))


def input_places(plan: Plan, heads: int, groups: int) -> Places:
    """Of q, k and v together, where keys and queries move alike."""
    return Places(plan.queries, (plan.heads, plan.groups, plan.groups), (heads, groups, groups))


def _ring_rows(plan: Plan, sizes: Sizes) -> int:
    first, last = plan.groups[plan.rank]
    has_heads = plan.heads[plan.rank][1] > plan.heads[plan.rank][0]
    return sizes.batch * (last - first) * (sizes.key_dim + sizes.value_dim) if has_heads else 0


def attention_bytes(plan: Plan, sizes: Sizes, return_lse: bool = False) -> int:
    """Forward of the twin `attention`."""
    B, H, G, K, V, element, of_sum = sizes
    parts, rank, route = plan.parts, plan.rank, plan.route
    if plan.gathered:
        return distribute_bytes(key_places(plan, G), parts, rank, [B * K * element, B * V * element])
    index = route.members.index(rank)
    found = cost.ring_bytes(route.sizes, route.spans, index, _ring_rows(plan, sizes) * element)
    if plan.moved:
        found += distribute_bytes(input_places(plan, H, G), parts, rank, [B * n * element for n in (K, K, V)])
        found += collect_bytes(query_places(plan, H), parts, rank, [B * (V * element + return_lse * of_sum)])
    return found


def attention_backward_bytes(plan: Plan, sizes: Sizes, lse_gradient: bool = False) -> int:
    """Its backward: the exchanges the other way, and in a ring the blocks once more. lse_gradient: lse has a cotangent."""
    B, H, G, K, V, element, of_sum = sizes
    parts, rank, route = plan.parts, plan.rank, plan.route
    if plan.gathered:
        return collect_bytes(key_places(plan, G), parts, rank, [B * K * element, B * V * element])
    index, row = route.members.index(rank), _ring_rows(plan, sizes)
    found = cost.ring_backward_bytes(route.sizes, route.spans, index, row * element, row * of_sum)
    if plan.moved:
        found += distribute_bytes(query_places(plan, H), parts, rank, [B * (V * element + lse_gradient * of_sum)])
        found += collect_bytes(input_places(plan, H, G), parts, rank, [B * n * element for n in (K, K, V)])
    return found


def should_balance(bounds: tuple[int, ...], mask: Mask, sizes: Sizes, device: str) -> bool:
    """Zigzag pays: what the busiest rank is spared takes longer than to move q, k, v there and out back.

    Only for causal attention without window and documents, whose work is that of a triangle; else False. In a shard that
    ends at b a causal triangle has b (b + 1) / 2 pairs of query and key, less those of the shards before.
    """
    ranks = len(bounds) - 1
    if not mask.causal or mask.window is not None or len(mask.documents) > 2 or ranks == 1:
        return False
    pairs = [(b * (b + 1) - a * (a + 1)) // 2 for a, b in pairwise(bounds)]
    spared = (max(pairs) - sum(pairs) / ranks) * 2 * sizes.batch * sizes.heads * (sizes.key_dim + sizes.value_dim)
    width = (sizes.heads + sizes.groups) * (sizes.key_dim + sizes.value_dim)
    moved = max(b - a for a, b in pairwise(bounds)) * sizes.batch * width * sizes.element_bytes
    return spared / FLOPS.get(device, FLOPS["cpu"]) > cost.ACROSS_NODES.seconds(moved)


def shares_heads(ranks: int, heads: int, groups: int) -> bool:
    """The busiest of so many ranks has at most 5/4 of an even share of the heads, and none is idle."""
    held = [b - a for a, b in head_ranges(ranks, heads, groups)[0]]
    return min(held) > 0 and 4 * max(held) * ranks <= 5 * heads


def widest_head_ranks(ranks: int, heads: int, groups: int) -> int:
    """Of `ring_ulysses`: the most consecutive ranks, a divisor of all, that have groups of their own and share the heads."""
    fits = (u for u in range(1, min(ranks, max(1, groups)) + 1) if ranks % u == 0 and shares_heads(u, heads, groups))
    return max(fits)


def algorithm(cuts: tuple[int, ...], mask: Mask, sizes: Sizes, layout: Layout = "contiguous") -> str:
    """What the twin does with algorithm="auto". The same on all ranks.

    1. gather, if a window or documents keep what every rank needs of others within the size of the largest shard.
    2. Else of ulysses (if it shares the heads, `shares_heads`), ring_ulysses (if it is neither of the others) and ring the one
       whose busiest rank sends the fewest bytes forward and backward, documents left out; of equal ones the first in this
       order.
    """
    if mask.window is not None or len(mask.documents) > 2:
        parts = parts_of(cuts, layout)
        remote = max(count(keys_seen(mask, held)) - count(held) for held in parts)
        if remote <= max(map(count, parts)):
            return "gather"
    return _fewest_bytes(cuts, Mask(mask.causal, mask.window, (0, cuts[-1])), sizes, layout)


@lru_cache(maxsize=256)
def _fewest_bytes(cuts: tuple[int, ...], mask: Mask, sizes: Sizes, layout: Layout) -> str:
    """Rule 2 of `algorithm`."""
    ranks = len(parts_of(cuts, layout))
    widest = widest_head_ranks(ranks, sizes.heads, sizes.groups)
    candidates = {"ulysses": ranks} if shares_heads(ranks, sizes.heads, sizes.groups) else {}
    candidates |= {"ring_ulysses": widest, "ring": 1} if 1 < widest < ranks else {"ring": 1}

    def busiest(name: str) -> int:
        width = candidates[name]
        plans = [ring_plan(cuts, r, mask, sizes.heads, sizes.groups, width, False, layout) for r in range(ranks)]
        return max(attention_bytes(p, sizes) + attention_backward_bytes(p, sizes) for p in plans)

    return min(candidates, key=busiest)


@lru_cache(maxsize=256)
def choose(
    cuts: tuple[int, ...],
    rank: int,
    mask: Mask,
    sizes: Sizes,
    device: str,
    chosen: str,
    head_ranks: int | None,
    balance: bool | None,
    layout: Layout = "contiguous",
) -> Plan:
    """The plan of an algorithm, `auto` included. A zigzag context is balanced as it is, if balance is None."""
    ranks = len(parts_of(cuts, layout))
    if chosen == "auto":
        chosen = algorithm(cuts, mask, sizes, layout)
    if chosen == "gather":
        return gather_plan(cuts, rank, mask, sizes.heads, sizes.groups, layout)
    if head_ranks is None:
        widest = widest_head_ranks(ranks, sizes.heads, sizes.groups)
        head_ranks = {"ring": 1, "ulysses": ranks, "ring_ulysses": widest}[chosen]
    if balance is None:
        balance = layout == "contiguous" and should_balance(tuple(cuts[::head_ranks]), mask, sizes, device)
    return ring_plan(cuts, rank, mask, sizes.heads, sizes.groups, head_ranks, balance, layout)
