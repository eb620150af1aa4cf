"""Returned values that are split inside the model: gathered on the way out, or, where that was asked for, not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from colrow.planner.edits import ForwardEdits
from colrow.planner.moves import Move
from colrow.planner.returned_values import parts_of

from .collectives import apply_move
from .groups import TpGroup
from .schedules import Running


class GatherOutputs:
    """Post-hook of the model: its caller sees whole values."""

    def __init__(self, edits: Sequence[ForwardEdits], group: TpGroup, running: Running) -> None:
        self.moves = [[(p.split("."), m) for p, m in one.split_outputs if not m.is_free] for one in edits]
        self.group, self.running = group, running

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The values at the planned paths gathered, in the containers they are returned in."""
        del module, args
        for path, move in self.moves[self.running.index]:
            output = changed_at(output, path, partial(apply_move, move=move, group=self.group))
        return output


def changed_at(tree: Any, path: Sequence[str], change: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with the tensor at ``path`` changed, mappings and objects in place; what is not there is left."""
    if not path or path == [""]:
        return change(tree) if isinstance(tree, Tensor) else tree
    key, rest = path[0], path[1:]
    parts = parts_of(tree) or {}
    if key not in parts:
        return tree
    changed = changed_at(parts[key], rest, change)
    if isinstance(tree, (tuple, list)):
        items = [*tree[: int(key)], changed, *tree[int(key) + 1 :]]
        return items if isinstance(tree, list) else type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if not isinstance(tree, Mapping):
        object.__setattr__(tree, key, changed)  # a frozen dataclass has none of its own
    elif isinstance(tree, MutableMapping):
        tree[next(own for own in tree if str(own) == key)] = changed
    return tree


def gathered(value: Tensor, move: Move, group: TpGroup) -> Tensor:
    """The whole of a value that a model left split, by its ``split_outputs`` move. Not differentiable."""
    whole = Move("all_gather", "slice", move.dim, move.layout)
    return apply_move(value.detach(), whole, group)
