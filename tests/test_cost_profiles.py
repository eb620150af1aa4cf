"""Every shipped profile, kind, implementation and group: positive, rising, continuous, parts sum, nothing unsaid."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from colrow.cost_models.communication import COLLECTIVE_KINDS
from colrow.cost_models.errors import HardwareError
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware

SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24)
NBYTES = (0, 1, 8, 255, 256, 1000, *(round(2 ** (n / 2)) for n in range(20, 67)))  # to 8 GiB
BUSIEST = 1.5  # of a link's rate: more than that no rank can send

Case = tuple[str, int, str, int | None]


def cases(hardware: Hardware) -> Iterator[Case]:
    """Every group that the profile answers for; refusals are tested elsewhere."""
    for kind in COLLECTIVE_KINDS:
        for implementation in hardware.implementations(kind):
            for size in SIZES:
                for nodes in (None, 2):
                    try:
                        hardware.collective_s(kind, 1, size, implementation, nodes)
                    except HardwareError:
                        continue
                    yield kind, size, implementation, nodes


@pytest.mark.parametrize("name", hardware_names())
def test_every_curve_is_positive_and_rises_and_its_parts_sum_to_it(name: str) -> None:
    hardware = load_hardware(name)
    found = list(cases(hardware))
    groups = {size for size in SIZES if size <= hardware.ranks_per_node}
    assert {(kind, size) for kind, size, *_ in found} >= {(kind, size) for kind in COLLECTIVE_KINDS for size in groups}
    for kind, size, implementation, nodes in found:
        before = 0.0
        for nbytes in NBYTES:
            seconds = hardware.collective_s(kind, nbytes, size, implementation, nodes)
            prediction = hardware.predict(kind, nbytes, size, implementation, nodes)
            where = (kind, size, implementation, nodes, nbytes)
            assert seconds > 0 and math.isfinite(seconds), where
            assert seconds >= before * (1 - 1e-12), where
            assert min(prediction.empty_s, prediction.transfer_s) >= 0, where
            assert prediction.empty_s + prediction.transfer_s == pytest.approx(seconds, rel=1e-12), where
            before = seconds


@pytest.mark.parametrize("name", hardware_names())
def test_every_curve_is_continuous_at_every_join(name: str) -> None:
    hardware = load_hardware(name)
    for kind in COLLECTIVE_KINDS:
        collective = getattr(hardware.collectives, kind)
        for implementation, groups in [
            ("library", collective.groups),
            *((other.name, other.groups) for other in collective.alternatives),
        ]:
            joins = sorted({s.from_bytes for group in groups for s in group.segments[1:]})
            for case in cases(hardware):
                if case[0] != kind or case[2] != implementation:
                    continue
                for join in joins:
                    before, after = (
                        hardware.collective_s(kind, at, case[1], implementation, case[3])
                        for at in (join - 1e-3, join + 1e-3)
                    )
                    assert before <= after <= before * (1 + 1e-5), (*case, join)


@pytest.mark.parametrize("name", hardware_names())
def test_only_values_between_measured_rows_of_that_group_have_no_finding(name: str) -> None:
    hardware = load_hardware(name)
    for kind, size, implementation, nodes in cases(hardware):
        collective = getattr(hardware.collectives, kind)
        groups = {"library": collective.groups} | {other.name: other.groups for other in collective.alternatives}
        exact = [
            group for group in groups[implementation]
            if (group.size, group.nodes or math.ceil(group.size / hardware.ranks_per_node))
            == (size, nodes or math.ceil(size / hardware.ranks_per_node)) and group.basis == "measured"
        ]  # fmt: skip
        for nbytes in NBYTES:
            said = hardware.predict(kind, nbytes, size, implementation, nodes).finding
            inside = any(group.min_bytes <= nbytes <= group.max_bytes for group in exact)
            assert (said == "") == inside, (kind, size, implementation, nodes, nbytes, said)


@pytest.mark.parametrize("name", hardware_names())
def test_no_rank_sends_faster_than_its_link(name: str) -> None:
    hardware = load_hardware(name)
    if hardware.link is None:
        pytest.skip("no link is described")
    for kind, sent in (("all_reduce", 2.0), ("all_gather", 1.0), ("reduce_scatter", 1.0), ("broadcast", 1.0)):
        for size in (2, 4, 8):
            share = sent if kind == "broadcast" else sent * (size - 1) / size
            rate = share * 2**33 / hardware.collective_s(kind, 2**33, size)
            assert rate < BUSIEST * hardware.link.bytes_per_s_per_rank, (kind, size, rate)
