"""Charts: where marks land, what is a guess, and the same charts as image files."""

from __future__ import annotations

import pytest

from colrow.cost_models.errors import UsageError
from colrow.rewrite.chart_images import check_drawable, draw
from colrow.rewrite.charts import Chart, Curve, text_of


def chart(*curves: Curve, level: float | None = None) -> Chart:
    return Chart("T", "bytes", "time", curves, lambda x: f"{x:.0f}B", lambda y: f"{y:.0f}s", "guessed", level)


RISING = Curve("rising", "2", [(1, 1), (10, 10), (100, 100)], [True, True, False])
FLAT = Curve("flat", "8", [(1, 10), (100, 10)], [True, True])


def test_curves_are_straight_in_logarithms_and_dotted_where_guessed():
    assert text_of(chart(RISING, FLAT), width=12, height=5).splitlines() == [
        "T",
        "     time",
        "100s |          ..",
        "     |       ...",
        "     |888888888888",
        "     |  222",
        "  1s |22",
        "     +------------",
        "      1B   10B100B",
        "      bytes;  2 rising, 8 flat, . guessed",
    ]


def test_every_point_of_a_curve_is_in_its_cell():
    rows = text_of(chart(RISING), width=9, height=5).splitlines()[2:7]
    cells = [row.partition("|")[2].ljust(9) for row in rows]
    assert [cells[4][0], cells[2][4], cells[0][8]] == ["2", "2", "."]
    assert sum(c != " " for row in cells for c in row) == 9  # one mark a column


def test_known_marks_are_over_guesses_whatever_the_order():
    guess = Curve("guess", "4", [*FLAT.points, (1000, 10)], [False, False, True])
    for curves in ((FLAT, guess), (guess, FLAT)):
        assert "|888888..." in text_of(chart(*curves), width=9, height=3)


def test_a_curve_that_is_all_guesses_keeps_its_mark_and_says_so():
    drawn = text_of(chart(Curve("formula", "4", FLAT.points, [False, False])), width=9, height=3)
    assert "444444444" in drawn
    assert "4 formula (guessed)" in drawn


def test_the_level_is_a_line_of_its_own():
    assert "|---22----" in text_of(chart(RISING, level=10.0), width=9, height=5)
    assert text_of(chart(RISING, level=1e9), width=9, height=5) == text_of(chart(RISING), width=9, height=5)


def test_a_single_point_is_drawn():
    assert "2" in text_of(chart(Curve("one", "2", [(5, 5)], [True])), width=5, height=3).splitlines()[2]


@pytest.mark.parametrize(("name", "magic"), [("c.png", b"\x89PNG"), ("c.svg", b"<?xml")])
def test_images(cwd, name, magic):
    pytest.importorskip("matplotlib")
    check_drawable(name)
    draw([chart(RISING, FLAT, level=3.0)] * 4, name)
    assert (cwd / name).read_bytes().startswith(magic)
    assert [path.name for path in cwd.iterdir()] == [name]


def test_other_formats_and_a_missing_matplotlib_are_refused_before_the_work(cwd, monkeypatch):
    check_drawable(None)
    with pytest.raises(UsageError, match=r"got \.gif, need \.png or \.svg"):
        check_drawable("c.gif")
    monkeypatch.setattr("colrow.rewrite.chart_images.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'colrow\[plot\]'"):
        check_drawable("c.png")
