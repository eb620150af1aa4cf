"""Operators that keep groups of channels apart: how many groups there are, and how many each rank has of split
channels."""

from __future__ import annotations

from typing import Any

import torch

from .graph import Node
from .placement import Shard
from .rules.convolutions import CONVOLUTIONS, TRANSPOSED

GROUPED = frozenset({*CONVOLUTIONS, *TRANSPOSED, "group_norm"})


def groups_of(node: Node) -> int:
    """How many groups of channels an operator keeps apart; 1 where it has none."""
    match node.op:
        case "group_norm":
            return int(node.arguments[1])
        case op if op in GROUPED:
            return int(node.arguments[6] if len(node.arguments) > 6 else node.keywords.get("groups", 1))
    return 1


def local_groups(node: Node, x: Any) -> int | None:
    """How many groups each rank computes of an operator whose channels are split; None where it needs no other
    number."""
    groups = groups_of(node)
    if not isinstance(x, Shard) or x.dim != 1 or (groups == 1 and node.op != "group_norm"):
        return None
    return x.layout.local // (x.layout.size // groups)


def with_groups(node: Node, groups: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments with another number of groups, as a trace has them: without defaults at the end."""
    at = 1 if node.op == "group_norm" else 6
    arguments = (*node.arguments[:at], groups, *node.arguments[at + 1 :])
    schema = getattr(getattr(torch.ops.aten, node.op), node.overload or "default")._schema.arguments
    while len(arguments) > 1 and schema[len(arguments) - 1].default_value == arguments[-1]:
        arguments = arguments[:-1]
    return arguments, node.keywords
