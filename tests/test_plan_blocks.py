"""A plan block by block: equal ones together, paths relative to their block."""

from __future__ import annotations

from dataclasses import replace

import pytest
from changed_plans import with_schedule
from small_plans import all_reduce, small_plan

from colrow.planner.layout import even
from colrow.rewrite.plan_blocks import block_of, distinct_blocks, relative_text


@pytest.mark.parametrize(
    ("path", "known", "block"),
    [
        ("model.layers.10.mlp.up.weight", (), "model.layers.10"),
        ("layers.0.experts.3.weight", (), "layers.0"),
        ("net.first.weight", ("net.first",), "net.first"),
        ("net.first.weight", (), ""),
        ("embed.weight", (), ""),
        ("0.weight", (), "0"),
    ],
)
def test_block_of_a_path(path, known, block):
    assert block_of(path, known) == block


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("add in m.layers.3.mlp", "add in mlp"),
        ("gradient of add in m.layers.3", "gradient of add"),
        ("norm in m.layers.4.norm", "norm in the next block's norm"),
        ("add in m.layers.4", "add in the next block"),
        ("add in m.layers.2.mlp", "add in the previous block's mlp"),
        ("add in m.layers.30.mlp", "add in m.layers.{i+27}'s mlp"),
        ("m.layers.3.attn.o", "attn.o"),
        ("m.layers.3", ""),
        ("layer_norm in m.layers_norm.3.x", "layer_norm in m.layers_norm.3.x"),
        ("the model's output", "the model's output"),
    ],
)
def test_paths_are_relative_to_their_block(text, shown):
    assert relative_text(text, "m.layers.3") == shown


def test_equal_blocks_come_once_with_their_count():
    outside, block = distinct_blocks(small_plan())
    assert (outside.over, outside.count) == ("", 1)
    assert [name for name, _ in outside.parameters][0] == "embed.weight"
    assert (block.over, block.count) == ("layers.{0-2}", 3)
    assert [name for name, _ in block.parameters] == ["attn.qkv.weight", "attn.o.weight", "attn.o.bias", "norm.weight"]
    assert [(t.over, t.count) for t in block.traffic] == [("0-1", 2), ("2", 1)]  # the last one's reader is outside
    assert [c.forced_by for c in block.traffic[0].collectives][0] == "add in the next block's norm"


def test_a_block_with_another_layout_is_another_block():
    changed = tuple(
        replace(p, edit=replace(p.edit, layout=even(8, 2), dim=0)) if p.edit.fqn == "layers.1.norm.weight" else p
        for p in small_plan().parameters
    )
    blocks = distinct_blocks(small_plan(parameters=changed))
    assert [(b.over, b.count) for b in blocks[1:]] == [("layers.{0,2}", 2), ("layers.1", 1)]


def test_blocks_without_parameters_are_shown():
    extra = all_reduce("tail.0", "tail.0", "add in tail.0")
    blocks = distinct_blocks(with_schedule(small_plan(), collectives=(extra,)))
    assert [b.over for b in blocks] == ["", "layers.{0-2}", "tail.0"]
    assert blocks[-1].traffic[0].collectives[0].forced_by == "add"
