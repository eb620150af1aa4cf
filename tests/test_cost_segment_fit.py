"""The fit: exact where the data is a segmented line, robust to a jump, accurate on the shipped tables."""

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.cost_models.communication import SegmentedLine
from colrow.cost_models.fit_profiles import load_table
from colrow.cost_models.hardware import load_hardware
from colrow.cost_models.segment_fit import fit_segments, relative_errors

SIZES = [2**k for k in range(9, 25)]


@given(
    st.floats(1e-6, 1e-3),
    st.lists(st.sampled_from(SIZES[2:-2:3]), min_size=2, max_size=2, unique=True),
    st.lists(st.floats(1e-12, 1e-8), min_size=3, max_size=3),
)
@settings(max_examples=8, deadline=None)
def test_a_segmented_line_is_recovered(latency_s, breaks, slopes) -> None:
    line = SegmentedLine.through(latency_s, [0, *sorted(breaks)], slopes)
    fit = fit_segments([(size, line.seconds(size)) for size in SIZES])
    assert fit.max_rel_error < 1e-3


def test_more_segments_never_fit_worse() -> None:
    rows = [(nbytes, us * 1e-6) for nbytes, us in load_table("h100-sxm")["collectives"]["all_reduce"]["8"]]
    sums = [sum(relative_errors(rows, fit_segments(rows, count).line())) for count in (1, 2, 3)]
    assert sums[0] > sums[1] > sums[2]


def test_one_outlier_does_not_move_the_line() -> None:
    rows = [(size, 1e-5 + 1e-9 * size) for size in SIZES]
    rows[5] = (rows[5][0], rows[5][1] * 4)
    fit = fit_segments(rows, max_segments=1)
    assert fit.latency_s == pytest.approx(1e-5, rel=1e-4) and fit.slopes_s_per_byte[0] == pytest.approx(1e-9, rel=1e-4)
    assert fit.median_rel_error < 1e-4 and fit.max_rel_error == pytest.approx(0.75, abs=1e-3)


def test_falling_times_give_a_flat_line_not_a_falling_one() -> None:
    fit = fit_segments([(size, 1e-3 - 1e-11 * size) for size in SIZES])
    assert all(slope >= 0 for slope in fit.slopes_s_per_byte) and fit.latency_s > 0


def test_few_rows_get_few_segments() -> None:
    assert len(fit_segments([(100, 1e-5), (200, 2e-5), (300, 9e-5)]).starts) == 1


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(1024, 1e-5)], "two or more distinct sizes"),
        ([(1024, 1e-5), (1024, 2e-5)], "two or more distinct sizes"),
        ([(1024, 1e-5), (2048, 0.0)], "times above 0 s"),
        ([(1024, 1e-5), (2048, float("nan"))], "times above 0 s"),
        ([(-1, 1e-5), (2048, 1e-5)], "at least 0 bytes"),
    ],
)
def test_bad_rows_are_refused(rows, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit_segments(rows)


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm"])
def test_shipped_fits_are_within_three_percent_of_the_nvswitch_tables(name: str) -> None:
    """Median over all rows of a machine below 3 %; of any one table below 4 %."""
    hardware, every = load_hardware(name), []
    for kind, by_size in load_table(name)["collectives"].items():
        for size, rows in by_size.items():
            errors = [abs(hardware.collective_s(kind, nbytes, int(size)) / (us * 1e-6) - 1) for nbytes, us in rows]
            assert median(errors) < 0.04, (kind, size)
            every += errors
    assert len(every) > 250 and median(every) < 0.03
