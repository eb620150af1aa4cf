"""What stands in an edited body where a call expression stood.

A replacement is compared by value, so that blocks with equal edits share one edited class; whatever differs between
ranks (the group) is part
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from colrow.cost_models.errors import ValidationError
from colrow.planner.edits import CallEdit, OperatorEdit
from colrow.planner.moves import Move

from . import markers
from .bags import embedding_bag_or_marker
from .clones import Replacement
from .collectives import apply_move
from .groups import TpGroup
from .running_statistics import norm_of_shard_or_marker
from .schedules import Running
from .vocab import mean_of_shard, vocab_parallel_cross_entropy, vocab_parallel_embedding


@dataclass(frozen=True)
class MovedResult:
    """The call as it is; its result is moved."""

    move: Move
    group: TpGroup

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``move(func(...))``."""
        return _moved(func(*args, **kwargs), self.move, self.group)


@dataclass(frozen=True)
class EditedCall:
    """The general form: arguments moved, literals made local, the operator replaced, the result moved."""

    where: str
    edit: CallEdit
    group: TpGroup

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the local form of ``func(*args, **kwargs)``."""
        edit = self.edit
        if edit.arguments or edit.integers:
            leaves = iter(range(1 << 30))
            moves = dict(edit.arguments)
            literals = {leaf: (wanted, local) for leaf, wanted, local in edit.integers}
            args, kwargs = self._changed((args, kwargs), leaves, moves, literals)
        result = self._operator(func, args, kwargs) if edit.operator is not None else func(*args, **kwargs)
        return result if edit.result is None else _moved(result, edit.result, self.group)

    def _changed(
        self, tree: Any, leaves: Iterator[int], moves: dict[int, Move], literals: dict[int, tuple[int, int]]
    ) -> Any:
        """The arguments with their planned leaves changed; leaves count as in `planner.call_record.flat`."""
        if isinstance(tree, (tuple, list)):
            changed = [self._changed(item, leaves, moves, literals) for item in tree]
            return changed if isinstance(tree, list) else tuple(changed)
        if isinstance(tree, dict):
            return {key: self._changed(value, leaves, moves, literals) for key, value in tree.items()}
        if isinstance(tree, slice):
            return slice(
                *(self._changed(bound, leaves, moves, literals) for bound in (tree.start, tree.stop, tree.step))
            )
        leaf = next(leaves)
        if leaf in moves:
            return _moved(tree, moves[leaf], self.group)
        if leaf in literals:
            wanted, local = literals[leaf]
            if tree == -1 or tree == local:
                return tree
            if tree != wanted:
                raise ValidationError(self.where, "a literal changed since the plan was made", got=tree, need=wanted)
            return local
        return tree

    def _operator(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = self.edit.operator
        assert operator is not None
        match operator.name:
            case "vocab_embedding":
                return _vocab_embedding(operator, self.group, *args, **kwargs)
            case "vocab_embedding_bag":
                return embedding_bag_or_marker(operator, self.group, *args, **kwargs)
            case "vocab_cross_entropy":
                return _vocab_cross_entropy(operator, self.group, *args, **kwargs)
            case "mean_of_shard":
                return _mean_of_shard(operator, self.group, *args, **kwargs)
            case "norm_of_shard":
                return norm_of_shard_or_marker(operator, self.group, func, args, kwargs)
            case "rank_random":
                return _rank_random(self.group, func, args, kwargs)


def replacement(where: str, edit: CallEdit, group: TpGroup) -> Replacement:
    """The cheapest form of an edit."""
    if edit.result is not None and not (edit.arguments or edit.integers or edit.operator):
        return MovedResult(edit.result, group)
    return EditedCall(where, edit, group)


@dataclass(frozen=True)
class Scheduled:
    """The replacement of the schedule that runs; None where that leaves the call as it is."""

    forms: tuple[Replacement | None, ...]
    running: Running

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call in the running schedule's form."""
        form = self.forms[self.running.index]
        return func(*args, **kwargs) if form is None else form(func, *args, **kwargs)


def scheduled(where: str, edits: Sequence[CallEdit | None], group: TpGroup, running: Running) -> Replacement:
    """The cheapest form of a call's edits in all schedules."""
    forms = tuple(None if edit is None else replacement(where, edit, group) for edit in edits)
    if forms[0] is not None and all(form == forms[0] for form in forms):
        return forms[0]
    return Scheduled(forms, running)


def _moved(x: Tensor, move: Move, group: TpGroup) -> Tensor:
    return markers.marked_move(x, move) if markers.are_on() else apply_move(x, move, group)


def _vocab_embedding(
    operator: OperatorEdit,
    group: TpGroup,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` on split rows. (``torch.embedding`` takes the weight first.)"""
    del norm_type
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise ValidationError("embedding", "max_norm, scale_grad_by_freq and sparse are not available on split rows")
    if weight.dtype in (torch.int64, torch.int32):
        ids, weight = weight, ids
    assert operator.layout is not None
    if markers.are_on():
        return markers.marked_operator([ids, weight], operator, (*ids.shape, weight.shape[1]), weight.dtype)
    return vocab_parallel_embedding(ids, weight, operator.layout, group, padding_idx)


def _vocab_cross_entropy(
    operator: OperatorEdit,
    group: TpGroup,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` on split classes."""
    if weight is not None or size_average is not None or reduce is not None:
        raise ValidationError("cross_entropy", "class weights and the old reduction arguments are not available")
    assert operator.layout is not None
    if markers.are_on():
        shape = labels.shape if reduction == "none" else ()
        return markers.marked_operator([logits, labels], operator, shape, logits.dtype)
    return vocab_parallel_cross_entropy(
        logits, labels, operator.layout, group, ignore_index, reduction, label_smoothing
    )


def _mean_of_shard(
    operator: OperatorEdit,
    group: TpGroup,
    x: Tensor,
    dim: int | list[int] | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    assert operator.layout is not None
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    source = x if dtype is None else x.to(dtype)
    if markers.are_on():
        gone = {d % x.dim() for d in dims}
        kept = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
        return markers.marked_operator([source], operator, kept, source.dtype)
    return mean_of_shard(source, dims, operator.dim, operator.layout, group, keepdim)


def _rank_random(group: TpGroup, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draws differently on every rank, and leaves the common random state as one draw would have on any rank; as it
    was where nothing is drawn (dropout in evaluation), so that sampled tokens are the dense model's."""
    if markers.are_on():
        return func(*args, **kwargs)
    device = args[0].device
    devices = [device] if device.type == "cuda" else []
    before = torch.get_rng_state()
    seed = int(torch.randint(1 << 62, (), dtype=torch.int64).item())  # the same on every rank
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed + group.rank) % (1 << 63))
        fresh = _random_state(device)
        made = func(*args, **kwargs)
        is_drawn = not torch.equal(_random_state(device), fresh)
    if not is_drawn:  # alike on all ranks: their parts have one shape
        torch.set_rng_state(before)
    return made


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
