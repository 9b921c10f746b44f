"""Integer arithmetic of cuts and halos, against brute force."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqengine.parallel.layout import (
    common_rows,
    count,
    halo_sources,
    halo_targets,
    offsets,
    overlap,
    parts_of,
    split_sizes,
    split_span,
    zigzag_cuts,
)


@given(st.integers(0, 1000), st.integers(1, 17))
def test_split_sizes_cover_and_differ_by_at_most_one(total, parts):
    sizes = split_sizes(total, parts)
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [split_span(total, parts, part) for part in range(parts)] == list(pairwise(offsets(sizes)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 20))
def test_halo_sources_are_the_positions_before_a_part_and_targets_mirror_them(sizes, left):
    bounds = offsets(sizes)
    owner_of = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    for rank in range(len(sizes)):
        wanted = range(max(0, bounds[rank] - left), bounds[rank])
        found = [(owner, p) for owner, start, stop in halo_sources(bounds, rank, left) for p in range(start, stop)]
        assert found == [(owner_of[p], p) for p in wanted]
        for owner, start, stop in halo_sources(bounds, rank, left):
            assert (rank, start, stop) in halo_targets(bounds, owner, left)
    counts = [sum(len(f(bounds, r, left)) for r in range(len(sizes))) for f in (halo_sources, halo_targets)]
    assert counts[0] == counts[1]


def test_overlap_of_disjoint_intervals_is_empty():
    assert overlap((0, 3), (5, 9)) == (5, 5)
    assert overlap((0, 6), (5, 9)) == (5, 6)


def test_split_sizes_rejects_no_parts():
    with pytest.raises(ValueError, match="parts >= 1"):
        split_sizes(3, 0)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 20), st.lists(st.integers(0, 36), max_size=5)
)
def test_halos_end_where_the_document_of_the_next_position_begins(sizes, left, middles):
    bounds, total = offsets(sizes), sum(sizes)
    documents = (0, *sorted(min(m, total) for m in middles), total)
    owner_of = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    for rank in range(len(sizes)):
        first = bounds[rank]
        begin = max(d for d in documents if d <= first)
        wanted = range(max(begin, first - left), first)
        found = [(o, p) for o, a, b in halo_sources(bounds, rank, left, documents) for p in range(a, b)]
        assert found == [(owner_of[p], p) for p in wanted]
        for owner, start, stop in halo_sources(bounds, rank, left, documents):
            assert (rank, start, stop) in halo_targets(bounds, owner, left, documents)
    counts = [sum(len(f(bounds, r, left, documents)) for r in range(len(sizes))) for f in (halo_sources, halo_targets)]
    assert counts[0] == counts[1]


@given(st.integers(0, 40), st.integers(1, 9))
def test_zigzag_chunks_cover_the_sequence_once_and_share_it_evenly(total, ranks):
    parts = parts_of(zigzag_cuts(total, ranks), "zigzag")
    assert sorted(p for held in parts for a, b in held for p in range(a, b)) == list(range(total))
    sizes = [count(held) for held in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(a[1] <= b[0] for a, b in parts)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_common_rows_are_the_tokens_that_both_hold(sizes, data):
    total = sum(sizes)
    chunks = data.draw(st.lists(st.integers(0, total), min_size=2 * len(sizes) - 1, max_size=2 * len(sizes) - 1))
    cuts = [parts_of(offsets(sizes), "contiguous"), parts_of((0, *sorted(chunks), total), "zigzag")]
    for source in (*cuts[0], *cuts[1]):
        for target in (*cuts[0], *cuts[1]):
            held = [[p for a, b in part for p in range(a, b)] for part in (source, target)]
            rows = [(i, j) for (a, b), (c, d) in common_rows(source, target) for i, j in zip(range(a, b), range(c, d))]
            assert [(held[0][i], held[1][j]) for i, j in rows] == [(p, p) for p in held[1] if p in held[0]]
