"""A profile with faster or slower links: bytes take less or more, latencies and compute stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.cost_models.communication import COLLECTIVE_KINDS
from colrow.cost_models.compute import operator_s
from colrow.cost_models.errors import HardwareError
from colrow.cost_models.hardware import load_hardware
from colrow.cost_models.link_speed import with_link_speed

H100 = load_hardware("h100-sxm")


@given(
    st.sampled_from(COLLECTIVE_KINDS), st.integers(0, 2**32), st.sampled_from([2, 8, 16]), st.sampled_from([0.25, 4])
)
def test_only_what_bytes_add_changes(kind, nbytes, size, factor):
    own, scaled = H100.predict(kind, nbytes, size), with_link_speed(H100, factor).predict(kind, nbytes, size)
    assert scaled.empty_s == pytest.approx(own.empty_s)
    assert scaled.transfer_s == pytest.approx(own.transfer_s / factor, rel=1e-6, abs=1e-15)


def test_it_is_called_what_it_is():
    slow = with_link_speed(H100, 0.5)
    assert slow.name == "h100-sxm x0.5"
    assert slow.source.startswith("links of 0.5 times the bandwidth of: ")
    assert operator_s(1e12, 1e9, "bfloat16", slow) == operator_s(1e12, 1e9, "bfloat16", H100)
    assert with_link_speed(H100, 1) is H100


def test_links_slower_than_a_profile_may_say_are_refused():
    with pytest.raises(HardwareError, match="s_per_byte"):
        with_link_speed(H100, 1e-9)
