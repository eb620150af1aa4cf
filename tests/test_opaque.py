"""A submodule that cannot be traced is one operator, whole on every rank; all around it is split, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.cost_models.errors import TraceError
from colrow.planner.planning import plan
from colrow.planner.trace import trace
from colrow.rewrite.verification import verify

WIDTH = 32
INPUTS = {"x": torch.randn(2, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


class Branching(nn.Module):
    """Takes one of two ways by the values it is given, and says how large they were."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        if x.mean() > 0:
            return self.one(x) * scale, {"size": x.abs().mean()}
        return self.other(x).tanh(), {"size": x.abs().mean()}


class Found(nn.Module):
    """As many rows come out as are positive: nothing but a run says how many there are, so no shape is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inner(x).flatten(0, 1)
        return rows[rows.sum(-1) > 0].sum(0)


class Block(nn.Module):
    def __init__(self, inside: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.inside = inside(4 * WIDTH) if inside is not None else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.up(self.norm(x)))
        if self.inside is not None:
            found, sizes = self.inside(wide, scale=0.5)
            wide = wide + found * sizes["size"]
        return x + self.down(wide)


class Between(nn.Module):
    """A tower that cannot be traced between blocks that can."""

    def __init__(self, tower: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.before = nn.ModuleList([Block() for _ in range(2)])
        self.tower = tower(WIDTH)
        self.after = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.before:
            x = block(x)
        seen = self.tower(x)
        x = x + (seen[0] if isinstance(seen, tuple) else seen)
        for block in self.after:
            x = block(x)
        return x


class Within(nn.Module):
    """One in each of three equal blocks, on what is split there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(Branching) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Sizes(nn.Module):
    """Wants sizes that fit its images: no guess does, so that the module around it is taken."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = _Parts(width)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.ones_like(x[0, :, 0]).long() + (x[0, :, 0] > 1e9)
        return self.parts(x[0], lengths).expand_as(x)


class _Parts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([self.layer(part) for part in x.split(lengths.tolist())])


def build(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().double()


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch": (lambda: Between(Branching), "tower (1x)"),
    "a number of rows": (lambda: Between(Found), "tower (1x)"),
    "in every block": (Within, "layers.*.inside (3x)"),
    "arguments that no guess meets": (lambda: Between(Sizes), "tower (1x)"),
}


@pytest.mark.parametrize(("case", "tp"), [(case, 2) for case in CASES] + [("in every block", 3)])
def test_it_is_one_operator_and_the_rest_is_right(case: str, tp: int) -> None:
    model, place = CASES[case]
    made = plan(build(model), INPUTS, tp=tp, phase="train")
    assert any(f.startswith(f"{place} cannot be traced") for f in made.findings), made.findings
    whole = {
        path.split(".")[-3] for path, _, reason in made.unsplit if reason == "read by a module that cannot be traced"
    }
    assert whole and not any("up" in path or "down" in path for path, _, _ in made.unsplit), made.unsplit
    report = verify(lambda: build(model), INPUTS, made)
    assert report.ok(), report.explain()
    assert any("one.weight" in name or "other.weight" in name or "layer.weight" in name or "inner" in name
               for name in report.gradient_errors)  # fmt: skip


def test_folded_and_unfolded_are_the_same_graph() -> None:
    folded, whole = (trace(build(Within), INPUTS, fold=fold) for fold in (True, False))
    assert [(n.op, n.shape, n.module) for n in folded.nodes if n.op == "opaque_module"] == [
        (n.op, n.shape, n.module) for n in whole.nodes if n.op == "opaque_module"
    ]
    assert sum(n.op == "opaque_module" for n in folded.nodes) == 3


def test_the_model_is_as_before() -> None:
    model = build(CASES["a branch"][0])
    trace(model, INPUTS)
    assert "forward" not in vars(model.get_submodule("tower"))


def test_what_fails_in_the_model_itself_is_refused() -> None:
    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(TraceError, match="nor with known values"):
        trace(Itself(), (torch.zeros(2, 8),))


def test_a_submodule_that_does_not_run_at_all_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    with pytest.raises(TraceError, match="not today"):
        trace(nn.Sequential(nn.Linear(8, 8), Broken()), (torch.zeros(2, 8),))


class Nearest(nn.Module):
    """The nearest rows of a table; which is nearest has no gradient, and the table learns by other means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, width))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.table.expand(len(x), -1, -1)).argmin(-1)
        return self.table[nearest] if int(nearest.max()) >= 0 else x


class Quantised(nn.Module):
    """Rows of a table take the gradients of what they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.nearest = Nearest(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(torch.relu(self.up(x)))
        return self.out(made + (self.nearest(made) - made).detach())


def test_no_gradient_is_reduced_that_does_not_come() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Quantised().double()

    made = plan(build(), INPUTS, tp=2, phase="train")
    report = verify(build, INPUTS, made)
    assert report.ok(), report.explain()
    assert any("cannot be traced" in finding for finding in made.findings)
