"""Integer arithmetic of cuts and halos, against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqengine.parallel.layout import halo_sources, halo_targets, offsets, overlap, split_sizes


@given(st.integers(0, 1000), st.integers(1, 17))
def test_split_sizes_cover_and_differ_by_at_most_one(total, parts):
    sizes = split_sizes(total, parts)
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


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
