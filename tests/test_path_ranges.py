"""Ranges of layers: expanding what was folded gives the original back, and equal layers do fold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.planner.path_ranges import (
    Repeat,
    expand_paths,
    expand_rows,
    fold_paths,
    fold_rows,
    natural,
    parse_ranges,
    ranges_text,
)

PART = st.sampled_from(["a", "b", "0", "1", "2", "10", "007", "{i}", "%7B", "x{0-1}", "²"])
PATH = st.lists(PART, min_size=1, max_size=4).map(".".join)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_ranges_are_read_back(numbers):
    assert parse_ranges(ranges_text(numbers)) == numbers


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([*range(32)], "0-31"),
        ([*range(31, -1, -1)], "31-0"),
        ([0, 2, 4, 6], "0-6:2"),
        ([0, *range(4, 32), 1, 2, 3], "0,4-31,1-3"),
        ([3, 5], "3,5"),
        ([7], "7"),
    ],
)
def test_ranges_are_short(numbers, text):
    assert ranges_text(numbers) == text


@pytest.mark.parametrize("text", ["", "a", "1-", "1,,2", "0-9:0", "-1"])
def test_other_text_is_no_range(text):
    with pytest.raises(ValueError, match="range"):
        parse_ranges(text)


@given(st.dictionaries(PATH, st.integers(0, 2), max_size=12))
def test_folded_paths_are_read_back(entries):
    assert expand_paths(fold_paths(entries)) == entries


def test_layers_that_agree_share_an_entry():
    entries = {f"layers.{n}.{w}.weight": "A" if w == "q" else n % 2 for n in range(32) for w in ("q", "o")}
    assert fold_paths(entries) == {
        "layers.{0-31}.q.weight": "A",
        "layers.{0-30:2}.o.weight": 0,
        "layers.{1-31:2}.o.weight": 1,
    }


def test_experts_fold_twice():
    entries = {f"layers.{n}.experts.{e}.up": 1 for n in range(4) for e in range(8)}
    assert fold_paths(entries) == {"layers.{0-3}.experts.{0-7}.up": 1}


def test_paths_are_read_in_model_order():
    folded = {"embed": 0, "layers.{0-10}.q": 1, "layers.{0-10}.o": 2, "head": 3}
    assert list(expand_paths(folded))[:5] == ["embed", "layers.0.q", "layers.0.o", "layers.1.q", "layers.1.o"]
    assert list(expand_paths(folded))[-3:] == ["layers.10.q", "layers.10.o", "head"]


def test_a_path_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"layers\.1\.q is given twice"):
        expand_paths({"layers.{0-3}.q": 1, "layers.1.q": 2})


TEXT = st.lists(st.sampled_from(["m.0.a", "m.1.a", "m.2", "m.10.x.3", "add in", "0.5", "{i}", "05", "x"]), max_size=3)
ROW = st.tuples(TEXT.map(" ".join), st.integers(0, 1), st.none() | st.just("m.1"))


@given(st.lists(ROW, max_size=14))
def test_folded_rows_are_read_back(rows):
    assert expand_rows(fold_rows(rows)) == rows


@given(
    st.lists(
        st.tuples(st.sampled_from(["m.{n}.a", "b in m.{n}", "m.{m}", "c"]), st.integers(0, 1)), min_size=1, max_size=4
    )
)
def test_repeating_rows_are_read_back(block):
    rows = [(text.format(n=n, m=n + 1), value) for n in range(5, 0, -1) for text, value in block]
    assert expand_rows(fold_rows(rows)) == rows


def test_blocks_of_rows_fold_in_their_order():
    rows = [
        ("start",),
        *((text.format(n, n + 1),) for n in range(31, -1, -1) for text in ("m.{0}", "from m.{0} to m.{1}.x")),
    ]
    assert fold_rows(rows) == [("start",), Repeat("m.{31-0}", (("m.{i}",), ("from m.{i} to m.{i+1}.x",)))]


def test_a_row_that_differs_ends_the_fold():
    rows = [(f"m.{n}", 5 if n == 4 else 0) for n in range(8)]
    assert fold_rows(rows) == [Repeat("m.{0-3}", (("m.{i}", 0),)), ("m.4", 5), Repeat("m.{5-7}", (("m.{i}", 0),))]


def test_numbers_sort_by_value():
    assert sorted(["b.10", "b.9", "a", "b.x"], key=natural) == ["a", "b.9", "b.10", "b.x"]
