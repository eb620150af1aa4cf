"""Local views: while a block runs, its modules see plain local tensors where their DTensor parameters are.

A *region* is a block, or what no block contains. Its forward pre-hook puts local views into the owning modules'
instance ``__dict__``, which Python looks at before ``nn.Module.__getattr__``; its post-hook, which exceptions do not
skip, takes them out again. So classes, names, ``state_dict``, ``deepcopy`` and FSDP2 see nothing but DTensors. With
gradients, one autograd function per region reads all of its parameters; its backward zeroes padding, makes DTensors
of the gradients, and all-reduces the partial ones in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from colrow.cost_models.errors import UsageError
from colrow.planner.edits import ForwardEdits

from .collectives import all_reduce
from .gradients import deliver
from .groups import TpGroup
from .schedules import Running
from .slices import gaps, local_part, padded_part, without_gaps
from .storage import ParameterSpec, owners

Slot = tuple[nn.Module, str]


class Reader:
    """One parameter of a region: where it is, and how it is read.

    Attributes:
        spec: Of the parameter.
        slots: Where it is read; several if it is tied.
        is_plain: What is stored is what is read.
        is_masked: Padding in the gradient must be zeroed.
        padding: Dim, start and length of what this rank's block is padded with.
        is_partial: Gradients are partial sums: marked so, or of intervals that several ranks read.
        forms: How each schedule reads it.
    """

    __slots__ = ("cleared", "forms", "is_masked", "is_partial", "is_plain", "padding", "slots", "spec")

    def __init__(self, spec: ParameterSpec, slots: list[Slot], rank: int) -> None:
        is_cut = spec.split is not None and spec.encoding == "whole"
        self.spec, self.slots = spec, slots
        self.is_plain = not is_cut and not (spec.lifted and rank)
        found = gaps(spec.split[1], rank) if spec.split is not None and not is_cut else ()
        self.padding = tuple((cast(int, spec.dim), start, length) for start, length in found)
        self.is_masked, self.cleared = bool(found), -1
        self.is_partial = spec.partial_grad or is_cut
        self.forms: tuple[Reader, ...] = (self,)

    def read(self, stored: Tensor, rank: int) -> Tensor:
        """What the forward code of ``rank`` sees: [stored block] -> [local shape]."""
        if self.spec.lifted and rank:
            return torch.zeros_like(stored)
        dim, layout = cast(Any, self.spec.split)
        return local_part(stored, dim, layout, rank)

    def clear(self, stored: DTensor, grad: bool) -> None:
        """Zero the padding: noise or an initialisation may have filled it. Without ``grad`` only if a version tells."""
        if (grad or stored._version != self.cleared) and not stored._local_tensor.is_inference():
            for at in self.padding:
                stored._local_tensor.data.narrow(*at).zero_()  # not seen by autograd: nothing reads padding
            self.cleared = stored._version

    def unread(self, gradient: Tensor, rank: int) -> Tensor:
        """The adjoint of ``read``; the identity where the parameter is lifted (its gradient is whole on every rank)."""
        if self.is_masked:
            dim, layout = cast(Any, self.spec.split)
            return without_gaps(gradient, dim, layout, rank)
        if self.is_plain or self.spec.lifted:
            return gradient
        dim, layout = cast(Any, self.spec.split)
        return padded_part(gradient, dim, layout, rank)


class _Read(torch.autograd.Function):
    """Parameters (DTensors) -> what forward code reads (plain tensors); gradients the other way."""

    @staticmethod
    def forward(ctx: Any, readers: list[Reader], group: TpGroup, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.readers, ctx.group, ctx.parameters = readers, group, parameters
        ctx.version = parameters[-1]._version  # one stands for all: each costs as much as a small operator
        ctx.set_materialize_grads(False)  # a parameter no output depends on keeps its None
        rank = group.rank
        return tuple(
            p._local_tensor.detach() if reader.is_plain else reader.read(p._local_tensor, rank)
            for reader, p in zip(readers, parameters, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or ctx.parameters[-1]._version != ctx.version:
            refuse_backward(ctx, gradients)
        found: list[Any] = list(gradients)
        make_stored(found, ctx.readers, ctx.group)
        deliver(found, ctx.parameters, [node for node, _ in ctx.next_functions])
        return (None, None, *found)


def refuse_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> None:
    """What would be silently wrong: autograd does not see inside a DTensor, nor a gradient that is delivered.

    Raises:
        UsageError: ``create_graph``; or the last parameter of the region, if it gets a gradient, was changed in place
            since the forward, as an optimiser's step does.
    """
    if torch.is_grad_enabled():
        raise UsageError(
            ctx.readers[0].spec.fqn,
            "gradients of parameters cannot be differentiated again after the rewrite (create_graph=True)",
            remedy="Differentiate twice with respect to inputs only, or train the dense model.",
        )
    if gradients[-1] is not None:
        raise UsageError(
            ctx.readers[-1].spec.fqn,
            "it was changed in place between a forward and its backward",
            remedy="Finish every backward before the optimiser's step, or run the forward again after it.",
        )


def refuse_replaced(fqn: str, value: Any) -> None:
    """Raises UsageError: ``value`` is no DTensor, so it is not known what this rank holds of it."""
    raise UsageError(
        fqn,
        "the model was called with something else in the place of this parameter",
        got=type(value).__name__,
        need="a DTensor placed as the rewrite stored it",
        remedy="Load dense values with load_state_dict; torch.func.grad does not take a rewritten model.",
    )


def make_stored(found: list[Any], readers: list[Reader], group: TpGroup) -> None:
    """Gradients of what was read to those of what is stored, in place: padding zeroed, partial ones reduced."""
    partial: dict[torch.dtype, list[int]] = {}
    for i, reader in enumerate(readers):
        if found[i] is not None:  # no variable for it: ``deliver`` counts references
            if reader.is_masked or not reader.is_plain:
                found[i] = reader.unread(found[i], group.rank)
            if reader.is_partial:
                partial.setdefault(found[i].dtype, []).append(i)
    for places in partial.values():
        whole = all_reduce(torch.cat([found[i].reshape(-1) for i in places]), group)
        shapes = [found[i].shape for i in places]
        for i, shape, part in zip(places, shapes, torch.split(whole, [s.numel() for s in shapes]), strict=True):
            found[i] = part.view(shape)


class _ReadTraced(torch.autograd.Function):
    """The same for torch.compile, on local tensors: it knows ``to_local``, but not how ``_Read`` delivers gradients."""

    @staticmethod
    def forward(ctx: Any, readers: list[Reader], group: TpGroup, *stored: Tensor) -> tuple[Tensor, ...]:
        ctx.readers, ctx.group = readers, group
        rank = group.rank
        return tuple(
            local.view_as(local) if reader.is_plain else reader.read(local, rank)
            for reader, local in zip(readers, stored, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found: list[Any] = list(gradients)
        make_stored(found, ctx.readers, ctx.group)
        return (None, None, *found)


class Region:
    """The parameters that are read together, and the hooks of the module whose forward reads them."""

    def __init__(self, module: nn.Module, readers: list[Reader], group: TpGroup, running: Running | None) -> None:
        self.module, self.readers, self.group, self.running = module, readers, group, running
        self.depth = 0  # of nested calls: a module that calls itself reads its parameters once
        self.is_installed = False
        self.num_parts = num_parts(module)
        self.checkpointed = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: put the local views in place, unless a region around this one has."""
        self.depth += 1
        if self.depth > 1 or not self.readers:
            return
        if self.is_installed:  # for the backward of an earlier call, which broke off
            self.remove()
        if not torch.compiler.is_compiling() and num_parts(module) != self.num_parts:
            self.refuse_additions()
        owner, name = self.readers[0].slots[0]
        if name in owner.__dict__:
            return
        grad, rank = torch.is_grad_enabled(), self.group.rank
        readers: list[Reader] = []
        parameters: list[Tensor] = []
        self.is_installed = True
        running, schedule = self.running, 0
        if running is not None:
            schedule = running.follow() if running.several and not running.is_forward else running.index
        for known in self.readers:
            reader = known.forms[schedule]
            owner, name = reader.slots[0]
            p: Any = owner._parameters[name]
            stored = getattr(p, "_spec", None)
            if stored is None:
                refuse_replaced(reader.spec.fqn, p)
            elif len(stored.placements) != 1:  # FSDP2 has it in pieces
                self.remove()
                self.hand_on()
                self.depth -= 1
                return self.enter(module, args)
            if reader.is_masked and not torch.compiler.is_compiling():
                reader.clear(p, grad)
            if grad and p.requires_grad:
                readers.append(reader)
                parameters.append(p)
            else:
                view = p._local_tensor if reader.is_plain else reader.read(p._local_tensor, rank)
                for owner, name in reader.slots:
                    owner.__dict__[name] = view
        if readers:
            if torch.compiler.is_compiling():
                local = [cast(DTensor, p).to_local() for p in parameters]
                views = _ReadTraced.apply(readers, self.group, *local)  # type: ignore[no-untyped-call]
            else:
                views = _Read.apply(readers, self.group, *parameters)  # type: ignore[no-untyped-call]
            for reader, view in zip(readers, views, strict=True):
                for owner, name in reader.slots:
                    owner.__dict__[name] = view
        return None

    def refuse_additions(self) -> None:
        """Modules were put into this one after the rewrite: fine as long as they bring no parameters.

        Raises:
            UsageError: They do (an adapter): the plan has no place for these, and their results would be partial sums
                or slices.
        """
        for name, value in self.module.named_parameters():
            if not isinstance(value, DTensor):
                self.depth -= 1
                raise UsageError(
                    f"{type(self.module).__name__}: {name}",
                    "this parameter was added after the rewrite, and the plan does not know it",
                    remedy="Add adapters first; then plan and parallelize the model with them.",
                )
        self.num_parts = num_parts(self.module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after exceptions too: take the views out again."""
        self.depth = max(0, self.depth - 1)
        if self.depth == 0 and self.is_installed:
            if self.checkpointed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.keep_for_recomputation(output)
            self.remove()

    def keep_for_recomputation(self, output: Any) -> None:
        """Have the same views in place during the backward of ``output``, if a part is under activation checkpointing.

        Hugging Face layers (attribute ``gradient_checkpointing``) checkpoint their ``forward`` and leave hooks out, so
        recomputing them calls none of ours. Another module that does so can set the attribute itself.
        """
        if not any(part.gradient_checkpointing and part.training for part in self.checkpointed):
            return
        views = [(owner, name, owner.__dict__[name]) for reader in self.readers for owner, name in reader.slots]
        schedule = self.running.index if self.running is not None else 0

        def install(gradient: Tensor) -> None:
            if self.running is not None:
                self.running.index = schedule
            if not self.is_installed:
                self.is_installed = True
                for owner, name, view in views:
                    owner.__dict__[name] = view
                torch.autograd.Variable._execution_engine.queue_callback(self.forget)  # at the end of the backward

        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(install)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the views out: the owners show their parameters again."""
        self.is_installed = False
        for reader in self.readers:
            for owner, name in reader.slots:
                owner.__dict__.pop(name, None)

    def forget(self) -> None:
        """The backward that recomputed is over."""
        self.remove()
        if self.running is not None:
            self.running.stop()

    def hand_on(self) -> None:
        """Give the parameters that FSDP2 gathers inside this module to regions at those FSDP modules, for good.

        Raises:
            UsageError: FSDP2 shards a parameter at a module around this one, which is not running.
        """
        inner = {module: set(module.modules()) for module in self.module.modules() if isinstance(module, FSDPModule)}
        inner.pop(cast(Any, self.module), None)
        kept: list[Reader] = []
        moved: dict[nn.Module, list[Reader]] = {}
        for reader in self.readers:
            owner, name = reader.slots[0]
            holders = [module for module, inside in inner.items() if owner in inside]
            if len(cast(Any, owner._parameters[name])._spec.placements) == 1:
                kept.append(reader)
            elif holders:
                moved.setdefault(min(holders, key=lambda module: len(inner[module])), []).append(reader)
            else:
                raise UsageError(
                    reader.spec.fqn,
                    "FSDP2 holds it in pieces",
                    remedy="Call the module that was passed to fully_shard, not a part of it.",
                )
        self.readers = kept
        for module, readers in moved.items():
            Region(module, readers, self.group, self.running)


def num_parts(module: nn.Module) -> int:
    """How many modules are in it, itself included and shared ones once per place: a fifth of the time of ``modules()``,
    as it is asked at every call of a block.
    """
    found = 1
    for part in module._modules.values():
        if part is not None:
            found += num_parts(part) if part._modules else 1
    return found


def install_regions(
    model: nn.Module,
    blocks: Iterable[str],
    plan: dict[str, ParameterSpec],
    group: TpGroup,
    running: Running | None = None,
    edits: Sequence[ForwardEdits] = (),
    apart: Sequence[str] = (),
) -> list[Region]:
    """Make the forwards of ``model`` see local tensors. ``store`` has run before; FSDP2's ``fully_shard`` comes after.

    Args:
        model: All of its parameters are DTensors on the tp mesh.
        blocks: Paths of modules that read their parameters themselves (decoder layers); the innermost one counts.
        plan: The spec of every parameter name (``store`` returns it).
        group: The tensor-parallel group.
        running: Says which of several schedules a forward follows.
        edits: Of these schedules; which of them lift a parameter, or leave its gradient partial.
        apart: Blocks of which the model calls parts without calling the block: they are read once per forward of the
            model.

    Returns:
        One region per block; one of the root for the rest; and one per module of the rest, for calls that do not come
        through the root.
    """
    block_set = set(blocks)
    regions: dict[str, dict[int, Reader]] = {}
    modules = dict(model.named_modules())
    first_path = {id(module): path for path, module in modules.items()}
    for fqn, owner, name, value in owners(model):
        path = first_path[id(owner)]
        if fqn.rpartition(".")[0] != path:
            continue  # a module of several names is read under its first
        block = path
        while block and block not in block_set:
            block = block.rpartition(".")[0]
        for region in {block, block or path}:
            known = regions.setdefault(region, {})
            if id(value) in known:
                known[id(value)].slots.append((owner, name))
            else:
                known[id(value)] = _reader(plan[fqn], [(owner, name)], group.rank, edits)
    callers = {path: model if path in apart else _called(modules, path) for path in regions}
    return [Region(callers[path], list(readers.values()), group, running) for path, readers in regions.items()]


def _called(modules: dict[str, nn.Module], path: str) -> nn.Module:
    """The module at ``path``; a block that is a list of modules is never called, but the module around it is."""
    while path and isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return modules[path]


def _reader(spec: ParameterSpec, slots: list[Slot], rank: int, edits: Sequence[ForwardEdits]) -> Reader:
    reader = Reader(spec, slots, rank)
    forms = [replace(spec, partial_grad=spec.fqn in one.partial, lifted=spec.fqn in one.lifted) for one in edits]
    if len(forms) > 1:
        reader.forms = tuple(Reader(form, slots, rank) for form in forms)
    return reader
