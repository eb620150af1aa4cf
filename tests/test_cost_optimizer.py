"""The optimiser's step in a train plan: its traffic on one rank, part of the compute time, the same when re-priced."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from plain_models import IDS, Decoder, Wide

from colrow.cost_models.compute import optimizer_step_s
from colrow.cost_models.hardware import load_hardware
from colrow.planner import Plan, plan
from colrow.planner.replanning import replan

H100 = load_hardware("h100-sxm")


def traffic_s(made: Plan) -> float:
    """Of AdamW over what one rank holds, from the layout as people read it: four bytes an element, two moments."""
    held = sum(4 * prod(p.local_shape) for p in made.parameters if p.edit.fqn not in made.ties)
    return optimizer_step_s(held, 2 * held, H100)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_train_step_ends_with_the_optimisers(tp: int, tied: bool) -> None:
    made = plan(Decoder(2, tied), IDS, tp=tp, phase="train")
    assert made.cost.optimizer_s == pytest.approx(traffic_s(made), rel=1e-4)  # whole picoseconds, a parameter each
    assert made.cost.total_s == pytest.approx(made.cost.compute_s + made.cost.comm_s)
    assert made.cost.proven and made.cost.lower_bound_s == pytest.approx(made.cost.total_s)
    forward = plan(Decoder(2, tied), IDS, tp=tp)
    assert forward.cost.optimizer_s == 0 and made.cost.compute_s > 2 * forward.cost.compute_s + made.cost.optimizer_s


def test_frozen_parameters_are_not_stepped() -> None:
    model = Decoder(2)
    for block in model.blocks:
        block.requires_grad_(False)
    some, every = plan(model, IDS, tp=1, phase="train"), plan(Decoder(2), IDS, tp=1, phase="train")
    frozen = sum(p.nbytes for p in model.blocks.parameters())
    assert every.cost.optimizer_s - some.cost.optimizer_s == pytest.approx(7 * frozen / 2837e9, rel=1e-3)
    assert every.memory_bytes["optimizer"] - some.memory_bytes["optimizer"] == 2 * frozen


def test_it_is_saved_and_re_priced_alike(tmp_path: Path) -> None:
    made = plan(Decoder(2), IDS, tp=2, phase="train")
    made.save(tmp_path / "train.json")
    loaded = Plan.load(tmp_path / "train.json")
    assert loaded.cost == made.cost and loaded.digest == made.digest
    assert replan(Decoder(2), None, loaded).cost == made.cost
    plan(Decoder(2), IDS, tp=2).save(tmp_path / "prefill.json")
    assert "optimizer_s" not in (tmp_path / "prefill.json").read_text()  # as files were before there was such a part


def test_a_split_pays_for_itself_in_the_optimisers_step() -> None:
    """Left to time alone, a weight is split for its update's sake where its products alone would not pay for it."""
    inputs = {"x": torch.zeros(4, 1024, requires_grad=True)}
    asked = {"tp": 2, "phase": "train", "replicate": "auto"}
    assert plan(Wide().requires_grad_(False), inputs, **asked).sharded_fraction == 0  # type: ignore[arg-type]
    assert plan(Wide(), inputs, **asked).sharded_fraction > 0  # type: ignore[arg-type]
