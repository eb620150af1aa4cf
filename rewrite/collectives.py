"""Moves executed: what the forward code calls to communicate, each with its backward step.

One autograd function serves every move, because a move is a forward and a backward step (DESIGN section 2). The
backward of a move is the move with its steps exchanged, so gradients of gradients are right too. Collectives are the
functional operators themselves, called by group name: 14 us a call and traceable by export and compile (the Python
wrappers take 68 us; 2 CPU cores, torch 2.13, 2026-11). Their own autograd formulas are written in Python and, as no
gradient is asked of them here, skipped.

Replicated intervals (kv heads fewer than ranks): a value is on every holder, a gradient is a partial sum over the
holders (see ``slices``). So ``reduce_scatter`` and ``slice`` serve every holder in forward and the first holder in
backward; ``all_gather`` reads the first holder in forward and adds the holders in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.cost_models.errors import ValidationError
from colrow.planner.layout import Layout, balanced
from colrow.planner.moves import Move, Step

from .groups import TpGroup
from .slices import canonical, is_plain, local_part, local_parts, padded_part, summed_parts

_functional = torch.ops._c10d_functional
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _called(operator: Any, *arguments: Any) -> Tensor:
    """A collective's result, waited for; under torch.compile in the form that it traces."""
    if torch.compiler.is_compiling():
        traced: Tensor = _functional.wait_tensor(operator(*arguments))
        return traced
    with _below_autograd():
        result: Tensor = _functional.wait_tensor.default(operator.default(*arguments))
    return result


def all_reduce(x: Tensor, group: TpGroup, op: str = "sum") -> Tensor:
    """The reduction over all ranks: same shape. Not differentiable: ``apply_move`` is."""
    return _called(_functional.all_reduce, x.contiguous(), op, group.name)


def all_gather_parts(x: Tensor, group: TpGroup) -> Tensor:
    """All ranks' ``x``, stacked: [..] -> [size, ..]."""
    return _called(_functional.all_gather_into_tensor, x.contiguous().view(1, *x.shape), group.size, group.name)


def reduce_scatter_parts(parts: Tensor, group: TpGroup) -> Tensor:
    """This rank's sum: [size, ..] -> [..]."""
    return _called(_functional.reduce_scatter_tensor, parts.contiguous(), "sum", group.size, group.name).squeeze(0)


def stretched(layout: Layout, length: int, step: Step) -> Layout:
    """A sequence's split at the length of this run.

    Args:
        layout: Of the length planned with.
        length: Local where ``step`` makes the whole dim of it, else whole.
        step: The step.

    Raises:
        ValidationError: The length does not divide.
    """
    whole = length * layout.ranks if step in ("all_gather", "pad") else length
    if whole % layout.ranks:
        raise ValidationError(
            f"{step} of a sequence",
            "its length does not divide by the ranks",
            got=whole,
            need=f"a multiple of {layout.ranks}",
            remedy="Call the model itself, not a part of it: the model picks a schedule for any length.",
        )
    return balanced(whole, layout.ranks)


def take(step: Step, x: Tensor, move: Move, group: TpGroup, is_backward: bool) -> Tensor:
    """One step of a move on a plain tensor; ``is_backward`` says how copies are treated (module docstring)."""
    if step == "identity":
        return x
    if step == "all_reduce":
        return all_reduce(x, group)
    if step == "lift":
        return x if group.rank == 0 else torch.zeros_like(x)
    dim, layout = move.dim, move.layout
    assert layout is not None, f"{step} needs a layout"
    if layout.elastic:
        layout = stretched(layout, x.shape[dim], step)
    if step == "all_gather":
        parts = all_gather_parts(x, group)
        if dim == 0 and is_plain(layout):
            return parts.flatten(0, 1)
        return summed_parts(parts, dim, layout) if is_backward else canonical(parts, dim, layout)
    if step == "reduce_scatter":
        return reduce_scatter_parts(local_parts(x, dim, layout, copies=not is_backward), group)
    if step == "slice":
        return local_part(x, dim, layout, group.rank, copies=not is_backward)
    return padded_part(x, dim, layout, group.rank)  # pad: the free backward of slice


class _Moved(torch.autograd.Function):
    """A move on the autograd tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, group: TpGroup, is_backward: bool) -> Tensor:
        ctx.move, ctx.group, ctx.is_backward = move, group, is_backward
        moved = take(move.forward, x, move, group, is_backward)
        return moved.view_as(x) if moved is x else moved  # an input returned as it is would be marked as such

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        move = ctx.move
        if torch.is_grad_enabled() and gradient.requires_grad:  # create_graph: the adjoint move, on the tape
            adjoint = Move(move.backward, move.forward, move.dim, move.layout)
            on_tape: Tensor = _Moved.apply(gradient, adjoint, ctx.group, not ctx.is_backward)  # type: ignore[no-untyped-call]
            return on_tape, None, None, None
        return take(move.backward, gradient, move, ctx.group, not ctx.is_backward), None, None, None


def apply_move(x: Tensor, move: Move, group: TpGroup) -> Tensor:
    """Do ``move`` on ``x``, and on its gradient in the backward pass.

    Args:
        x: This rank's tensor.
        move: Steps, and the dim and layout they act on.
        group: The tensor-parallel group; every rank makes the same calls in the same order.

    Returns:
        The moved value; with gradients off possibly a view of ``x`` (``identity``, ``slice``), as the dense code
        would have had ``x`` itself.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        moved: Tensor = _Moved.apply(x, move, group, False)  # type: ignore[no-untyped-call]
        return moved
    return take(move.forward, x, move, group, False)
