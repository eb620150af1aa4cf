"""Predicted against measured steps on a link of known rate; the bench `make bench-links` does more of it."""

from __future__ import annotations

import os
import subprocess

import pytest
from bench import links
from bench.links import Step, limited, refusal, steps_over, wrong_orders


def step(plan: str, predicted: float, measured: float, model: str = "m") -> Step:
    return Step("full", model, plan, predicted, measured, 0.0)


def test_only_clear_predictions_are_judged():
    assert wrong_orders([step("a", 1.0, 2.0), step("b", 1.2, 1.0)]) == ([], 0)
    assert wrong_orders([step("a", 1.0, 2.0), step("b", 1.3, 2.5)]) == ([], 1)
    wrong, judged = wrong_orders([step("a", 1.0, 2.0), step("b", 1.3, 1.9), step("c", 9.0, 9.0)])
    assert (wrong, judged) == (["m on full: a predicted to be faster than b"], 3)
    assert wrong_orders([step("a", 1.0, 2.0), step("b", 9.0, 1.0, model="other")]) == ([], 0)
    assert step("a", 3.0, 2.0).error == 0.5


def test_without_root_it_is_said(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in refusal()
    monkeypatch.setattr(links, "steps_over", lambda link: [])
    assert links.main(["100mbit"]) == 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_namespaces_are_taken_down_whatever_happens(interruption):
    if refusal():
        pytest.skip(f"links cannot be limited here: {refusal()}")
    made: list[str] = []
    with pytest.raises(interruption), limited("100mbit") as names:
        made += names
        assert all(name in namespaces() for name in names)
        raise interruption
    assert not any(name in namespaces() for name in made)
    assert len(made) == 2


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def test_on_a_slow_link_one_rank_is_faster_as_predicted():
    if refusal():
        pytest.skip(f"links cannot be limited here: {refusal()}")
    steps = {s.plan: s for s in steps_over("100mbit", (128,), ("feed-forward",), seconds=3)}
    wrong, judged = wrong_orders(list(steps.values()))
    assert wrong == []
    assert judged >= 2  # tp 1 against both others
    assert steps["tp 1"].predicted_s < steps["tp 2, ffn whole"].predicted_s < steps["tp 2"].predicted_s
    # Four sums of 128 x 128 float32, of which each rank sends at least half at 12.5 MB/s.
    assert steps["tp 2"].measured_s > 4 * 128 * 128 * 4 / 2 / 12.5e6
