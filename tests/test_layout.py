"""Layouts as index maps: every transformation is compared with the same transformation of the indices themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.planner.layout import Layout, balanced, even, joined, owned_units

RANKS = st.integers(1, 5)


@st.composite
def segments(draw: st.DrawFn, ranks: int) -> Layout:
    """One segment: balanced, or units dealt out by hand with copies."""
    unit = draw(st.integers(1, 3))
    units = draw(st.integers(1, 8))
    if draw(st.booleans()):
        return balanced(units * unit, ranks, unit)
    owned = tuple(tuple(draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=3))) for _ in range(ranks))
    return owned_units(units * unit, unit, owned)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    ranks = draw(RANKS)
    return joined(tuple(draw(segments(ranks)) for _ in range(draw(st.integers(1, 3)))))


def held(layout: Layout, rank: int) -> np.ndarray:
    """The global index at every local position; -1 for padding."""
    found = np.full(layout.local, -1)
    for start, local, length in layout.pieces(rank):
        found[local : local + length] = np.arange(start, start + length)
    return found


def maps(layout: Layout) -> list[list[int]]:
    return [held(layout, rank).tolist() for rank in range(layout.ranks)]


@given(st.integers(1, 20), RANKS, st.integers(1, 4))
def test_balanced_covers_everything_once_in_order(units: int, ranks: int, unit: int) -> None:
    layout = balanced(units * unit, ranks, unit)
    owned = [i for rank in range(ranks) for i in held(layout, rank) if i >= 0]
    assert owned == list(range(units * unit))
    per_rank = [int((held(layout, rank) >= 0).sum()) for rank in range(ranks)]
    assert layout.local == max(per_rank) and layout.local - min(per_rank) in (0, unit)
    assert all(n % unit == 0 for n in per_rank)
    assert not layout.is_replicated
    assert layout.is_padded == bool(units % ranks)


@given(layouts())
def test_local_positions_are_used_at_most_once_and_padding_is_at_each_segments_end(layout: Layout) -> None:
    for rank in range(layout.ranks):
        taken = [p for _, local, length in layout.pieces(rank) for p in range(local, local + length)]
        assert len(taken) == len(set(taken)) and (not taken or max(taken) < layout.local)
        offset = 0
        for segment in layout.segments:
            inside = held(layout, rank)[offset : offset + segment.local] >= 0
            assert not (~inside[:-1] & inside[1:]).any()  # no value after padding
            offset += segment.local
    assert layout.size == sum(s.length for s in layout.segments)


@given(layouts(), st.integers(1, 4))
def test_scaled_is_the_map_of_the_merged_dim(layout: Layout, factor: int) -> None:
    merged = layout.scaled(factor)
    for rank in range(layout.ranks):
        rows = held(layout, rank)
        want = np.where(rows[:, None] >= 0, rows[:, None] * factor + np.arange(factor), -1).reshape(-1)
        assert (held(merged, rank) == want).all()
    assert merged.size == layout.size * factor
    again = merged.divided(factor)
    assert again is not None and maps(again) == maps(layout)


@given(layouts(), st.integers(2, 4))
def test_divided_refuses_bounds_that_do_not_divide(layout: Layout, factor: int) -> None:
    part = layout.divided(factor)
    if part is None:
        bounds = [x for s in layout.segments for r in s.owned for i in r for x in i]
        bounds += [x for s in layout.segments for x in (s.length, s.local)]
        assert any(x % factor for x in bounds)
    else:
        assert maps(part.scaled(factor)) == maps(layout)


@given(layouts(), st.integers(1, 4))
def test_repeated_is_the_map_behind_a_leading_dim(layout: Layout, times: int) -> None:
    folded = layout.repeated(times)
    for rank in range(layout.ranks):
        rows = held(layout, rank)
        want = [i + t * layout.size if i >= 0 else -1 for t in range(times) for i in rows]
        assert held(folded, rank).tolist() == want
    assert folded.period(times) == layout


@given(layouts(), st.integers(2, 4))
def test_period_is_found_only_where_all_copies_are_equal(layout: Layout, times: int) -> None:
    part = layout.period(times)
    if part is not None:
        assert maps(part.repeated(times)) == maps(layout)
    count = len(layout.segments)
    each = max(1, count // times)
    equal = len({layout.segments[i : i + each] for i in range(0, count, each)}) == 1
    assert (part is not None) == (count % times == 0 and count >= times and equal)


@given(st.data())
def test_slices_at_the_joints_give_the_parts_back(data: st.DataObject) -> None:
    ranks = data.draw(RANKS)
    parts = [data.draw(segments(ranks)) for _ in range(data.draw(st.integers(1, 4)))]
    whole = joined(tuple(parts))
    start = 0
    for part in parts:
        assert whole.sliced(start, start + part.size) == part
        local = whole.local_offset(start)
        assert local is not None
        for rank in range(ranks):
            there = held(whole, rank)[local : local + part.local]
            assert (there == np.where(held(part, rank) >= 0, held(part, rank) + start, -1)).all()
        start += part.size
    assert whole.sliced(0, whole.size) == whole
    assert whole.local_offset(whole.size) == whole.local


@given(layouts(), st.data())
def test_a_slice_inside_a_segment_is_refused(layout: Layout, data: st.DataObject) -> None:
    joints = {0}
    for segment in layout.segments:
        joints.add(max(joints) + segment.length)
    start = data.draw(st.integers(0, layout.size - 1))
    stop = data.draw(st.integers(start + 1, layout.size))
    assert (layout.sliced(start, stop) is not None) == (start in joints and stop in joints)
    assert (layout.local_offset(start) is not None) == (start in joints)


def test_even_is_what_dtensor_carries_and_segments_are_not() -> None:
    assert even(8, 2).is_even and even(7, 2).is_even
    assert not joined((even(4, 2), even(4, 2))).is_even
    assert not balanced(6, 4, 3).is_even  # whole units of three, where DTensor would cut 2, 2, 2, 0


def test_copies_are_seen() -> None:
    assert owned_units(8, 4, ((0,), (0,), (1,), (1,))).is_replicated
    assert owned_units(8, 4, ((0, 0), (1, 1))).is_replicated
    assert not owned_units(8, 2, ((3, 1), (0, 2))).is_replicated


def test_neighbouring_intervals_are_one_so_that_equal_maps_compare_equal() -> None:
    assert owned_units(8, 2, ((0, 1), (2, 3))) == even(8, 2)


def test_a_unit_must_divide() -> None:
    with pytest.raises(ValueError, match="no multiple of the unit 3"):
        balanced(8, 2, 3)
