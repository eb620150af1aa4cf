"""While an edited model is traced for validation, moves and replaced operators appear as one marker each.

What a move does is tested on its own; what validation must see is that it stands where it was planned, on the value
it was planned for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from colrow.planner.edits import OperatorEdit
from colrow.planner.moves import Move

_state = threading.local()


def are_on() -> bool:
    """Whether this thread traces for validation."""
    return getattr(_state, "on", False)


@contextmanager
def switched_on() -> Iterator[None]:
    """Markers instead of collectives, in this thread."""
    _state.on = True
    try:
        yield
    finally:
        _state.on = False


@torch.library.custom_op("colrow::move", mutates_args=())
def move_marker(x: Tensor, what: str, shape: list[int]) -> Tensor:
    """A move, described."""
    raise RuntimeError("colrow::move exists in traces only")


@move_marker.register_fake
def _(x: Tensor, what: str, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


@torch.library.custom_op("colrow::operator", mutates_args=())
def operator_marker(tensors: list[Tensor], what: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A replaced operator, described."""
    raise RuntimeError("colrow::operator exists in traces only")


@operator_marker.register_fake
def _(tensors: list[Tensor], what: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(shape, dtype=dtype)


def marked_move(x: Tensor, move: Move) -> Tensor:
    """The marker of ``move`` on ``x``."""
    made: Tensor = move_marker(x, described(move), list(moved_shape(tuple(x.shape), move)))
    return made


def marked_operator(tensors: Sequence[Tensor], edit: OperatorEdit, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The marker of a replaced operator with a result of ``shape``."""
    made: Tensor = operator_marker(list(tensors), described(edit), list(shape), dtype)
    return made


def described(what: Move | OperatorEdit) -> str:
    """A move or an operator edit as text, equal exactly where they are."""
    return repr(what)


def moved_shape(shape: tuple[int, ...], move: Move) -> tuple[int, ...]:
    """Local shape after a move's forward step."""
    if move.layout is None or move.forward in ("identity", "all_reduce", "lift"):
        return shape
    length = move.layout.size if move.forward == "all_gather" else move.layout.local
    return (*shape[: move.dim], length, *shape[move.dim + 1 :])
