"""How a parameter lives between forwards: always a DTensor on the tp mesh, so that FSDP2, clipping, optimisers and
DCP see the truth.

DTensor carries equal consecutive blocks (``Shard``) and whole copies (``Replicate``) and nothing else. A layout is
stored as one of

    whole       no layout, or intervals held several times       ``Replicate``; ranks cut their part when they read it
    even        equal consecutive blocks                          ``Shard(dim)``
    reordered   segments, uneven or padded blocks                 ``Shard(dim)`` over the ranks' padded blocks one
    after another

A reordered parameter's global tensor is a permutation of the dense one, with zeros between; optimisers and norms do
not mind. State dicts do: module hooks turn it into the dense order and shape on the way out, and back on the way in.
Padding is zero and stays zero, because its gradient is zeroed (see ``regions``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from colrow.cost_models.errors import UsageError
from colrow.planner.edits import ParameterEdit
from colrow.planner.layout import Layout

from .slices import canonical, is_plain, local_part, local_parts

Encoding = Literal["whole", "even", "reordered"]


@dataclass(frozen=True)
class ParameterSpec(ParameterEdit):
    """How one parameter is split and read, and what that means for how it is stored.

    Attributes:
        partial_grad: Each rank computes a partial sum of its gradient.
        lifted: It joins a partial sum, so that only the first rank reads it.
    """

    partial_grad: bool = False
    lifted: bool = False

    @property
    def split(self) -> tuple[int, Layout] | None:
        """Dim and layout, or None for a parameter every rank reads whole."""
        return None if self.dim is None or self.layout is None else (self.dim, self.layout)

    @property
    def encoding(self) -> Encoding:
        """How the parameter is stored (module docstring)."""
        if self.split is None or self.split[1].is_replicated:
            return "whole"
        return "even" if is_plain(self.split[1]) else "reordered"

    def stored_shape(self, shape: torch.Size) -> torch.Size:
        """The DTensor's global shape for a parameter of dense ``shape``: blocks are padded to equal length."""
        return self._with_length(shape, lambda layout: layout.ranks * layout.local)

    def dense_shape(self, stored: torch.Size) -> torch.Size:
        """The inverse of ``stored_shape``."""
        return self._with_length(stored, lambda layout: layout.size)

    def _with_length(self, shape: torch.Size, length: Any) -> torch.Size:
        if self.encoding != "reordered":
            return shape
        dim, layout = cast(tuple[int, Layout], self.split)
        return torch.Size((*shape[:dim], length(layout), *shape[dim + 1 :]))

    def stored(self, dense: Tensor) -> Tensor:
        """The global tensor as it is stored: [dense shape] -> [stored shape]."""
        if self.encoding != "reordered":
            return dense
        dim, layout = cast(tuple[int, Layout], self.split)
        return local_parts(dense, dim, layout).movedim(0, dim).flatten(dim, dim + 1)

    def dense(self, stored: Tensor) -> Tensor:
        """The inverse of ``stored``: [stored shape] -> [dense shape]."""
        if self.encoding != "reordered":
            return stored
        dim, layout = cast(tuple[int, Layout], self.split)
        parts = stored.reshape(*stored.shape[:dim], layout.ranks, layout.local, *stored.shape[dim + 1 :])
        return canonical(parts.movedim(dim, 0), dim, layout)

    def block(self, dense: Tensor, rank: int) -> Tensor:
        """What ``rank`` stores of ``dense``: a contiguous copy."""
        if self.encoding == "whole":
            return dense.detach().clone(memory_format=torch.contiguous_format)
        dim, layout = cast(tuple[int, Layout], self.split)
        return local_part(dense.detach(), dim, layout, rank).clone(memory_format=torch.contiguous_format)

    def placements(self) -> list[Placement]:
        """On the 1-D tp mesh."""
        return [Replicate()] if self.encoding == "whole" else [Shard(cast(int, self.dim))]


def parameter(block: Tensor, spec: ParameterSpec, mesh: DeviceMesh, requires_grad: bool = True) -> nn.Parameter:
    """A parameter from what this rank stores of it (``ParameterSpec.block``; meta is fine), on the 1-D tp ``mesh``."""
    whole = DTensor.from_local(block, mesh, spec.placements(), run_check=False)
    return nn.Parameter(whole, requires_grad=requires_grad)


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield ``(fqn, module, name, parameter)`` for every name of every parameter, ties included."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            if value is not None:
                yield f"{path}.{name}" if path else name, module, name, value


def resolved(model: nn.Module, specs: Iterable[ParameterSpec], ranks: int) -> dict[str, ParameterSpec]:
    """One spec for every name of every parameter: tied names share theirs, what is not named is replicated.

    Raises:
        UsageError: A spec names no parameter, does not fit its shape or the number of ``ranks``, or contradicts a
            tied one.
    """
    names = {fqn: value for fqn, _, _, value in owners(model)}
    by_parameter: dict[int, ParameterSpec] = {}
    for spec in specs:
        value = names.get(spec.fqn)
        if value is None:
            raise UsageError(spec.fqn, "the model has no such parameter", remedy="Plan this model again.")
        if spec.split is not None:
            dim, layout = spec.split
            if dim >= value.dim() or value.shape[dim] != layout.size:
                raise UsageError(spec.fqn, f"dim {dim} does not fit", got=tuple(value.shape), need=layout.size)
            if layout.ranks != ranks:
                raise UsageError(
                    spec.fqn, "planned for another group size", got=f"a group of {ranks}", need=layout.ranks
                )
        known = by_parameter.setdefault(id(value), spec)
        if (known.split, known.partial_grad, known.lifted) != (spec.split, spec.partial_grad, spec.lifted):
            raise UsageError(
                spec.fqn, f"tied to {known.fqn}, but split differently", remedy="Tied names share a layout."
            )
    return {fqn: by_parameter.get(id(value), ParameterSpec(fqn)) for fqn, value in names.items()}


