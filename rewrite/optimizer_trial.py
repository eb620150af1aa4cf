"""Optimisers over stored parameters: right, or refused at their first step.

Elementwise optimisers, and those that take norms and dot products, step DTensors as they step dense tensors: padding is
zero and adds nothing. Others may not know DTensors at all (Adafactor), or see how much is padding: a mean over a padded
parameter divides by too much, a learning rate made from the padded shape (Muon) is another one. What an optimiser does
is not written anywhere, so one that is not known is tried: it steps a small parameter stored as the model's are, and
the same parameter dense.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from colrow.cost_models.errors import UsageError
from colrow.planner.layout import balanced

from .storage import ParameterSpec, as_dense, owners, parameter, specs_of

_optim: Any = torch.optim
KNOWN = frozenset(
    getattr(_optim, name) for name in "SGD Adam AdamW Adamax NAdam RAdam RMSprop Adadelta Adagrad ASGD LBFGS".split()
)
FUSED = frozenset({_optim.Adam, _optim.AdamW})  # torch's DTensors know these fused steps only
TOLERANCE = 0.05  # of the largest change: Muon computes in bfloat16; at the trial's sizes padding is a sixth or more
STEPS = 2

_stored: WeakKeyDictionary[nn.Module, DeviceMesh] = WeakKeyDictionary()
_seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_hooks: list[Any] = []


def check_optimizers_of(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on, look at every optimiser over parameters of ``model`` before its first step.

    Args:
        model: Stored (``storage.store``) on ``mesh``; FSDP2 may shard it afterwards. A deep copy is another model.
        mesh: 1-D.
    """
    _stored[model] = mesh
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling() and _seen.get(optimizer) != len(optimizer.param_groups):
        _check(optimizer)
        _seen[optimizer] = len(optimizer.param_groups)


def _check(optimizer: Optimizer) -> None:
    """Tries an unknown optimiser once for every way in which its parameters are stored.

    Raises:
        UsageError: It raises for stored parameters, or steps them otherwise than dense ones.
    """
    groups = [g for g in optimizer.param_groups if type(optimizer) not in KNOWN or _is_unknown_fused(optimizer, g)]
    if not groups:
        return
    known = {
        id(value): (specs[fqn], mesh)
        for model, mesh in list(_stored.items())
        for specs in [specs_of(model)]
        for fqn, _, _, value in owners(model)
        if fqn in specs
    }
    for group in groups:
        tried = set()
        for value in group["params"]:
            if id(value) in known:
                spec, mesh = known[id(value)]
                shape = value.shape
                is_padded = spec.encoding == "reordered" and spec.stored_shape(shape) != spec.dense_shape(shape)
                dim = spec.dim if spec.encoding != "whole" else None
                if (value.dim(), dim, is_padded) not in tried:
                    tried.add((value.dim(), dim, is_padded))
                    _try(optimizer, group, value, dim, is_padded, mesh, spec.fqn)


def _is_unknown_fused(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("fused")) and type(optimizer) not in FUSED


def _try(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    dim: int | None,
    is_padded: bool,
    mesh: DeviceMesh,
    fqn: str,
) -> None:
    for shape in _shapes(like.dim(), dim, is_padded, mesh.size()):
        spec = ParameterSpec(fqn) if dim is None else ParameterSpec(fqn, dim, balanced(shape[dim], mesh.size()))
        start, *gradients = _random(shape, like.device)
        dense, again = (_stepped(optimizer, group, start.clone(), gradients) for _ in range(2))
        if isinstance(dense, Exception) or isinstance(again, Exception) or not torch.equal(dense, again):
            warnings.warn(f"colrow: {_name(optimizer)} could not be tried on a split parameter", stacklevel=4)
            return
        blocks = [parameter(spec.block(value, mesh.get_local_rank()), spec, mesh).data for value in (start, *gradients)]
        found = _stepped(optimizer, group, blocks[0], blocks[1:])
        if isinstance(found, Exception):
            raise UsageError(
                _name(optimizer),
                f"this optimiser does not step parameters that are DTensors ({_first_line(found)})",
                got=f"{fqn}, {'split' if dim is not None else 'replicated'}",
                remedy="Use an elementwise optimiser (SGD, AdamW; fused only with Adam and AdamW).",
            ) from found
        error = (as_dense(found, spec).full_tensor() - dense).abs().max()  # type: ignore[arg-type]
        if not error <= TOLERANCE * (dense - start).abs().max():
            why = "its dim does not divide by the ranks, so it is stored with padding" if is_padded else "it is split"
            raise UsageError(
                _name(optimizer),
                "this optimiser would not step a split parameter as it steps the dense one",
                got=f"{fqn}: {why}",
                remedy="Use an elementwise optimiser (SGD, AdamW) for it, or another tp.",
            )


def _shapes(dims: int, split: int | None, is_padded: bool, ranks: int) -> Iterator[tuple[int, ...]]:
    """Long and short in the split dim: shapes decide about some steps."""
    length = 2 * ranks + (1 if is_padded else 0)
    for other in (2, 2 * length) if dims > 1 else (2,):
        yield tuple(length if d == split else other for d in range(dims))


def _random(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """A parameter and its gradients; their mean is not zero, so that what is made of it shows."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) + 1).to(device) for _ in range(1 + STEPS)]


def _stepped(optimizer: Optimizer, group: dict[str, Any], start: Tensor, gradients: list[Tensor]) -> Tensor | Exception:
    """``start`` after steps of another optimiser with these options."""
    value = nn.Parameter(start)
    options = {name: copy.copy(group[name]) for name in optimizer.defaults if name in group}
    try:
        other = type(optimizer)([value], **options)
        for gradient in gradients:
            value.grad = gradient.clone()
            other.step()
    except Exception as error:
        return error
    return value.detach()


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
