"""Collective curves: nonnegative, monotone, continuous; interpolation between group sizes; links between nodes."""

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.cost_models.communication import (
    COLLECTIVE_KINDS,
    SegmentedLine,
    between_sizes,
    inter_node_s,
    traffic_share,
)
from colrow.cost_models.fit_profiles import load_table
from colrow.cost_models.hardware import hardware_names, load_hardware

PROFILES = hardware_names()
MEASURED = [name for name in PROFILES if load_hardware(name).basis == "measured"]
KINDS = st.sampled_from(COLLECTIVE_KINDS)
HARDWARE = st.sampled_from(PROFILES).map(load_hardware)
NBYTES = st.integers(0, 2**34)


@st.composite
def segmented_lines(draw: st.DrawFn) -> SegmentedLine:
    """Any curve the profile schema admits."""
    count = draw(st.integers(1, 3))
    starts = sorted({0, *draw(st.sets(st.integers(1, 2**30), min_size=count - 1, max_size=count - 1))})
    slopes = [draw(st.floats(0, 1e-7)) for _ in starts]
    return SegmentedLine.through(draw(st.floats(1e-7, 1e-2)), starts, slopes)


@given(segmented_lines(), NBYTES, NBYTES)
def test_any_segmented_line_is_monotone_and_at_least_its_latency(line: SegmentedLine, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert line.start_times_s[0] <= line.seconds(low) <= line.seconds(high) * (1 + 1e-12)


@given(segmented_lines())
def test_segments_join_without_a_jump(line: SegmentedLine) -> None:
    for start, slope in zip(line.starts[1:], line.slopes_s_per_byte, strict=False):
        step = line.seconds(start) - line.seconds(start - 1)
        assert step == pytest.approx(slope, rel=1e-3, abs=1e-12 * line.seconds(start) + 1e-18)


def test_segmented_line_adds_each_slope_over_its_own_bytes() -> None:
    line = SegmentedLine.through(5.0, [0, 10, 100], [1.0, 0.5, 2.0])
    assert [line.seconds(n) for n in (0, 4, 10, 30, 100, 103)] == [5, 9, 15, 25, 60, 66]


@given(HARDWARE, KINDS, st.integers(2, 20), NBYTES, NBYTES)
@settings(max_examples=300)
def test_shipped_collectives_are_positive_and_monotone(hardware, kind, size, one, other) -> None:
    if size > hardware.ranks_per_node and hardware.inter_node is None:
        return
    low, high = sorted((one, other))
    low_s, high_s = (hardware.collective_s(kind, nbytes, size) for nbytes in (low, high))
    assert 0 < low_s <= high_s * (1 + 1e-12)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_shipped_collectives_are_continuous_at_every_join(name: str, kind: str) -> None:
    hardware = load_hardware(name)
    groups = getattr(hardware.collectives, kind).groups
    joins = [segment.from_bytes for group in groups for segment in group.segments[1:]]
    assert joins
    for size in range(2, 9):
        for join in joins:
            before, after = (hardware.collective_s(kind, nbytes, size) for nbytes in (join - 1e-3, join + 1e-3))
            assert before <= after <= before * (1 + 1e-5)  # a thousandth of a byte on each side


@given(HARDWARE, KINDS, NBYTES)
def test_a_group_of_one_is_free(hardware, kind, nbytes) -> None:
    assert hardware.collective_s(kind, nbytes, 1) == 0.0


@given(HARDWARE, KINDS, st.sampled_from([(2, 3, 4), (4, 5, 8), (4, 6, 8), (4, 7, 8)]), NBYTES)
def test_unmeasured_sizes_lie_between_their_neighbours(hardware, kind, sizes, nbytes) -> None:
    low, middle, high = (hardware.collective_s(kind, nbytes, size) for size in sizes)
    assert min(low, high) * (1 - 1e-9) <= middle <= max(low, high) * (1 + 1e-9)


def test_between_sizes_is_a_straight_line_in_log_log() -> None:
    # 4 is halfway between 2 and 8 in log2, so its time is the geometric mean.
    assert between_sizes(4, 2, lambda _: 3.0, 8, lambda _: 27.0)(1) == pytest.approx(9.0)


@pytest.mark.parametrize(("name", "bound"), [("h100-sxm", 0.1), ("a100-sxm", 0.1), ("l40s-pcie", 0.2)])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_leaving_out_the_interior_group_size(name: str, bound: float, kind: str) -> None:
    """Size 4 predicted from the fits of 2 and 8 alone, against its measured rows."""
    groups = {group.size: group.line().seconds for group in getattr(load_hardware(name).collectives, kind).groups}
    predict = between_sizes(4, 2, groups[2], 8, groups[8])
    errors = [abs(predict(nbytes) / (us * 1e-6) - 1) for nbytes, us in load_table(name)["collectives"][kind]["4"]]
    assert median(errors) < bound


@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_traffic_share_counts_the_bytes_of_a_simulated_algorithm(kind: str) -> None:
    """Count what the busiest rank sends, in chunks of the whole tensor, for a bandwidth-optimal schedule."""
    for size in (2, 3, 4, 8):
        match kind:
            case "reduce_scatter" | "all_gather":
                sent = (size - 1) * (1 / size)  # a ring passes one chunk on in each of size - 1 steps
            case "all_reduce":
                sent = 2 * (size - 1) * (1 / size)  # one after the other
            case "all_to_all":
                sent = sum((1 / size) / size for peer in range(size - 1))  # a part of its own part to each peer
            case _:
                sent = 1.0  # the root, and every rank that passes it on in a pipeline
        assert traffic_share(kind, size) == pytest.approx(sent)


def test_between_nodes_each_rank_carries_its_part_over_its_own_interface() -> None:
    seconds = inter_node_s("all_reduce", nodes=2, ranks_per_node=8, latency_s=1e-6, bytes_per_s_per_rank=1e9)
    # 2 hops; each of 8 rails reduces 1/8 of 8 GB over 2 nodes, sending 2 * 1/2 of it.
    assert seconds(8_000_000_000) == pytest.approx(2e-6 + 1.0)
    exchange = inter_node_s("all_to_all", nodes=2, ranks_per_node=8, latency_s=1e-6, bytes_per_s_per_rank=1e9)
    # Each of 16 ranks holds 0.5 GB and sends half of it to the other node.
    assert exchange(8_000_000_000) == pytest.approx(1e-6 + 0.25)


@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_crossing_a_node_costs_more_than_staying_within(kind: str) -> None:
    hardware = load_hardware("h100-sxm")
    for nbytes in (4096, 2**20, 2**28):
        if kind != "all_to_all":  # twice the ranks halve what each holds, so its bandwidth term may shrink
            assert hardware.collective_s(kind, nbytes, 16) > hardware.collective_s(kind, nbytes, 8)
        assert not hardware.predicts_within(kind, nbytes, 16)
