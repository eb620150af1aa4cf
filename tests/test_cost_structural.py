"""The structural model and routes: rising, continuous, positive; parts sum up; every answer says what it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.cost_models.communication import COLLECTIVE_KINDS
from colrow.cost_models.errors import HardwareError
from colrow.cost_models.hardware import hardware_names, load_hardware
from colrow.cost_models.profile import Link
from colrow.cost_models.structural import envelope, structural_lines, structural_s

KINDS = st.sampled_from(COLLECTIVE_KINDS)
LINKS = st.one_of(
    st.builds(
        Link,
        topology=st.sampled_from(["nvswitch", "pcie", "host"]),
        bytes_per_s_per_rank=st.floats(1e9, 2e12),
        multicast=st.booleans(),
        source=st.just("test"),
    ),
    st.builds(
        Link,
        topology=st.just("nvlink_pairs"),
        bytes_per_s_per_rank=st.floats(1e9, 1e11),
        pair_bytes_per_s=st.floats(1e10, 1e12),
        source=st.just("test"),
    ),
)
HARDWARE = st.sampled_from(hardware_names()).map(load_hardware)


@given(LINKS, KINDS, st.integers(2, 72), st.integers(0, 2**34), st.integers(0, 2**34))
def test_structural_times_rise_and_are_positive(link, kind, size, one, other) -> None:
    low, high = sorted((one, other))
    seconds = structural_s(kind, size, link)
    assert 0 < seconds(low) <= seconds(high)


@given(LINKS, KINDS, st.integers(2, 72), st.floats(1.1, 50))
def test_a_faster_link_never_takes_longer(link, kind, size, factor) -> None:
    faster = link.model_copy(update={"bytes_per_s_per_rank": link.bytes_per_s_per_rank * factor})
    for nbytes in (0, 2**13, 2**20, 2**30):
        assert structural_s(kind, size, faster)(nbytes) <= structural_s(kind, size, link)(nbytes)


@given(LINKS, KINDS, st.integers(2, 72), st.integers(0, 2**34))
def test_the_envelope_is_the_least_line(link, kind, size, nbytes) -> None:
    lines = structural_lines(kind, size, link)
    latency_s, starts, slopes = envelope(lines)
    value = latency_s
    for start, end, slope in zip(starts, [*starts[1:], 2**63], slopes, strict=True):
        value += slope * max(0, min(nbytes, end) - start)
    least = structural_s(kind, size, link)(nbytes)
    one_byte_s = max(slopes) * (1 + 1e-9)  # joins are rounded up to whole bytes
    assert least * (1 - 1e-9) <= value <= least * (1 + 1e-9) + one_byte_s and starts == sorted(set(starts))


@given(st.sampled_from(["custom_graph", "one_shot_graph"]), st.integers(2, 8), st.integers(0, 2**34), st.floats(1, 9))
def test_peer_kernels_rise_and_hand_over_to_the_library(implementation, size, nbytes, factor) -> None:
    hardware = load_hardware("b200-sxm-structural")
    here, there = (hardware.predict("all_reduce", n, size, implementation) for n in (nbytes, nbytes * factor))
    assert 0 < here.seconds <= there.seconds * (1 + 1e-12) and here.basis == "structural"
    exact_s = hardware.collective_s("all_reduce", nbytes, size, implementation)
    assert exact_s <= structural_s("all_reduce", size, hardware.link)(nbytes)
    assert hardware.collective_s("all_reduce", 8192, size, implementation) < 0.7 * hardware.collective_s(
        "all_reduce", 8192, size
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("pcie-box", "all_reduce"), ("b200-sxm-structural", "all_gather"), ("gloo-cpu", "all_reduce")]
)
def test_peer_kernels_have_structure_only_where_they_run(name, kind) -> None:
    with pytest.raises(HardwareError, match="by this implementation"):
        load_hardware(name).collective_s(kind, 8192, 2, "custom_graph")


def test_a_pair_is_faster_over_its_bridge() -> None:
    link = Link(topology="nvlink_pairs", bytes_per_s_per_rank=32e9, pair_bytes_per_s=300e9, source="test")
    assert structural_s("all_reduce", 4, link)(2**26) > 5 * structural_s("all_reduce", 2, link)(2**26)


@given(HARDWARE, KINDS, st.integers(1, 20), st.integers(0, 2**34))
@settings(max_examples=200)
def test_parts_sum_to_the_total_and_findings_are_what_is_not_within(hardware, kind, size, nbytes) -> None:
    if size > hardware.ranks_per_node and hardware.inter_node is None:
        return
    prediction = hardware.predict(kind, nbytes, size)
    assert prediction.seconds == pytest.approx(hardware.collective_s(kind, nbytes, size), rel=1e-12)
    assert prediction.empty_s >= 0 and prediction.transfer_s >= 0
    assert (prediction.finding == "") == hardware.predicts_within(kind, nbytes, size)
    if size > 1 and prediction.finding == "":
        assert prediction.basis == "measured" and prediction.rel_error is not None


def test_every_answer_says_what_it_is() -> None:
    hardware = load_hardware("h100-sxm")
    for arguments, basis, words in [
        (("all_reduce", 2**20, 8), "measured", ""),
        (("all_reduce", 100, 8), "measured", "below the smallest measured message (512 bytes)"),
        (("all_reduce", 2**30, 8), "measured", "beyond the largest measured message (536870912 bytes)"),
        (("all_reduce", 2**20, 6), "between", "between group sizes 4 and 8"),
        (("broadcast", 2**20, 4), "structural", "not measured (structural)"),
        (("all_reduce", 2**20, 16), "structural", "over 2 nodes by formula"),
        (("all_reduce", 2**30, 16), "structural", "over 2 nodes by formula, beyond the largest measured message"),
        (("all_reduce", 2**20, 12), "structural", "over 2 nodes by formula, between group sizes 4 and 8"),
        (("all_reduce", 100, 6), "between", "between group sizes 4 and 8, below the smallest measured message"),
        (("broadcast", 2**20, 3), "structural", "between group sizes 2 and 4, not both measured (structural)"),
        (("broadcast", 2**34, 4), "structural", "not measured (structural), beyond the largest"),
        (("all_reduce", 2**20, 3, "one_shot_graph"), "between", "between group sizes 2 and 4"),
    ]:
        prediction = hardware.predict(*arguments)
        assert prediction.basis == basis and words in prediction.finding, arguments


@pytest.mark.parametrize("name", ["a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm"])
def test_for_small_messages_the_implementation_matters_more_than_the_gpu(name: str) -> None:
    hardware = load_hardware(name)
    by = {kind: hardware.collective_s("all_reduce", 16384, 8, kind) for kind in hardware.implementations("all_reduce")}
    assert by["one_shot_graph"] < by["library"] < by["custom_eager"] or name == "b200-sxm"
    assert max(by.values()) / min(by.values()) > 3.5


def test_measured_groups_over_nodes_are_found_by_their_nodes() -> None:
    hardware = load_hardware("a100-sxm")
    assert hardware.predict("all_reduce", 2**20, 2, "library_graph", nodes=2).basis == "measured"
    assert hardware.predict("all_reduce", 2**20, 2, nodes=2).basis == "structural"
    on_one, on_two = (hardware.collective_s("all_reduce", 2**20, 8, "library_graph", nodes=n) for n in (1, 2))
    assert on_two > 2 * on_one
    for nodes in (0, 3):
        with pytest.raises(HardwareError, match="nodes: the group does not fit on them"):
            hardware.collective_s("all_reduce", 8, 2, nodes=nodes)


def test_one_rank_a_node_pays_for_starting_a_collective_too() -> None:
    hardware = load_hardware("a100-sxm")
    empty = hardware.collective_s("all_reduce", 8, 2, nodes=2)
    # Measured, two A100 over HDR InfiniBand, one a node, 8 to 64 bytes: 19.2 to 20.7 us (nccl-tests, issue 150).
    assert empty == pytest.approx(19.6e-6, rel=0.2)
    assert empty > 2 * hardware.inter_node.latency_s + 6e-6


def test_an_implementation_without_curves_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(HardwareError, match="got 'library_graph', need library, custom_graph, custom_eager"):
        load_hardware("h100-sxm").collective_s("all_reduce", 8, 2, "library_graph")


@pytest.mark.parametrize("damage", [{"topology": "nvlink_pairs"}, {"pair_bytes_per_s": 3e11}])
def test_a_pairs_bandwidth_goes_with_pairs(damage) -> None:
    good = {"topology": "nvswitch", "bytes_per_s_per_rank": 3e11, "source": "test"}
    with pytest.raises(ValueError, match="pair_bytes_per_s goes with topology nvlink_pairs"):
        Link.model_validate({**good, **damage})