def store(model: nn.Module, specs: Iterable[ParameterSpec], mesh: DeviceMesh) -> dict[str, ParameterSpec]:
    """Turn every parameter of ``model`` into a DTensor on the 1-D tp ``mesh``, in place; ties stay ties, meta stays
    meta.

    Args:
        model: Dense; every rank holds the same values (or meta). It keeps its classes, names and hooks.
        specs: Of the split parameters; others are replicated.
        mesh: 1-D.

    Returns:
        The spec of every parameter name.

    Raises:
        UsageError: As ``resolved``; then nothing is changed.
    """
    plan = resolved(model, specs, mesh.size())
    rank = mesh.get_local_rank()
    made: dict[int, nn.Parameter] = {}
    by_module: dict[int, tuple[nn.Module, dict[str, ParameterSpec]]] = {}
    for fqn, module, name, value in list(owners(model)):
        spec = plan[fqn]
        if id(value) not in made:
            made[id(value)] = parameter(spec.block(value, rank), spec, mesh, value.requires_grad)
        module._parameters[name] = made[id(value)]
        by_module.setdefault(id(module), (module, {}))[1][name] = spec
    for module, own in by_module.values():
        keep_state_dict_dense(module, own)
    return plan


def keep_state_dict_dense(module: nn.Module, own: dict[str, ParameterSpec]) -> None:
    """Register the hooks that give ``module``'s own parameters their dense order and shape in state dicts, and back."""
    reordered = {name: spec for name, spec in own.items() if spec.encoding == "reordered"}
    if reordered:
        module.register_state_dict_post_hook(partial(_to_dense, reordered))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(partial(_from_dense, own))  # type: ignore[no-untyped-call]


def specs_of(model: nn.Module) -> dict[str, ParameterSpec]:
    """The spec of every parameter name of a stored model, which its modules' hooks know."""
    found: dict[str, ParameterSpec] = {}
    for path, module in model.named_modules():
        for hook in module._load_state_dict_pre_hooks.values():
            own = getattr(hook, "hook", None)
            if isinstance(own, partial) and own.func is _from_dense:
                found |= {f"{path}.{name}" if path else name: spec for name, spec in own.args[0].items()}
    return found


def _to_dense(own: dict[str, ParameterSpec], module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict post-hook: reordered DTensors to dense ones. Collective; gathers one whole parameter at a time."""
    for name, spec in own.items():
        value = state.get(prefix + name)
        if isinstance(value, DTensor):
            state[prefix + name] = as_dense(value, spec)


def _from_dense(own: dict[str, ParameterSpec], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load state dict pre-hook: dense tensors and dense DTensors to what is stored."""
    for name, spec in own.items():
        value, mine = state.get(prefix + name), module._parameters.get(name)
        if isinstance(value, Tensor) and isinstance(mine, DTensor):
            state[prefix + name] = as_stored(value, spec, mine, prefix + name)


def as_dense(value: DTensor, spec: ParameterSpec) -> DTensor:
    """A stored DTensor as one in dense order and shape, split into DTensor's own blocks over the same mesh."""
    if spec.encoding != "reordered":
        return value
    placements = [
        Replicate() if p.is_replicate() else Shard(cast(Any, p).dim) for p in value.placements
    ]  # _StridedShard too
    with torch.no_grad():
        if value.is_meta:
            dense = torch.empty(spec.dense_shape(value.shape), dtype=value.dtype, device="meta")
        else:
            dense = spec.dense(value.full_tensor())
        return distribute_tensor(dense, value.device_mesh, placements, src_data_rank=None)


def as_stored(value: Tensor, spec: ParameterSpec, like: DTensor, fqn: str) -> Tensor:
    """A dense tensor or dense DTensor, stored as ``like`` is; one of another shape is left for torch to report.

    Raises:
        UsageError: ``set_model_state_dict(broadcast_from_rank0=True)`` has cut the dense tensor into a padded
            parameter.
    """
    shape = spec.dense_shape(like.shape)
    if isinstance(value, DTensor):
        if value.shape == like.shape != shape:  # no state dict of ours; torch writes its own blocks into the parameter
            raise UsageError(
                fqn,
                "torch cannot broadcast a state dict into a padded parameter",
                got=tuple(value.shape),
                need=tuple(shape),
                remedy="Load without broadcast_from_rank0, or call model.load_state_dict with dense tensors.",
            )
        stored_alike = (value.device_mesh, value.placements) == (like.device_mesh, like.placements)
        if spec.encoding != "reordered" and stored_alike:
            return value
    with torch.no_grad():
        dense = value.full_tensor() if isinstance(value, DTensor) else value
        if dense.shape != shape:
            return value
        stored = spec.stored(dense.to(like.device))
        return distribute_tensor(stored, like.device_mesh, like.placements, src_data_rank=None)
