"""Optimiser state in dense order: what ``storage`` does for a model's state dict, done for its optimiser's.

Moments of a reordered parameter (segments, padding) are permuted and padded as the parameter is. Saved like that they
would fit the same layout only, and a checkpoint resumed at another group size would silently be wrong. With these hooks
``optimizer.state_dict()`` (so ``get_optimizer_state_dict`` and DCP) gives and takes what a dense one would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from colrow.cost_models.errors import UsageError

from .storage import ParameterSpec, as_dense, as_stored, owners, specs_of

Convert = Callable[[Tensor, ParameterSpec, DTensor], Tensor]


def keep_optimizer_state_dense(optimizer: Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.state_dict()`` dense and ``load_state_dict`` accept dense tensors; call it before either.

    Args:
        optimizer: Over parameters of ``model``, and after FSDP2's ``fully_shard`` if that is used.
        model: Rewritten.
    """
    optimizer.register_state_dict_post_hook(partial(_to_dense, model))
    optimizer.register_load_state_dict_pre_hook(partial(_from_dense, model))


def _to_dense(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """State dict post-hook. Collective, like the model's."""
    return _converted(model, optimizer, state, lambda value, spec, _: as_dense(value, spec))  # type: ignore[arg-type]


def _from_dense(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Load state dict pre-hook."""
    return _converted(model, optimizer, state, lambda value, spec, like: as_stored(value, spec, like, spec.fqn))


def _converted(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], convert: Convert) -> dict[str, Any]:
    """A copy of an optimiser's state dict with every tensor that is shaped like its parameter converted.

    Raises:
        UsageError: State of a reordered parameter has another shape (factored moments): its order cannot be told.
    """
    specs = specs_of(model)
    known = {id(value): specs[fqn] for fqn, _, _, value in owners(model)}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]  # fresh dicts number them 0, 1, ..
    converted: dict[Any, Any] = dict(state["state"])
    for number, p in zip(numbers, own, strict=False):
        spec = known.get(id(p))
        if spec is None or number not in converted or not isinstance(p, DTensor):
            continue
        shapes = (p.shape, spec.dense_shape(p.shape))
        converted[number] = dict(converted[number])
        for name, value in converted[number].items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape in shapes:
                converted[number][name] = convert(value, spec, p)
            elif spec.encoding == "reordered":
                raise UsageError(
                    spec.fqn,
                    f"the optimiser's {name} is not shaped like the parameter, which is stored reordered",
                    got=tuple(value.shape),
                    need=tuple(p.shape),
                    remedy="Use an optimiser with elementwise state (SGD, AdamW).",
                )
    return state | {"state": converted}
