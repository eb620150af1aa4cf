"""Optimisers over split parameters step as over dense ones, or are refused at their first step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from split_model import dense_model, specs
from test_regions import split
from test_training import loss_of
from torch import Tensor, nn

from colrow.cost_models.errors import UsageError
from colrow.planner import plan
from colrow.rewrite import parallelize
from colrow.rewrite.groups import tp_mesh
from colrow.rewrite.optimizer_trial import check_optimizers_of
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import ParameterSpec

DENSE = dense_model()
SIZE = 3  # 11 words and 13 hidden units are padded, 6 heads divide
Made = Callable[[Any], torch.optim.Optimizer]


class Step(torch.optim.Optimizer):
    """``p -= 0.1 * update(p, gradient)``."""

    def __init__(self, params: Any, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(params, {"update": update})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.1 * group["update"](p, p.grad))


def trained(model: nn.Module, made: Made, named: str) -> nn.Module:
    optimizer = made([p for name, p in model.named_parameters() if name.endswith(named)])
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def right(made: Made, named: str = "") -> None:
    dense = dict(trained(copy.deepcopy(DENSE), made, named).named_parameters())
    known = {spec.fqn: spec for spec in specs(SIZE)}

    def run() -> None:
        model = split(copy.deepcopy(DENSE), SIZE)
        check_optimizers_of(model, tp_mesh(None))
        for name, p in trained(model, made, named).named_parameters():
            found = known.get(name, ParameterSpec(name)).dense(p.full_tensor())
            torch.testing.assert_close(found, dense[name], rtol=1e-8, atol=1e-8, msg=name)

    run_ranks(run, SIZE)


RIGHT: dict[str, Made] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=False),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "elementwise": lambda ps: Step(ps, lambda p, gradient: gradient.tanh() + 0.1 * p),
    "norms": lambda ps: Step(ps, lambda p, gradient: gradient * (p.norm() / gradient.norm())),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="colrow")
        right(RIGHT[name])


def refused(made: Made, named: str = "") -> str:
    said: list[str] = []

    def run() -> None:
        model = split(copy.deepcopy(DENSE), SIZE)
        check_optimizers_of(model, tp_mesh(None))
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        with pytest.raises(UsageError) as error:
            trained(model, made, named)
        said.append(str(error.value))
        assert all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())

    run_ranks(run, SIZE)
    assert len(set(said)) == 1
    return said[0]


def test_a_mean_over_padding_is_refused() -> None:
    made: Made = lambda ps: Step(ps, lambda p, gradient: gradient / gradient.square().mean().sqrt())  # noqa: E731
    assert "embed.weight: its dim does not divide by the ranks" in refused(made)
    right(made, "q.weight")  # 4 of 12 rows on every rank


def test_a_rate_of_the_padded_shape_is_refused() -> None:
    made: Made = lambda ps: torch.optim.Muon(ps, adjust_lr_fn="match_rms_adamw")  # noqa: E731
    assert "torch.optim.Muon: this optimiser would not step" in refused(made, "up.weight")


def test_an_optimiser_that_knows_no_dtensors_is_refused() -> None:
    assert "does not step parameters that are DTensors" in refused(lambda ps: torch.optim.Adafactor(ps))
    fused: Made = lambda ps: torch.optim.SGD(ps, lr=0.1, fused=True)  # noqa: E731
    assert "_fused_sgd_" in refused(fused)


def test_one_that_cannot_be_tried_warns() -> None:
    class Named(Step):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lambda p, gradient: gradient)

    with pytest.warns(UserWarning, match="Named could not be tried on a split parameter"):
        right(lambda ps: Named(ps))


def test_parallelize_has_optimisers_looked_at() -> None:
    dense, x = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), torch.randn(3, 4)
    made = plan(dense, (x,), tp=2, phase="train")

    def run() -> None:
        model = parallelize(copy.deepcopy(dense), made)
        model(x).sum().backward()
        with pytest.raises(UsageError, match="Adafactor"):
            torch.optim.Adafactor(model.parameters()).step()

    run_ranks(run, 2)
