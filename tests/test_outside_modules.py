"""Modules from outside: an activation made at import, for all, that no model holds; models of other packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from outside_modules import PACKAGES
from torch import nn

from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

activation = nn.GELU()


class Head(nn.Module):
    """A head as RoBERTa's: the activation between its layers is no child of it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(activation(self.dense(x))))


@pytest.mark.parametrize("tp", [2, 4])
def test_a_call_of_a_module_outside_of_the_model_is_its_callers(tp: int) -> None:
    inputs = (torch.randn(2, 3, 16, dtype=torch.float64),)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Head(), nn.Linear(32, 16)).double()

    made = plan(build(), inputs, tp=tp, phase="train")
    report = verify(build, inputs, made)
    assert made.sharded_fraction > 0.9
    assert report.ok(), report.explain()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_that_none_of_us_wrote(name: str) -> None:
    package, made = PACKAGES[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    make, inputs = made()

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = make().double()
        return model

    p = plan(build(), inputs, tp=2, phase="train")
    report = verify(build, inputs, p)
    assert p.sharded_fraction > 0.9, p.unsplit
    assert report.ok(), report.explain()


def _word(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_they_come_from_can_be_installed_by_one_extra_and_is_pinned() -> None:
    root = Path(__file__).parent.parent
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["breadth"]
    pinned = {
        _word(line.split("==")[0]) for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
    }
    packages = {_word(package) for package, _ in PACKAGES.values()}
    assert len(PACKAGES) >= 27 and len(packages) >= 8
    assert packages <= {_word(re.split("[<>=]", name)[0]) for name in extra} <= pinned
    assert not any(_word(name).startswith(("torchvision", "nvidia")) for name in pinned)
