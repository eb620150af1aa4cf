"""Folding: tracing equal blocks once gives the graph that tracing them all gives, or is not done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_form import form
from plain_models import HIDDEN, IDS, Attention, Block, Decoder, Mlp, Norm
from torch import Tensor, nn

from colrow.planner.folding import Folding
from colrow.planner.graph import LEAVES, Graph
from colrow.planner.sources import load_source
from colrow.planner.trace import Inputs, trace


def traced_blocks(graph: Graph) -> set[str]:
    """Blocks with operators that are no copies."""
    own = {n.module for n in graph.nodes if n.op not in LEAVES and n.template == n.index and n.module}
    return {b.fqn for b in graph.blocks if any(m == b.fqn or m.startswith(f"{b.fqn}.") for m in own)}


def same(model: nn.Module, inputs: Inputs) -> Graph:
    """The folded trace, which is the unfolded one."""
    folded, plain = form(trace(model, inputs)), form(trace(model, inputs, fold=False))
    for part in plain:
        assert folded[part] == plain[part], part
    return trace(model, inputs)


class Scaled(Block):
    """Reads its own index."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.index + 1)


class Remembers(Block):
    """Decides by its own index."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.index else x


class Counts(nn.Module):
    """Two blocks that differ in a number that is not their position."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(4))
        for block, scale in zip(self.blocks, (1.0, 1.0, 3.0, 3.0), strict=True):
            block.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * block.scale
        return x


class Repeats(nn.Module):
    """Calls its blocks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(index) for index in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class Growing(nn.Module):
    """Calls equal blocks on different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return x


class Shares(nn.Module):
    """Equal blocks with one norm between them, and a layer of their own each."""

    def __init__(self) -> None:
        super().__init__()
        norm = Norm()
        self.blocks = nn.ModuleList(nn.Sequential(norm, Attention()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Mixed(nn.Module):
    """Two kinds of blocks in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() if index % 2 else Attention() for index in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Couple(nn.Module):
    """Two values in, two out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x) + y, self.second(y) * x


class Couples(nn.Module):
    """Blocks of two values; the first is called on one value twice where asked for."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.blocks = nn.ModuleList(Couple() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x if self.joined else x + 1
        for block in self.blocks:
            x, y = block(x, y)
        return x, y


class Writes(Mlp):
    """Changes a tensor through a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y[:, 1:].mul_(2)
        return y


X = (torch.zeros(2, 5, HIDDEN),)


def listed(block: Callable[[int], nn.Module], count: int = 3) -> nn.Module:
    model = Decoder(0)
    model.blocks = nn.ModuleList(block(index) for index in range(count))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_is_traced_once_per_kind_of_block(tied: bool) -> None:
    graph = same(Decoder(4, tied), IDS)
    assert traced_blocks(graph) == {"blocks.0"}
    assert [b.fqn for b in graph.blocks] == [f"blocks.{n}" for n in range(4)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "mixtral", "gemma2"])
def test_hugging_face_models(model_type: str) -> None:
    source = load_source(f"hf:{model_type}", small=True, seq=8, dtype="fp32")
    graph = same(source.model, source.example_inputs)
    assert "folding" not in graph.assumptions


@pytest.mark.parametrize("block", [Scaled, Remembers])
def test_a_block_that_reads_its_own_index_is_not_folded(block: type[nn.Module]) -> None:
    graph = same(listed(block), IDS)
    assert traced_blocks(graph) == {f"blocks.{n}" for n in range(3) if n or block is Scaled}
    assert graph.assumptions["folding"].startswith("off: ")
    assert "differs between its copies" in graph.assumptions["folding"]


def test_a_number_that_is_no_position_keeps_blocks_apart() -> None:
    graph = same(Counts(), X)
    assert traced_blocks(graph) == {"blocks.0", "blocks.2"}


@pytest.mark.parametrize(("model", "inputs"), [(Repeats, X), (Growing, X)])
def test_unlike_calls_of_one_template_are_not_folded(model: type[nn.Module], inputs: Inputs) -> None:
    graph = same(model(), inputs)
    assert graph.assumptions["folding"].startswith("off: a folded block is called")


def test_blocks_of_two_values() -> None:
    graph = same(Couples(joined=False), X)
    assert traced_blocks(graph) == {"blocks.0"}


def test_one_value_passed_twice_is_not_two_values() -> None:
    graph = same(Couples(joined=True), X)
    assert graph.assumptions["folding"].startswith("off: a folded block is called")


def test_copies_of_a_block_that_writes_are_pinned_too() -> None:
    graph = same(listed(lambda index: Writes()), IDS)
    assert traced_blocks(graph) == {"blocks.0"}
    pinned = {graph.nodes[index].module for index in graph.whole}
    assert {f"blocks.{n}" for n in range(3)} <= pinned


def test_blocks_that_share_a_parameter_are_not_folded() -> None:
    graph = same(Shares(), X)
    assert traced_blocks(graph) >= {"blocks.0", "blocks.1", "blocks.2"}
    assert len(graph.ties) == 2


def test_blocks_of_two_kinds_in_turn() -> None:
    graph = same(Mixed(), X)
    assert traced_blocks(graph) == {"blocks.0", "blocks.1"}


def test_a_model_is_left_as_it_was() -> None:
    model = listed(Scaled)
    trace(model, IDS)
    assert [block.index for block in model.blocks] == [0, 1, 2]
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.isfinite(model(**IDS)).all()


def test_only_copies_need_no_tensors() -> None:
    folding = Folding(Decoder(3))
    assert folding.covers("blocks.2.mlp.up.weight") and not folding.covers("blocks.0.mlp.up.weight")
    assert not folding.covers("head.weight")
    assert not Folding(Decoder(3), enabled=False).covers("blocks.2.mlp.up.weight")
