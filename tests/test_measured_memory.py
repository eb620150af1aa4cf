"""Predicted bytes of a rank against bytes alive in a real run, by kind."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from measured_memory import compared, missed
from torch import nn

from colrow.cost_models.memory import collective_bytes
from colrow.planner import plan
from colrow.planner.live_values import forward_peak_bytes
from colrow.planner.trace import trace


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("phase", ["train", "prefill"])
def test_two_ranks_hold_what_was_predicted(name: str, phase: str) -> None:
    one = compared(name, "small", phase, 2)
    kinds = {"weights", "gradients", "optimizer", "activations", "peak"} if phase == "train" else {"weights", "peak"}
    assert {kind for kind, nbytes in one.measured.items() if nbytes} >= kinds
    assert not missed(one)


def test_the_measure_counts_storages_and_lets_go() -> None:
    there = torch.zeros(10)
    with LiveBytes([there]) as live:
        made = there + 1
        assert live.now == 40
        view = made[2:]
        view.mul_(2)
        assert live.now == 40  # a view and a change in place are no new storage
        larger = torch.cat([made, made])
        assert live.now == 120
        del made, view
        assert live.now == 80 and live.peak == 120
        there.add_(1)
    assert larger.numel() == 20 and live.now == 80


class Kept(nn.Module):
    """A sigmoid and a dropout between two layers; sums that keep nothing."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)
        self.drop = nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.sigmoid(self.first(x)) + 1.0)) + x


@pytest.mark.parametrize(("rate", "wide"), [(0.0, 2), (0.5, 3)])
def test_what_autograd_keeps(rate: float, wide: int) -> None:
    """The sigmoid's result, what was drawn, and the second layer's operand; of the first layer's the model's input."""
    x = torch.zeros(8, 16)
    made = plan(Kept(rate).train(), {"x": x}, tp=1, phase="train")
    assert made.memory_bytes["activations"] == wide * 8 * 64 * 4
    model = Kept(rate).train()
    with LiveBytes([*model.parameters(), x]) as live:
        result = model(x).sum()
    assert live.now == made.memory_bytes["activations"] + result.nbytes


class Locals(nn.Module):
    """Blocks whose forward keeps a wide local past its last reader, and assigns it anew only when the next is there."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Local() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Local(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(1, 8)
        narrow = wide.sum(1, keepdim=True)
        wide = (x + narrow).repeat(1, 16)
        narrow = wide.sum(1, keepdim=True)
        return x * narrow


@pytest.mark.parametrize("fold", [True, False])
def test_locals_outlive_their_last_reader(fold: bool) -> None:
    """Read last, the narrower of the two is held until the wider one is made: 24 rows, not 16."""
    x = torch.zeros(64, 16)
    graph = trace(Locals(3), {"x": x}, fold=fold)
    predicted = forward_peak_bytes(graph, [node.nbytes for node in graph.nodes])
    with torch.no_grad(), LiveBytes([x]) as live:
        Locals(3)(x)
    assert 24 * x.nbytes < live.peak == predicted


def test_buffers_of_collectives() -> None:
    assert [collective_bytes(kind, 1000, 4) for kind in ("all_reduce", "all_gather", "reduce_scatter")] == [
        1000, 1250, 2000,
    ]  # fmt: skip
    assert collective_bytes("all_reduce", 1000, 1) == 0


def test_a_cap_holds_for_all_that_is_reported() -> None:
    """Where more is alive at once than was set aside, the plan is made again with less room, or refused."""
    x = torch.zeros(64, 16)
    free = plan(Kept(0.0).train(), {"x": x}, tp=2, phase="train", replicate="auto")
    held = sum(free.memory_bytes.values())
    for share in (1.0, 0.9, 0.8):
        try:
            capped = plan(
                Kept(0.0).train(), {"x": x}, tp=2, phase="train", replicate="auto", memory_gb=share * held / 1e9
            )
        except Exception as error:
            assert "no plan for 2 ranks fits" in str(error)
        else:
            assert sum(capped.memory_bytes.values()) <= share * held
